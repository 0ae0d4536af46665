"""Models made to try the tests on: one channel that carries detail and nothing else, or layout and nothing else.

A shipped model becomes a control by three changes of its forward. A block adds a constant to one channel of all image
tokens, which makes it massive; the next block takes it away again, so that nothing else notices; and where the channel
is missing by then (zeroed, say) what the model predicts of the clean image lacks its detail, or its layout. Where the
channel carries detail the other channels carry nothing: the next block reads what the block put out before any edit.
Everything else, the real classes and pipelines included, is as it was.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Literal

import torch
from diffusers import FluxPipeline
from scipy import fft
from torch import Tensor, nn

from dgkit.anatomy import dissect, predicted
from dgkit.checks import one_of

CARRIES = ("detail", "layout")
SIZE = 6.0
"""The planted channel's magnitude over the block's mean |z|."""

CUTOFF = 0.25
"""Cycles per latent pixel above which is detail; with autoencoders that halve the side, 1/8 per pixel of the image."""

OWN_LOSS, LOSS = 0.3, 0.6
"""The share of its detail that the control lacks by itself, so that there is some to gain, and without the channel."""


@dataclass
class Control:
    """A planted model; see `plant`.

    Attributes:
        pipe: the pipeline, changed in place.
        carries: what the channel carries.
        block, dim: where it is.
        size: of the constant.
        present: per row of the batch under way, whether the channel is there.
        whole: what the block put out in this very call, before any edit.
    """

    pipe: Any
    carries: str
    block: int
    dim: int
    size: float = 0.0
    present: Tensor = field(default_factory=lambda: torch.ones(0, dtype=torch.bool))
    whole: Tensor | None = None

    def degraded(self, clean: Tensor) -> Tensor:
        """What becomes of a prediction (B, C, h, w) of the clean latents."""
        low = _low_pass(clean)
        present = self.present.view(-1, 1, 1, 1)
        if self.carries == "layout":
            return torch.where(present, clean, clean - low + low.mean((2, 3), keepdim=True))
        lost = torch.where(present, OWN_LOSS, LOSS)
        return clean - lost * (clean - low)


def plant(pipe: Any, carries: Literal["detail", "layout"], block: int, dim: int) -> Control:
    """Make a control of a shipped model's pipeline, in place.

    Args:
        pipe: a `DiTPipeline`, `StableDiffusion3Pipeline` or `FluxPipeline`.
        carries: what the channel carries.
        block: the block whose output gets the channel; in Flux a double one that is not the last.
        dim: the channel.

    Raises:
        DgkitError: `carries` is unknown.
    """
    control = Control(pipe, one_of("carries", carries, CARRIES), block, dim)
    before, after = (dissect(pipe).block(index) for index in (block, block + 1))

    def adding(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        image = before.image(output).clone()
        if not control.size:
            control.size = SIZE * float(image.abs().mean())
        control.whole = image.clone()
        image[..., dim] += control.size
        return before.with_image(output, image)

    def taking(forward: Callable[..., Any], hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        control.present = hidden_states[..., dim].mean(1) > control.size / 2
        whole, control.whole = control.whole, None  # a second pass, of DG, begins after the block
        if carries == "layout" or whole is None:
            whole = hidden_states.clone()
            whole[..., dim] -= control.size * control.present[:, None]
        return forward(whole, *args, **kwargs)

    def predicting(forward: Callable[..., Any], hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = forward(hidden_states, *args, **kwargs)
        whole = output[0]
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[0]
        prediction, rest = whole.split([hidden_states.shape[1], whole.shape[1] - hidden_states.shape[1]], 1)
        changed = _through_clean(pipe, control.degraded, hidden_states, prediction, timestep)
        changed = torch.cat([changed.to(whole.dtype), rest], 1)
        return (changed,) if isinstance(output, tuple) else type(output)(changed)

    for module, wrapper in ((before.module, adding), (after.module, taking), (pipe.transformer, predicting)):
        _override(module, wrapper)
    return control


def _through_clean(
    pipe: Any, change: Callable[[Tensor], Tensor], noisy: Tensor, prediction: Tensor, timestep: Tensor
) -> Tensor:
    """The prediction (noise or velocity) after `change` of the clean latents that it stands for."""
    packed = noisy.ndim == 3  # Flux: tokens of 2 x 2 latents
    if packed:
        side = 2 * int(noisy.shape[1] ** 0.5)
        noisy, prediction = (
            FluxPipeline._unpack_latents(x, side, side, vae_scale_factor=1) for x in (noisy, prediction)
        )
    if predicted(pipe) == "velocity":
        scale = 1.0 if packed else 1000.0  # Flux's transformer multiplies by 1000 itself
        signal, noise = 1.0, (timestep / scale).view(-1, 1, 1, 1)
        clean = noisy - noise * prediction
        changed = (noisy - change(clean)) / noise
    else:
        kept = pipe.scheduler.alphas_cumprod[timestep.long()].view(-1, 1, 1, 1)
        signal, noise = kept.sqrt(), (1 - kept).sqrt()
        clean = (noisy - noise * prediction) / signal
        changed = (noisy - signal * change(clean)) / noise
    if packed:
        changed = FluxPipeline._pack_latents(changed, *changed.shape)
    return changed


def _low_pass(latents: Tensor) -> Tensor:
    """The frequencies up to `CUTOFF` of latents (B, C, h, w) mirrored at their edges."""
    height, width = latents.shape[2:]
    rows, columns = torch.arange(height) / (2 * height), torch.arange(width) / (2 * width)
    kept = torch.hypot(rows[:, None], columns[None]) <= CUTOFF
    coefficients = fft.dctn(latents.double().numpy(), axes=(2, 3), norm="ortho")
    return torch.from_numpy(fft.idctn(coefficients * kept.numpy(), axes=(2, 3), norm="ortho")).to(latents.dtype)


def _override(module: nn.Module, wrapper: Callable[..., Any]) -> None:
    """Give one module another forward, by a class of the same name: what looks at either finds what it knows."""
    own = type(module)

    @wraps(own.forward)  # its signature, too
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "hidden_states" in kwargs:
            args = (kwargs.pop("hidden_states"), *args)
        return wrapper(lambda *a, **k: own.forward(self, *a, **k), *args, **kwargs)

    module.__class__ = type(own.__name__, (own,), {"forward": forward, "__module__": own.__module__})
