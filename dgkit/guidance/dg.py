"""Detail Guidance."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from dgkit.anatomy import Anatomy, Call
from dgkit.disruption import make_edit
from dgkit.errors import DgkitError, ModelError
from dgkit.guidance.calibrate import calibrate
from dgkit.guidance.engine import Perturbation
from dgkit.guidance.methods import Branching, Scale, check_scale, scale_at
from dgkit.zoo import settings_for


@dataclass(frozen=True, kw_only=True)
class DG(Branching):
    """Detail Guidance, Eq. 4 and Eq. 5 (arXiv 2510.11538): the branch zeroes massive channels of one block's output.

    Attributes:
        scale: w; by default that of the model's preset (Table 5).
        scale_with_cfg: w beside CFG; by default `scale`, or that of the preset.
        block: zero-based block, the paper's m - 1; by default the preset's (Table 4). "auto": see `calibrate`.
        dims: the channels; by default the preset's (Table 4). "auto": see `calibrate`.
        kind, seed: how they are edited, see `dgkit.disrupt`.
    """

    name = "dg"
    scale: Scale | None = None  # type: ignore[assignment]
    scale_with_cfg: Scale | None = None
    block: int | str | None = None
    dims: Sequence[int] | str | None = None
    kind: str = "zero"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scale("scale_with_cfg", self.scale_with_cfg)

    def bound(self, pipe: Any, anatomy: Anatomy, cfg: str | None = None) -> Self:
        given = {name: getattr(self, name) for name in ("block", "dims", "scale", "scale_with_cfg")}
        known = settings_for(anatomy, **given)
        lacking = [name for name in ("scale", "block", "dims") if getattr(known, name) is None]
        if lacking:
            raise DgkitError(f"{', '.join(lacking)} left out, but no preset for this model states it: give a value")
        block: Any = known.block
        dims: Any = known.dims
        if "auto" in (block, dims):
            block, dims = _looked_for(pipe, anatomy, block, dims, cfg)
        block, dims = anatomy.block(block).index, anatomy.dims(dims)
        make_edit(anatomy, dims, self.kind, self.seed)
        return replace(self, block=block, dims=dims, scale=known.scale, scale_with_cfg=known.scale_with_cfg)

    def weight(self, call: Call, with_cfg: bool) -> float:
        return scale_at(self.scale_with_cfg if with_cfg else self.scale, call)

    def perturbation(self, call: Call) -> Perturbation:
        assert isinstance(self.block, int) and self.dims is not None and not isinstance(self.dims, str)
        return Perturbation(edits={self.block: make_edit(call.anatomy, self.dims, self.kind, self.seed)})


def _looked_for(pipe: Any, anatomy: Anatomy, block: Any, dims: Any, cfg: str | None) -> tuple[int, list[int]]:
    """The block and the dims, that or those of them looked for that are "auto"."""
    if pipe is None:
        raise ModelError('"auto" needs a pipeline to look for block and dims with: give values')
    part = next(name for name, part in pipe.components.items() if part is anatomy.model)
    known = {name: value for name, value in (("block", block), ("dims", dims)) if value != "auto"}
    found = calibrate(pipe, **known, cfg=cfg, transformer=part)
    return found.block, found.dims
