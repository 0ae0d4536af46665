"""Detail Guidance as a guider of diffusers' modular pipelines; no other module of dgkit imports diffusers' guiders."""

import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import diffusers
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from dgkit.anatomy import COND, UNCOND, Call, dissect
from dgkit.anatomy.guider_loops import generated_tokens, number_of_steps
from dgkit.checks import integer, is_integer, number, refuse
from dgkit.errors import DgkitError, ModelError
from dgkit.guidance.dg import DG
from dgkit.guidance.engine import Cost, Engine
from dgkit.guidance.guide import guided
from dgkit.guidance.schedule import Kept, Schedule, schedule_of
from dgkit.guidance.steps import upcast

_MOVED = (
    f"diffusers {diffusers.__version__} has other guiders than those of 0.42, which dgkit.DetailGuidance builds on "
    "(diffusers calls them experimental): use diffusers 0.42, or dgkit.detail_guidance with an ordinary pipeline"
)

try:
    from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
except ImportError as error:
    raise ModelError(f"{_MOVED} ({error})") from error

# what the class below calls or is called by, and the state it reads
_METHODS = {
    "__init__": {"start", "stop", "enabled"},
    "set_state": {"step", "num_inference_steps", "timestep"},
    "get_state": set(),
    "prepare_models": {"denoiser"},
    "cleanup_models": {"denoiser"},
    "_prepare_batch": {"data", "tuple_index", "identifier"},
    "_prepare_batch_from_block_state": {"data", "input_fields", "tuple_index", "identifier"},
    "__call__": {"data"},
}
_STATE = ("_enabled", "_step", "_num_inference_steps", "_count_prepared")

_COND, _UNCOND, _DEGRADED = "pred_cond", "pred_uncond", "pred_cond_degraded"


class DetailGuidance(BaseGuidance):
    """Detail Guidance (arXiv 2510.11538) beside classifier-free guidance, for modular pipelines.

    With c and u the conditional and unconditional predictions and c_m the conditional one with `dims` of block `block`
    edited, each step uses u + s (c - u) + w (c - c_m), where s = lambda + 1 in terms of Eq. 5; with s = 1 there is no u
    and this is c + w (c - c_m), Eq. 4. c_m shares the blocks up to `block` with c, in the same call::

        pipe.update_components(guider=dgkit.DetailGuidance(guidance_scale=4.0))

    What is left out comes from the preset of the model, once the guider meets it; `dg` then holds what is used. `cost`
    counts the block evaluations of all runs so far.

    Args:
        guidance_scale: s; 1 is no CFG, anything else needs a negative prompt ("" will do).
        scale: w; the model's preset (Table 5: w beside CFG unless s = 1) by default.
        block: zero-based block, the paper's m - 1; the model's preset (Table 4) by default.
        dims: channels to edit; the model's preset (Table 4) by default.
        kind, seed: how to edit them, see `dgkit.disrupt`; the paper zeroes them.
        start, stop: the part of the steps with Detail Guidance, from int(start * steps) to before int(stop * steps);
            each timestep of the schedule is a step, as in `dgkit.detail_guidance` (Heun's has nearly twice as many as
            the pipeline is asked for). CFG goes on in all steps (other guiders of diffusers stop CFG, too).
        schedule: in which steps c_m and u are computed, as in `dgkit.detail_guidance`; JSON in the configuration.
        sharing: how c and c_m share work, see `dgkit.guidance.Engine`.
        enabled: whether to guide at all; if not, each step uses c.

    Raises:
        DgkitError: an argument out of range, at once or, where it depends on the model, in the first step; or there one
            that is left out and that no preset states; or CFG without a negative prompt.
        ModelError: a denoiser that dgkit cannot guide, a loop that does not tell its number of steps where `start`,
            `stop` or `schedule` need it, or a diffusers with other guiders.
    """

    _input_predictions = [_COND, _UNCOND, _DEGRADED]

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 1.0,
        scale: float | None = None,
        block: int | None = None,
        dims: Sequence[int] | None = None,
        kind: str = "zero",
        seed: int = 0,
        start: float = 0.0,
        stop: float = 1.0,
        schedule: Schedule | str | dict[str, Any] = "full",
        sharing: str = "replay",
        enabled: bool = True,
    ) -> None:
        _require_known_guiders()
        # all of these end up in a JSON file
        number("guidance_scale", guidance_scale, 0, allowed="give a finite number, 0 or above")
        if scale is not None:
            number("scale", scale, 0, allowed="give a finite number, 0 or above")
        by_hand = " (a guider sees no pipeline to look for them with: use dgkit.calibrate)"
        if block is not None:
            integer("block", block, allowed=f"give an integer{by_hand}")
        if dims is not None and not (isinstance(dims, list | tuple) and all(map(is_integer, dims))):
            refuse("dims", dims, f"give a list of channels{by_hand}")
        integer("seed", seed)
        if not isinstance(enabled, bool):
            refuse("enabled", enabled, "give True or False")
        when = schedule_of(schedule)
        self._given = DG(
            scale=scale, block=block, dims=dims, kind=kind, seed=seed, start=start, stop=stop, schedule=when
        )
        self._every = {_UNCOND: when.uncond, _DEGRADED: when.branch}
        if isinstance(schedule, Schedule):
            self.register_to_config(schedule=asdict(schedule))
        super().__init__(start, stop, enabled)
        _require_known_guiders(self)
        self.guidance_scale = guidance_scale
        self.sharing = sharing
        self.dg: DG | None = None
        self.cost = Cost()
        self._engine: Engine | None = None  # of the step under way
        self._degraded: Any = None  # the transformer's output with c_m, from the call for c to the loop's own
        self._delivered = False
        self._kept: dict[str, Kept] = {}  # of this run: c - u and c - c_m
        self._left_out: set[str] = set()  # predictions that the schedule leaves out in this step
        self._in_step = False  # from `set_state` to the guided prediction

    # ---- which predictions a step needs

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        """Begin a step; see diffusers.

        Raises:
            ModelError: see the class.
        """
        if self._needs_count():
            # `num_inference_steps` is what the user asked for, not how many steps the schedule has
            found = number_of_steps(step, timestep)
            if found is None:
                raise ModelError(
                    f"start={self._given.start!r}, stop={self._given.stop!r} cannot be kept: the pipeline's loop does "
                    f"not tell how many timesteps it has; leave them and the schedule out"
                )
            num_inference_steps = found
        super().set_state(step, num_inference_steps, timestep)
        if step == 0:
            self._kept = {name: Kept() for name in self._every}
        self._left_out = {name for name in self._wanted() if name != _COND and not self._due(name)}
        self._in_step = True

    def _needs_count(self) -> bool:
        return (self._given.start, self._given.stop) != (0.0, 1.0) or any(e.after > 0 for e in self._every.values())

    def _due(self, name: str) -> bool:
        every, count = self._every[name], self._num_inference_steps or 0
        return self._kept.setdefault(name, Kept()).due(every, early=self._step < int(every.after * count))

    def _wanted(self) -> list[str]:
        """The predictions that this step's formula has, in the order in which the loop makes them."""
        with_dg = self._enabled and self._given.scale != 0 and self._in_window()
        return [_COND, *[_UNCOND] * self._with_cfg(), *[_DEGRADED] * with_dg]

    def active_predictions(self) -> list[str]:
        """Those of them that are computed: the loop's calls of the denoiser."""
        return [name for name in self._wanted() if name not in self._left_out]

    def _in_window(self) -> bool:
        start, stop, count = self._given.start, self._given.stop, self._num_inference_steps
        if count is None or (start, stop) == (0.0, 1.0):
            return True
        return int(start * count) <= self._step < int(stop * count)

    @property
    def num_conditions(self) -> int:
        """How many predictions this step needs.

        Before and after the steps pipelines ask whether it is more than one to know whether to make a negative prompt:
        so it is, also without CFG, because the loops of Wan and LTX refuse to run without.
        """
        if self._in_step:
            return len(self.active_predictions())
        return 2 if self._with_cfg() or (self._enabled and self._given.scale != 0) else 1

    def _with_cfg(self) -> bool:
        return self._enabled and not math.isclose(self.guidance_scale, 1.0)

    @property
    def is_conditional(self) -> bool:
        """Whether the prediction under way has the prompt."""
        return self.active_predictions()[max(self._count_prepared - 1, 0)] != _UNCOND

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        """One batch of the loop's inputs for each prediction; see diffusers."""
        predictions = self.active_predictions()
        self._check_prompts([value for value in data.values() if isinstance(value, tuple)])
        return [self._prepare_batch(data, int(name == _UNCOND), name) for name in predictions]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        """The same, where the loop names its inputs."""
        predictions = self.active_predictions()
        pairs = [names for names in input_fields.values() if isinstance(names, tuple)]
        self._check_prompts([tuple(getattr(data, name, None) for name in names) for names in pairs])
        return [
            self._prepare_batch_from_block_state(input_fields, data, int(name == _UNCOND), name) for name in predictions
        ]

    def _check_prompts(self, pairs: list[tuple[Any, ...]]) -> None:
        """Refuse more than a prompt and a negative one, and CFG without the latter, which would do nothing."""
        if any(len(pair) != 2 for pair in pairs):
            raise ModelError(
                "the pipeline's loop has predictions of its own beside the conditional and the unconditional one, as "
                "LTX-2's has: dgkit.DetailGuidance cannot take the place of its guider"
            )
        if self._with_cfg() and not any(positive is not None and negative is not None for positive, negative in pairs):
            raise DgkitError(
                f'guidance_scale={self.guidance_scale!r} needs a negative prompt: pass negative_prompt="" or more, or '
                f"use guidance_scale=1.0"
            )

    # ---- the calls of the denoiser

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Let the next call of the denoiser be that of the next prediction.

        In the call for c the branch runs right away, so that only its output has to be kept until the loop asks for it.
        """
        super().prepare_models(denoiser)
        if not self._enabled:
            return
        predictions = self.active_predictions()
        if self._count_prepared > len(predictions):
            raise ModelError(f"the pipeline's loop makes more predictions than the guider's {predictions}: {_MOVED}")
        prediction = predictions[self._count_prepared - 1]
        if prediction == _COND:
            self._bind(denoiser)
        if prediction == _DEGRADED:
            _replace_next_call(denoiser, self._deliver)
        else:
            degrade = prediction == _COND and _DEGRADED in predictions
            _replace_next_call(denoiser, self._followed(COND if prediction == _COND else UNCOND, degrade))

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """Take off what `prepare_models` put on, had the denoiser not been called in between."""
        super().cleanup_models(denoiser)
        _restore_call(denoiser)

    def _bind(self, denoiser: nn.Module) -> None:
        """Read the denoiser anew in each step, because blocks may have been exchanged, and keep no hold of it after."""
        if guided.get(denoiser):
            raise ModelError("the denoiser is already guided by dgkit.guide or dgkit.detail_guidance: leave that first")
        anatomy = dissect(denoiser)
        self.dg = self._given.bound(None, anatomy)
        self._engine = Engine(anatomy, self.sharing)
        self._engine.cost = self.cost
        self._degraded, self._delivered = None, False

    def _followed(self, label: str, degrade: bool) -> Callable[..., Any]:
        """The denoiser's call for c or u, of which the cost is counted, and with `degrade` the branch for c_m."""
        engine, dg = self._engine, self.dg
        assert engine is not None and dg is not None, "the call for c comes first"

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = Call.of(engine.anatomy, args, kwargs)
            call.labels, call.made = (label,) * call.batch, self._step or 0
            if any(call.arguments.get(name) is not None for name in ("kv_cache", "kv_caches")):
                raise ModelError(
                    "the pipeline keeps keys and values of its blocks from step to step, which the pass for c_m would "
                    "overwrite: call it with use_kv_cache=False"
                )
            generated = generated_tokens(call.latents)
            if generated is not None:
                engine.anatomy.layout.generated = generated
            engine.begin([dg.perturbation(call)] if degrade else [], call)

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            reused = len(self._left_out) if label == COND else 0
            for branch in engine.finish(args, kwargs, reused=reused):
                self._degraded = branch

        def call(*args: Any, **kwargs: Any) -> Any:
            model = engine.anatomy.model
            with engine.attached(), ExitStack() as hooks:
                hooks.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
                hooks.callback(model.register_forward_hook(after, with_kwargs=True).remove)
                return model(*args, **kwargs)

        return call

    def _deliver(self, *args: Any, **kwargs: Any) -> Any:
        """In place of the call for c_m, whose arguments are those for c: what that call's branch gave."""
        output, self._degraded, self._delivered = self._degraded, None, True
        return output

    # ---- the guided prediction

    def __call__(self, data: list[Any]) -> Any:
        """The guided prediction from the batches with their predictions."""
        if _DEGRADED in self.active_predictions() and not self._delivered:
            raise ModelError(
                "the pipeline's loop did not call the denoiser between prepare_models and cleanup_models, so that c_m "
                f"is not degraded: {_MOVED}"
            )
        self._engine = None
        output = super().__call__(data)
        self._in_step = False
        return output

    def forward(
        self, pred_cond: Tensor, pred_uncond: Tensor | None = None, pred_cond_degraded: Tensor | None = None
    ) -> Any:
        """Eq. 5, or without CFG Eq. 4; in float32, in the predictions' dtype again."""
        c, wanted = upcast(pred_cond), self._wanted()
        pred = c
        if _UNCOND in wanted:
            towards = self._direction(_UNCOND, c, pred_uncond)
            if towards is not None:
                u = c - towards if pred_uncond is None else upcast(pred_uncond)  # the latter to the bit
                pred = u + self.guidance_scale * towards
        if _DEGRADED in wanted:
            assert self.dg is not None, "the call for c comes first"
            w = self.dg.scale_with_cfg if _UNCOND in wanted else self.dg.scale
            assert isinstance(w, int | float)
            away = self._direction(_DEGRADED, c, pred_cond_degraded)
            pred = pred if away is None else pred + w * away
        return GuiderOutput(pred=pred.to(pred_cond.dtype), pred_cond=pred_cond, pred_uncond=pred_uncond)

    def _direction(self, name: str, c: Tensor, other: Tensor | None) -> Tensor | None:
        """c less another prediction, or what stands for it where that was not computed."""
        kept, every = self._kept.setdefault(name, Kept()), self._every[name]
        if other is None:
            return kept.direction(every)
        kept.take(every, c - upcast(other))
        return c - upcast(other)

    def get_state(self) -> dict[str, Any]:
        """For `repr`: diffusers' state, what is in use, and the cost so far."""
        return super().get_state() | {"dg": self.dg, "cost": self.cost}


def _replace_next_call(denoiser: nn.Module, function: Callable[..., Any]) -> None:
    """Let `function` be the denoiser's next call, and nothing remain of that once it has begun.

    The whole call, not `forward`: hooks inside `function` then end with it, whatever interrupts it, and `forward` is
    left to offloading.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        _restore_call(denoiser)
        return function(*args, **kwargs)

    denoiser._call_impl = call  # type: ignore[method-assign]  # torch's `__call__` looks it up on the instance


def _restore_call(denoiser: nn.Module) -> None:
    vars(denoiser).pop("_call_impl", None)


def _require_known_guiders(guider: Any = None) -> None:
    """Raise a ModelError if diffusers' guiders are not what they were."""
    for name, needed in _METHODS.items():
        method = getattr(BaseGuidance, name, None)
        if method is None or not needed <= set(inspect.signature(method).parameters):
            raise ModelError(f"{_MOVED} (BaseGuidance.{name} is gone or takes other arguments)")
    for name in _STATE if guider is not None else ():
        if not hasattr(guider, name):
            raise ModelError(f"{_MOVED} (BaseGuidance has no {name})")
