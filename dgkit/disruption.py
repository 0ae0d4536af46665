"""Change what flows between the blocks of a diffusion transformer: `disrupt`."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dgkit.anatomy import NO_CFG, Anatomy, CallReader, Grid, degraded_pass, dissect
from dgkit.checks import distinct, integer, one_of, part_of_steps
from dgkit.errors import DgkitError, ModelError
from dgkit.taps import compiled, tap


@dataclass(frozen=True)
class Frames:
    """All image tokens of some frames of a video, for `disrupt(..., tokens=...)`.

    Attributes:
        frames: zero-based, of the latents: a video of n frames has fewer (for Wan (n - 1) / 4 + 1), and where patches
            have a length of their own (CogVideoX 1.5: 2) a frame here is that many latent frames. An image has one.

    Raises:
        DgkitError: `frames` is not a list of distinct integers from 0.
    """

    frames: Sequence[int]

    def __post_init__(self) -> None:
        allowed = "a non-empty list of distinct integers from 0"
        object.__setattr__(self, "frames", tuple(distinct("frames", self.frames, 0, allowed=allowed)))

    def tokens(self, grid: Grid) -> list[int]:
        """The tokens that they are in a grid.

        Raises:
            DgkitError: it has fewer frames.
        """
        if max(self.frames) >= grid.frames:
            known = f"frames 0 to {grid.frames - 1}" if grid.frames > 1 else "frame 0 alone"
            raise DgkitError(f"frames={list(self.frames)!r} is not allowed: what is generated has {known}")
        area = grid.height * grid.width
        return [token for frame in self.frames for token in range(frame * area, (frame + 1) * area)]


@dataclass(frozen=True)
class Edit:
    """A change of some channels of a block's output; the other channels and tokens pass unchanged.

    Attributes:
        kind: "zero" (the paper's masking, section 4.2), "mean" (each channel becomes its mean over the image's tokens,
            after Sun et al. 2024) or "random" (as many other channels, drawn at random, are zeroed: the paper's
            control, appendix D).
        dims: the channels that are changed.
        tokens: the image tokens that are changed, counted row by row from the upper left; None for all.
    """

    kind: str
    dims: list[int]
    tokens: list[int] | Frames | None = None

    def on(self, grid: Grid) -> "Edit":
        """The same edit with frames written out as tokens.

        Raises:
            DgkitError: there is no such frame.
        """
        return replace(self, tokens=self.tokens.tokens(grid)) if isinstance(self.tokens, Frames) else self

    def __call__(self, image: Tensor) -> Tensor:
        """The edited copy of image tokens (B, T, C).

        Raises:
            DgkitError: there are fewer tokens than `tokens` names.
        """
        edited = image.clone()
        assert not isinstance(self.tokens, Frames), "they are written out before"
        value = image[..., self.dims].mean(1, keepdim=True) if self.kind == "mean" else 0
        if self.tokens is None:
            edited[..., self.dims] = value
        elif max(self.tokens) >= image.shape[1]:
            raise DgkitError(
                f"tokens={max(self.tokens)!r} is not allowed: the image has tokens 0 to {image.shape[1] - 1}"
            )
        else:
            edited[:, torch.tensor(self.tokens)[:, None], self.dims] = value
        return edited


EDIT_KINDS = ("zero", "mean", "random")


def make_edit(
    anatomy: Anatomy,
    dims: Sequence[int],
    kind: str = "zero",
    seed: int = 0,
    tokens: Sequence[int] | Frames | None = None,
) -> Edit:
    """The checked edit of `dims`; for kind "random" the drawn channels exclude `dims`.

    Raises:
        DgkitError: a dim does not exist, `kind` is unknown, `seed` is no integer, too few other channels are left, or
            `tokens` is neither a list of distinct integers from 0 nor `Frames`.
    """
    checked = anatomy.dims(dims)
    one_of("kind", kind, EDIT_KINDS)
    integer("seed", seed)
    allowed = "a non-empty list of distinct integers from 0, Frames, or None"
    known = tokens is None or isinstance(tokens, Frames)
    places: Any = tokens if known else distinct("tokens", tokens, 0, allowed=allowed)
    if kind == "random":
        others = [c for c in range(anatomy.channels) if c not in checked]
        if len(others) < len(checked):
            raise DgkitError(f"dims={checked!r}: only {len(others)} other channels are left to draw from")
        order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
        checked = sorted(others[i] for i in order[: len(checked)].tolist())
    return Edit(kind, checked, places)


@contextmanager
def disrupt(
    target: Any,
    *,
    block: int,
    dims: Sequence[int],
    kind: str = "zero",
    seed: int = 0,
    tokens: Sequence[int] | Frames | None = None,
    start: float = 0.0,
    stop: float = 1.0,
    keep_norm: bool = False,
    transformer: str = "transformer",
) -> Iterator[Edit]:
    """Edit channels of one block's output in every pass inside the `with` (paper section 4.2 and appendix D).

    Args:
        target: a pipeline, whose own runs are edited, not those of others that share the transformer; or a bare
            transformer or its anatomy, all of whose calls are edited.
        block: zero-based block whose output is edited (the paper's depth m is `block + 1`).
        dims: the channels; for kind "random" the ones to leave alone.
        kind: "zero", "mean" or "random", see `Edit`.
        seed: decides the draw of kind "random".
        tokens: the image tokens that are edited, counted row by row (of a video frame by frame), or the `Frames` whose
            tokens are; None for all.
        start, stop: the part of the steps with the edit, from int(start * steps) to before int(stop * steps); anything
            but all steps needs a pipeline.
        keep_norm: let the later LayerNorms of the image tokens normalise with the mean and variance that the tokens
            would have with the removed values still there. Without it, zeroing a massive channel also makes all other
            channels larger in every later block. For the classes of SD3, Flux and DiT.
        transformer: which of the pipeline's transformers, see `dgkit.anatomy.dissect`.

    Yields:
        The edit, whose `dims` are the channels really changed.

    Raises:
        DgkitError: bad `block`, `dims`, `kind`, `seed`, `tokens`, `start` or `stop`.
        ModelError: see `dgkit.anatomy.dissect`; `keep_norm` with another class or with compiled blocks; or `Frames`
            where the grid of the tokens is not known.
    """
    anatomy = dissect(target, transformer=transformer)
    edited = anatomy.block(block)
    edit = make_edit(anatomy, dims, kind, seed, tokens)
    part_of_steps(start, stop)
    if (start, stop) != (0, 1) and isinstance(target, nn.Module | Anatomy):
        raise DgkitError(
            f"start={start!r}, stop={stop!r} is not allowed: a bare transformer has no steps, give a pipeline"
        )
    grid = anatomy.grid() if isinstance(tokens, Frames) else None
    norms = anatomy.norms_after(block) if keep_norm else []
    if keep_norm and any(compiled(later.module) for later in anatomy.blocks[block + 1 :]):
        raise ModelError("keep_norm=True does not work with compiled blocks, whose LayerNorms cannot be reached")
    read, now = CallReader(target, anatomy, NO_CFG), _UnderWay()  # which rows are conditional does not matter

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = read(args, kwargs)
        now.active = (call.ours or call.loop is None) and call.within(start, stop)
        now.grid = grid(call.arguments) if grid is not None and now.active else None
        now.removed = None

    def under_way() -> bool:
        return anatomy.layout.inside or degraded_pass.get() is not None

    def change(module: nn.Module, args: Any, output: Any) -> Any:
        if not now.active or not under_way():
            return None
        image = edited.image(output)
        if now.grid is not None:
            now.grid.fit(image)
        changed = edit(image) if now.grid is None else edit.on(now.grid)(image)
        if keep_norm:
            now.removed = (image - changed)[..., edit.dims]
        return edited.with_image(output, changed)

    def keep(norm: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if now.removed is None or not under_way():
            return None
        if degraded_pass.get() is not None or len(args[0]) != len(now.removed):
            raise ModelError("keep_norm=True does not work inside guidance, which runs blocks on a part of the batch")
        return _normalised_as_before(norm, args[0], now.removed, edit.dims).to(output.dtype)

    # before all other hooks, so that `record` sees what the later blocks see, in whatever order the two were entered
    with anatomy.follow(), ExitStack() as taps:
        taps.enter_context(anatomy.watched(before=begin))
        taps.callback(tap(edited.module, change, first=True))
        for norm in norms:
            taps.callback(tap(norm, keep))
        yield edit


class _UnderWay(threading.local):
    """The call under way in each thread: whether it is edited, and what that removed in the edited channels.

    Attributes:
        grid: of its image tokens, where `Frames` are edited.
        removed: z - edited z, (B, T, D).
    """

    active: bool = True
    grid: Grid | None = None
    removed: Tensor | None = None


def _normalised_as_before(norm: Any, tokens: Tensor, removed: Tensor, dims: list[int]) -> Tensor:
    """LayerNorm of `tokens` (B, T', C) with the statistics of tokens to whose last T `removed` (B, T, D) is added."""
    tokens = tokens.float()
    before = tokens.clone()
    before[:, -removed.shape[1] :, dims] += removed
    variance, mean = torch.var_mean(before, -1, correction=0, keepdim=True)
    normalised = (tokens - mean) * (variance + norm.eps).rsqrt()
    return normalised if norm.weight is None else normalised * norm.weight + (0 if norm.bias is None else norm.bias)
