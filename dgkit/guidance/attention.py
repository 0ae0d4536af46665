"""Replace the self-attention inside a block, whatever its class, for the length of one pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dgkit.anatomy import Block
from dgkit.anatomy.arguments import named
from dgkit.errors import ModelError
from dgkit.taps import compiled, forward_of, replaced

# attention(attend, image, query, key, value, **options): `attend` is scaled_dot_product_attention, `image` the slice of
# the image tokens among the queries and keys
Attention = Callable[..., Tensor]


class _AttentionMode(TorchFunctionMode):
    """Sends each self-attention over all image tokens (text beside them or not) to a replacement."""

    def __init__(self, attention: Attention, image_tokens: int, text_first: bool) -> None:
        super().__init__()
        self.attention = attention
        self.image_tokens = image_tokens
        self.text_first = text_first
        self.seen = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        options = {**dict(zip(names, args, strict=False)), **kwargs}
        query, key = options["query"], options["key"]
        tokens, extra = query.shape[2], query.shape[2] - self.image_tokens
        if key.shape[2] != tokens or extra < 0:  # cross-attention
            return func(**options)
        self.seen += 1
        image = slice(extra, tokens) if self.text_first else slice(0, self.image_tokens)
        return self.attention(func, image, **options)


@contextmanager
def attention_replaced(block: Block, attention: Attention) -> Iterator[None]:
    module = block.module
    if compiled(module):
        raise ModelError(
            "this guidance changes the attention inside blocks, which compiled blocks hide: do not compile"
        )
    original = forward_of(module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        # where the image shares its tensor with text, its size is read from the transformer's call
        in_text = block.layout.tokens if block.stack.text else None
        tokens = in_text or named(module, args, kwargs)["hidden_states"].shape[1]
        mode = _AttentionMode(attention, tokens, bool(block.stack.text_first))
        with mode:
            output = original(*args, **kwargs)
        if not mode.seen:
            raise ModelError("no attention was seen inside the block: use the native attention backend")
        return output

    with replaced(module, forward):
        yield
