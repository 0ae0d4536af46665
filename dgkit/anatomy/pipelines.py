"""How pipelines run classifier-free guidance (CFG): to add a pipeline class, add its name to a row of `PIPELINES`."""

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from dgkit.checks import one_of
from dgkit.errors import DgkitError, ModelError

COND, UNCOND, DEGRADED, UNKNOWN = "cond", "uncond", "degraded", "unknown"

COND_FIRST, UNCOND_FIRST, TWO_CALLS, NO_CFG = "cond, uncond", "uncond, cond", "two calls", "none"
CFG_WAYS = (UNCOND_FIRST, COND_FIRST, TWO_CALLS, NO_CFG)


@dataclass(frozen=True)
class Pipeline:
    """The row of pipeline classes that run CFG in the same way.

    Attributes:
        cfg: "uncond, cond" and "cond, uncond": one call of the transformer on a doubled batch, in this order; "two
            calls": one call for each, the conditional first unless the pipeline says otherwise by the name of its
            `cache_context`; "none": every row is conditional.
        condition: the argument of `__call__` that holds the prompts or classes.
        scale: the argument that holds s of u + s (c - u).
        off: its value for s = 1, which is no CFG: 0 where the pipeline has c + (s - 1) (c - u).
        least: CFG is on only where s is above it.
        after: what the pipeline does with u + s (c - u) before the step, on which guidance has no influence.
        references: whether the image stream also holds the tokens of reference images, behind those generated.
        negated: whether the transformer predicts the negative velocity.
    """

    cfg: str
    condition: str = "prompt"
    scale: str = "guidance_scale"
    off: float = 1.0
    least: float = 1.0
    after: str = ""
    references: bool = False
    negated: bool = False

    def guidance(self, s: float, count: int) -> dict[str, Any]:
        """Arguments of `__call__` for the scale s and a number of images; s = 1 is no CFG.

        Raises:
            DgkitError: the pipeline would leave CFG off though s is above 1, or does not take its scale in the call.
        """
        if 1 < s <= self.least:
            raise DgkitError(
                f"guidance_scale={s!r} is not allowed: this pipeline has CFG from above {self.least:g} on, give 1 (no "
                f"CFG) or more than {self.least:g}"
            )
        if self.scale == "guidance_scale":
            return {"guidance_scale": s - 1 + self.off}
        if self.scale.startswith("guider.") and s > 1:
            raise DgkitError(
                f"guidance_scale={s!r} is not allowed: this pipeline's CFG is its guider's, set pipe.guider = "
                f"ClassifierFreeGuidance(guidance_scale={s!r}) and leave it out"
            )
        # `guidance_scale` is the distilled one there; without a negative prompt the true scale is silently ignored
        return {self.scale: s, "negative_prompt": [""] * count} if s > 1 else {}


_TRUE_CFG = Pipeline(TWO_CALLS, scale="true_cfg_scale")
_Z_IMAGE = Pipeline(COND_FIRST, off=0.0, negated=True, after="with `cfg_normalization`, limits its norm")
_NORM = "rescales it to the norm of the conditional prediction"
_STD = "with `guidance_rescale`, rescales it to the standard deviation of the conditional prediction"

_ROWS: tuple[tuple[Pipeline, str], ...] = (
    (
        Pipeline(UNCOND_FIRST),
        """
        StableDiffusion3Pipeline StableDiffusion3Img2ImgPipeline StableDiffusion3InpaintPipeline
        StableDiffusion3ControlNetPipeline StableDiffusion3ControlNetInpaintingPipeline
        PixArtAlphaPipeline PixArtSigmaPipeline SanaPipeline SanaControlNetPipeline AuraFlowPipeline
        HiDreamImagePipeline CogView3PlusPipeline BriaPipeline BriaFiboPipeline PRXPipeline
        CogVideoXPipeline CogVideoXImageToVideoPipeline CogVideoXVideoToVideoPipeline CogVideoXFunControlPipeline
        MochiPipeline AllegroPipeline SanaVideoPipeline SanaImageToVideoPipeline AnyFlowPipeline
        """,
    ),
    (
        Pipeline(UNCOND_FIRST, after=_STD),
        """
        HunyuanDiTPipeline HunyuanDiTControlNetPipeline LTXPipeline LTXImageToVideoPipeline LTXConditionPipeline
        EasyAnimatePipeline EasyAnimateControlPipeline EasyAnimateInpaintPipeline
        """,
    ),
    (Pipeline(COND_FIRST, condition="class_labels"), "DiTPipeline"),
    (Pipeline(COND_FIRST, negated=True, after="takes the channels after the third from c alone"), "LuminaPipeline"),
    (
        _Z_IMAGE,
        """
        ZImagePipeline ZImageImg2ImgPipeline ZImageInpaintPipeline
        ZImageControlNetPipeline ZImageControlNetInpaintPipeline
        """,
    ),
    (
        _TRUE_CFG,
        """
        FluxPipeline FluxImg2ImgPipeline FluxInpaintPipeline FluxControlNetPipeline
        HunyuanVideoPipeline HunyuanVideoImageToVideoPipeline HunyuanSkyreelsImageToVideoPipeline
        """,
    ),
    (
        Pipeline(NO_CFG),
        """
        FluxControlNetImg2ImgPipeline FluxControlNetInpaintPipeline
        FluxControlPipeline FluxControlImg2ImgPipeline FluxControlInpaintPipeline FluxFillPipeline
        SanaSprintPipeline SanaSprintImg2ImgPipeline
        """,
    ),
    (replace(_TRUE_CFG, references=True), "FluxKontextPipeline FluxKontextInpaintPipeline"),
    (Pipeline(NO_CFG, references=True), "Flux2Pipeline"),
    (Pipeline(TWO_CALLS, references=True), "Flux2KleinPipeline Flux2KleinInpaintPipeline LongCatImageEditPipeline"),
    (
        replace(_TRUE_CFG, after=_NORM),
        """
        QwenImagePipeline QwenImageImg2ImgPipeline QwenImageInpaintPipeline
        QwenImageControlNetPipeline QwenImageControlNetInpaintPipeline
        """,
    ),
    (
        replace(_TRUE_CFG, after=_NORM, references=True),
        "QwenImageEditPipeline QwenImageEditInpaintPipeline QwenImageEditPlusPipeline",
    ),
    (
        Pipeline(TWO_CALLS),
        """
        ChromaPipeline ChromaImg2ImgPipeline ChromaInpaintPipeline CogView4Pipeline CogView4ControlPipeline
        OvisImagePipeline GlmImagePipeline
        WanPipeline WanImageToVideoPipeline WanVideoToVideoPipeline WanVACEPipeline LucyEditPipeline
        SkyReelsV2Pipeline SkyReelsV2ImageToVideoPipeline
        Kandinsky5T2IPipeline Kandinsky5I2IPipeline Kandinsky5T2VPipeline Kandinsky5I2VPipeline
        """,
    ),
    (Pipeline(TWO_CALLS, off=0.0), "Krea2Pipeline"),
    (Pipeline(TWO_CALLS, off=0.0, least=2.0), "Cosmos2TextToImagePipeline CosmosTextToWorldPipeline"),
    # its guider says which call is which, and may be diffusers' other than CFG
    (
        Pipeline(TWO_CALLS, scale="guider.guidance_scale", after="leaves it to its guider"),
        """
        HunyuanImagePipeline HunyuanVideo15Pipeline HunyuanVideo15ImageToVideoPipeline
        MotifVideoPipeline MotifVideoImage2VideoPipeline
        """,
    ),
    (Pipeline(TWO_CALLS, negated=True, after=_NORM), "Lumina2Pipeline NucleusMoEImagePipeline"),
    (Pipeline(TWO_CALLS, after=_NORM), "LongCatImagePipeline"),
)

PIPELINES: dict[str, Pipeline] = {name: row for row, names in _ROWS for name in names.split()}
"""By the name of a class of diffusers, exactly: variants of a pipeline often run CFG in another way."""


def row_of_class(cls: type) -> Pipeline | None:
    """The row of a class of diffusers, None if it has none; a class of the same name elsewhere is another one."""
    return PIPELINES.get(cls.__name__) if cls.__module__.startswith("diffusers.") else None


def pipeline_row(pipe: Any, cfg: str | None = None) -> Pipeline:
    """The row of a pipeline's class, or of the nearest above it that has one.

    A class between them with a `__call__` of its own may run CFG in another way: that is found out in the run, see
    `require_known`.

    Args:
        pipe: the pipeline.
        cfg: how it runs CFG, one of `CFG_WAYS`: where dgkit does not know.

    Raises:
        DgkitError: `cfg` is not one of them.
        ModelError: `pipe` is no pipeline; or `cfg` is left out, and no class above has a row.
    """
    if cfg is not None:
        one_of("cfg", cfg, CFG_WAYS)
    if isinstance(pipe, nn.Module) or not hasattr(pipe, "scheduler"):
        raise ModelError(f"expected a diffusers pipeline, got {type(pipe).__name__}")
    known = next((row for c in type(pipe).__mro__ if (row := row_of_class(c)) is not None), None)
    if cfg is not None:
        return replace(known, cfg=cfg) if known else Pipeline(cfg)
    if known is None:
        raise _unknown(type(pipe))
    return known


def require_known(caller: type) -> None:
    """Refuse a `__call__` that is not one of those whose way to run CFG is known.

    Raises:
        ModelError: it is the own one of a class that has no row.
    """
    if row_of_class(caller) is None:
        raise _unknown(caller)


def _unknown(cls: type) -> ModelError:
    return ModelError(
        f"how {cls.__name__} runs classifier-free guidance is not known to dgkit: state it, cfg={UNCOND_FIRST!r} or "
        f"{COND_FIRST!r} for one call of the transformer on a doubled batch, {TWO_CALLS!r} (the conditional one first) "
        f"or {NO_CFG!r}"
    )
