"""What is done to a transformer from outside by which the rows of a call depend on one another or are elsewhere."""

from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from dgkit.errors import ModelError

_ELSEWHERE = "give each process a pipeline of its own and a part of the prompts, as `dgkit generate` does"


def refuse_parallel(model: nn.Module, *, scan: bool = True) -> None:
    """One transformer on several devices at once: a wrapper hides its class and its rows, ranks hold parts of tokens.

    Without `scan` only the model's own word is taken, which costs nothing in each step.

    Raises:
        ModelError: it is wrapped, sharded (FSDP, tensor parallel), or runs by diffusers' `enable_parallelism`.
    """
    if getattr(model, "_parallel_config", None) is not None:
        raise ModelError(
            f"the transformer runs by `enable_parallelism`, where each process holds a part of the tokens or channels: "
            f"load it without, and {_ELSEWHERE}"
        )
    if isinstance(model, DataParallel | DistributedDataParallel):
        raise ModelError(f"the transformer is wrapped by {type(model).__name__}: use its `.module`, and {_ELSEWHERE}")
    parts = [*model.modules(), *model.parameters()] if scan else []
    if any(type(part).__name__ in ("FullyShardedDataParallel", "DTensor") for part in parts):
        raise ModelError(f"the transformer is sharded by FSDP or tensor parallelism: load it without, and {_ELSEWHERE}")


def scaled_by_batch(model: nn.Module) -> str | None:
    """The name of a layer that quantises its input with one scale for all rows of the batch, found anew in each call.

    Known are torchao's weights with dynamic activations per tensor, of its present (`act_quant_kwargs`) and of its
    former kind (`quant_kwargs`), and its `Float8Linear`. Scales per row or token, fixed scales and weights alone leave
    rows independent.
    """
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if type(module).__name__ == "Float8Linear":
            cast = getattr(module.config, "cast_config_input", None)
            if getattr(getattr(cast, "scaling_granularity", None), "name", "") == "TENSORWISE":
                return name
        if weight is not None and getattr(weight, "act_quant_scale", None) is None and _per_tensor(weight):
            return name
    return None


def _per_tensor(weight: Any) -> bool:
    former = getattr(weight, "quant_kwargs", None)
    granularities = (
        getattr(getattr(weight, "act_quant_kwargs", None), "granularity", None),
        former.get("activation_granularity") if isinstance(former, dict) else None,
    )
    return any(type(granularity).__name__ == "PerTensor" for granularity in granularities)


def refuse_scales_of_batch(model: nn.Module) -> None:
    """A branch repeats some rows of a call: with other rows beside them, each row would be computed differently.

    Raises:
        ModelError: a layer quantises its input with one scale for all rows.
    """
    if (name := scaled_by_batch(model)) is not None:
        raise ModelError(
            f"{name} quantises its input with one scale for all rows of a batch, so that the branch's rows and the "
            f"others change one another: quantise per row (torchao's granularity=PerRow()) or weights alone; without "
            f'CFG in one doubled batch, sharing="replay" works'
        )
