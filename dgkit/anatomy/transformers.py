"""The blocks, streams and residual gates of each transformer class: to add one, add a row to `TRANSFORMERS`."""

import ast
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from math import prod
from textwrap import dedent
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from dgkit.errors import DgkitError, ModelError
from dgkit.taps import compiled

# --------------------------------------------------------------------------------------------------------------- gates


@dataclass(frozen=True)
class Gate:
    """Where one residual gate alpha of Eq. 2 comes from.

    The paper's single alpha_k is in fact one gate per branch: attention ("msa"), second attention of dual-attention
    blocks ("msa2"), feed-forward ("mlp"), or both at once where they run in parallel ("msa+mlp"). A branch without a
    gate (cross-attention, for one) is added as it is.

    Attributes:
        branch: "msa", "msa2", "mlp" or "msa+mlp".
        module: path of a submodule of the block, "" for the block itself.
        read: alpha (B, C) from one call of that submodule: (module, args, kwargs, output). Where a class modulates each
            token by its own timestep (image-to-video of Wan 2.2 and LTX), alpha is the mean over tokens.
    """

    branch: str
    module: str
    read: Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Tensor]


def _per_image(gate: Tensor) -> Tensor:
    """(B, C) from (B, C), (B, 1, C) or (B, T, C)."""
    return gate if gate.ndim == 2 else gate.mean(1)


def at(branch: str, module: str, index: int, *, tanh: bool = False) -> Gate:
    """The gate is `output[index]` of an adaLN module."""
    return Gate(branch, module, lambda m, args, kwargs, output: _squash(_per_image(output[index]), tanh))


def chunk(branch: str, module: str, index: int, of: int, *, tanh: bool = False) -> Gate:
    """The gate is the `index`-th of `of` equal parts of the output of a modulation layer."""
    return Gate(branch, module, lambda m, args, kwargs, output: _squash(_per_image(output.chunk(of, -1)[index]), tanh))


def table(branch: str, index: int, argument: str) -> Gate:
    """The gate is row `index` of the block's `scale_shift_table` plus the embedded timestep, an argument of the block.

    The embedding is (B, 6 C), (B, 6, C) or, with a timestep per token, (B, T, 6 C) or (B, T, 6, C).
    """

    def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
        rows = module.scale_shift_table.reshape(6, -1)  # type: ignore[operator, union-attr]
        embedding = named(module, args, kwargs)[argument]
        return rows[index] + embedding.reshape(len(embedding), -1, *rows.shape)[:, :, index].mean(1)

    return Gate(branch, "", read)


def argument(branch: str, name: str, index: int, of: int) -> Gate:
    """The gate is the `index`-th of `of` equal parts of the block's argument `name`: the same for all blocks."""
    return Gate(
        branch, "", lambda m, args, kwargs, output: _per_image(named(m, args, kwargs)[name].chunk(of, -1)[index])
    )


def _squash(gate: Tensor, tanh: bool) -> Tensor:
    return gate.tanh() if tanh else gate


# -------------------------------------------------------------------------------------------------------------- classes


@dataclass(frozen=True)
class Stack:
    """A `ModuleList` of blocks with the same output.

    Attributes:
        path: the attribute of the transformer.
        image: index of the tensor with the image tokens in the output tuple; None when the output is that tensor.
        gates: the residual gates of the image tokens.
        text: None when that tensor (B, T, C) holds the image tokens alone; "before" or "after" when other tokens (text,
            padding) stand before or after them.
        text_first: whether those other tokens, or the text of a tensor of its own, precede the image in the sequence
            that the blocks hand to `scaled_dot_product_attention`; None where the image is alone there.
        fork: whether the batch may grow at these blocks (see `Anatomy.grow`); False where the transformer, after them,
            mixes their outputs with tensors of the batch that it was called with.
        derived: found by `derive`, not written by hand: the token count is checked in every pass.
        norms: the LayerNorms of each block that read the image tokens, which stand last where they read text as well;
            for `disrupt(..., keep_norm=True)`, unknown where it is empty.
    """

    path: str
    image: int | None
    gates: tuple[Gate, ...]
    text: str | None = None
    text_first: bool | None = None
    fork: bool = True
    derived: bool = False
    norms: tuple[str, ...] = ()


UNBATCHED = ("img_ids", "txt_ids", "image_rotary_emb", "rotary_emb")


@dataclass(frozen=True)
class Transformer:
    """The row of one transformer class.

    Attributes:
        stacks: its stacks of blocks, in the order in which they run.
        tokens: number of image tokens, from the model and the arguments of a call; for stacks with `text`.
        text_lengths: number of text tokens of each batch row, where the joint sequence is as long as the longest needs.
        channels: width C of the image stream.
        predicted_channels: see `Anatomy`.
        latents, timestep: what the class calls these arguments.
        ascending: whether that timestep grows from noise to image.
        unbatched: arguments of the transformer and of its blocks whose first axis is not the batch.
        listed: arguments that are lists with one entry per batch row.
        second_axis: arguments whose second axis is the batch.
        last_norm: the LayerNorm after the last block.
    """

    stacks: tuple[Stack, ...]
    tokens: Callable[[Any, dict[str, Any]], int] | None = None
    text_lengths: Callable[[dict[str, Any]], list[int]] | None = None
    channels: Callable[[Any], int] = lambda model: model.config.num_attention_heads * model.config.attention_head_dim
    predicted_channels: Callable[[Any], int | None] = lambda model: None
    latents: str = "hidden_states"
    timestep: str = "timestep"
    ascending: bool = False
    unbatched: tuple[str, ...] = UNBATCHED
    listed: tuple[str, ...] = ()
    second_axis: tuple[str, ...] = ()
    last_norm: str = ""


def _noise_channels(model: Any) -> int | None:
    """DiT and PixArt (Sana, if asked to) predict noise in the first `in_channels` channels and sigma in the rest."""
    return model.config.in_channels if model.config.out_channels == 2 * model.config.in_channels else None


def _sequence(model: Any, arguments: dict[str, Any]) -> int:
    """Image tokens of latents (B, T, C)."""
    return arguments["hidden_states"].shape[1]


def _patches(model: Any, arguments: dict[str, Any]) -> int:
    """Image tokens of latents (B, C, H, W) that are cut into square patches."""
    return prod(side // model.config.patch_size for side in arguments["hidden_states"].shape[-2:])


def _hidream_tokens(model: Any, arguments: dict[str, Any]) -> int:
    """Latents (B, C, H, W), or tokens (B, T, C) padded to the longest, then with each row's grid in `img_sizes`."""
    if arguments.get("hidden_states_masks") is None:
        return _patches(model, arguments)
    return _equal([int(height) * int(width) for height, width in arguments["img_sizes"]])


def _z_image_tokens(model: Any, arguments: dict[str, Any]) -> int:
    """A list of latents (C, F, H, W)."""
    if isinstance(arguments["x"][0], list):
        raise ModelError("the omni mode of ZImageTransformer2DModel (a list of images per row) is not supported")
    spatial, temporal = arguments.get("patch_size", 2), arguments.get("f_patch_size", 1)
    return _equal([f // temporal * (h // spatial) * (w // spatial) for _, f, h, w in (x.shape for x in arguments["x"])])


def _equal(counts: list[int]) -> int:
    if len(set(counts)) > 1:
        raise ModelError(f"the images of one batch have {counts} tokens: use images of equal size")
    return counts[0]


def _lumina2_text_lengths(arguments: dict[str, Any]) -> list[int]:
    return arguments["encoder_attention_mask"].sum(1).tolist()


def _z_image_text_lengths(arguments: dict[str, Any]) -> list[int]:
    return [-(-len(text) // 32) * 32 for text in arguments["cap_feats"]]  # padded to a multiple of SEQ_MULTI_OF


NORM1 = (at("msa", "norm1", 1), at("mlp", "norm1", 4))
MSA2 = at("msa2", "norm1", 6)
NORM = (at("msa+mlp", "norm", 1),)
LAYER_NORMS = ("norm1.norm", "norm2")
TANH_NORM1 = (at("msa", "norm1", 1, tanh=True), at("mlp", "norm1", 3, tanh=True))

FLUX = Transformer(
    (
        Stack("transformer_blocks", 1, NORM1, text_first=True, norms=LAYER_NORMS),
        Stack("single_transformer_blocks", 1, NORM, text_first=True, norms=("norm.norm",)),
    ),
    last_norm="norm_out.norm",
)

# Blocks of text alone (the context refiners of Lumina 2, Z-Image and HunyuanImage) are no part of the image stream.
TRANSFORMERS: dict[str, Transformer] = {
    "SD3Transformer2DModel": Transformer(
        (Stack("transformer_blocks", 1, (NORM1[0], MSA2, NORM1[1]), text_first=False, norms=LAYER_NORMS),),
        last_norm="norm_out.norm",
    ),
    "FluxTransformer2DModel": FLUX,
    "BriaTransformer2DModel": FLUX,
    "LongCatImageTransformer2DModel": FLUX,
    "OvisImageTransformer2DModel": FLUX,
    "DiTTransformer2DModel": Transformer(
        (Stack("transformer_blocks", None, NORM1, norms=("norm1.norm", "norm3")),),
        predicted_channels=_noise_channels,
        last_norm="norm_out",
    ),
    "PixArtTransformer2DModel": Transformer(
        (Stack("transformer_blocks", None, (table("msa", 2, "timestep"), table("mlp", 5, "timestep"))),),
        predicted_channels=_noise_channels,
    ),
    "SanaTransformer2DModel": Transformer(
        (Stack("transformer_blocks", None, (table("msa", 2, "timestep"), table("mlp", 5, "timestep"))),),
        predicted_channels=_noise_channels,
    ),
    # z + gate_mlp ff(norm2(z + gate_msa attention)): what gate_msa scales is the input of ff only, so that it is no
    # residual gate
    "AuraFlowTransformer2DModel": Transformer(
        (
            Stack("joint_transformer_blocks", 1, NORM1[1:], text_first=True),
            Stack("single_transformer_blocks", None, NORM1[1:], text="before", text_first=True),
        ),
        tokens=_patches,
    ),
    "Lumina2Transformer2DModel": Transformer(
        (
            Stack("noise_refiner", None, TANH_NORM1, fork=False),
            Stack("layers", None, TANH_NORM1, text="before", text_first=True),
        ),
        tokens=_patches,
        text_lengths=_lumina2_text_lengths,
        channels=lambda model: model.config.hidden_size,
        ascending=True,
        unbatched=(),
    ),
    "ZImageTransformer2DModel": Transformer(
        tuple(
            Stack(
                path,
                None,
                tuple(
                    chunk(branch, "adaLN_modulation", index, 4, tanh=True) for branch, index in (("msa", 1), ("mlp", 3))
                ),
                text="after",  # padding in the refiner, padding and text in the layers
                text_first=False,
                fork=path == "layers",
            )
            for path in ("noise_refiner", "layers")
        ),
        tokens=_z_image_tokens,
        text_lengths=_z_image_text_lengths,
        channels=lambda model: model.config.dim,
        latents="x",
        timestep="t",
        ascending=True,
        unbatched=(),
        listed=("x", "cap_feats", "siglip_feats", "image_noise_mask"),
    ),
    # with `zero_cond_t` (editing) `img_mod` gives 2B rows, the first B of them for the tokens that are generated
    "QwenImageTransformer2DModel": Transformer(
        (
            Stack(
                "transformer_blocks", 1, (chunk("msa", "img_mod", 2, 6), chunk("mlp", "img_mod", 5, 6)), text_first=True
            ),
        ),
        listed=("img_shapes",),
    ),
    "HunyuanImageTransformer2DModel": Transformer(
        (
            Stack("transformer_blocks", 0, NORM1, text_first=False),
            Stack("single_transformer_blocks", 0, NORM, text_first=False),
        )
    ),
    "HiDreamImageTransformer2DModel": Transformer(
        tuple(
            Stack(
                path,
                image,
                (
                    chunk("msa", "block.adaLN_modulation", 2, parts),
                    chunk("mlp", "block.adaLN_modulation", 5, parts),
                ),
                text="after",  # padding where the image is not square, and in single blocks text
                text_first=False,
                fork=False,  # each block is handed its own text
            )
            for path, image, parts in (("double_stream_blocks", 0, 12), ("single_stream_blocks", None, 6))
        ),
        tokens=_hidream_tokens,
        timestep="timesteps",
        unbatched=(),
        listed=("img_sizes",),
        second_axis=("encoder_hidden_states_llama3",),
    ),
    "ChromaTransformer2DModel": Transformer(
        (
            Stack("transformer_blocks", 1, NORM1, text_first=True),
            Stack("single_transformer_blocks", None, NORM, text="before", text_first=True),
        ),
        tokens=_sequence,
    ),
    "CogView3PlusTransformer2DModel": Transformer((Stack("transformer_blocks", 0, NORM1, text_first=True),)),
    "CogView4Transformer2DModel": Transformer((Stack("transformer_blocks", 0, NORM1, text_first=True),)),
    "CogVideoXTransformer3DModel": Transformer(
        (Stack("transformer_blocks", 0, (at("msa", "norm1", 2), at("mlp", "norm2", 2)), text_first=True),)
    ),
    "WanTransformer3DModel": Transformer((Stack("blocks", None, (table("msa", 2, "temb"), table("mlp", 5, "temb"))),)),
    "LTXVideoTransformer3DModel": Transformer(
        (Stack("transformer_blocks", None, (table("msa", 2, "temb"), table("mlp", 5, "temb"))),),
        unbatched=("rope_interpolation_scale",),
    ),
    # one modulation for all blocks of a stack, so that alpha cannot vary with depth: a natural control
    "Flux2Transformer2DModel": Transformer(
        (
            Stack(
                "transformer_blocks",
                1,
                (argument("msa", "temb_mod_img", 2, 6), argument("mlp", "temb_mod_img", 5, 6)),
                text_first=True,
            ),
            Stack(
                "single_transformer_blocks",
                None,
                (argument("msa+mlp", "temb_mod", 2, 3),),
                text="before",
                text_first=True,
            ),
        ),
        tokens=_sequence,
    ),
    "MochiTransformer3DModel": Transformer(
        (Stack("transformer_blocks", 0, TANH_NORM1, text_first=False),), ascending=True
    ),
}

# ------------------------------------------------------------------------------------------- classes that have no row


def derive(model: Any) -> Transformer:
    """The row of a class that is not in `TRANSFORMERS`, where one can be told safely; it has no gates.

    Required of the transformer: one `ModuleList`, of blocks of one class; a width and a patch size in its config; and a
    `forward` in which the blocks run in one plain loop that hands `hidden_states` from each to the next, so that
    nothing else (a long skip connection) uses their outputs. Of the block: `hidden_states` first, and one tensor
    returned. That this tensor holds the image tokens alone shows in each pass, where there must be exactly as many as
    the latents, (B, C, H, W) or (B, C, F, H, W), have patches.

    Raises:
        ModelError: something of this is missing.
    """
    name, config = type(model).__name__, getattr(model, "config", None)
    lists = {path: child for path, child in model.named_children() if isinstance(child, nn.ModuleList)}
    kinds = {type(_original(block)) for blocks in lists.values() for block in blocks}
    if len(lists) != 1 or len(kinds) != 1:
        raise _underivable(name, "it has not exactly one ModuleList of blocks of one class")
    path = next(iter(lists))
    forward = inspect.signature(kinds.pop().forward)
    if list(forward.parameters)[1:2] != ["hidden_states"] or any("skip" in name for name in forward.parameters):
        raise _underivable(name, "its blocks do not take `hidden_states` first, or they take a skip connection")
    if forward.return_annotation not in (Tensor, "torch.Tensor", "Tensor"):
        raise _underivable(name, "its blocks are not annotated to return one tensor")
    try:
        source = inspect.getsource(type(model).forward)
    except OSError as error:
        raise _underivable(name, "the source of its forward is not at hand") from error
    if not _runs_in_plain_loop(source, path):
        raise _underivable(name, f"its forward does more in the loop over `{path}` than to run the blocks in turn")
    if not all(hasattr(config, key) for key in ("num_attention_heads", "attention_head_dim", "patch_size")):
        raise _underivable(name, "its config does not say its width and patch size")
    return Transformer((Stack(path, None, (), derived=True),), tokens=_derived_tokens)


def _underivable(name: str, reason: str) -> ModelError:
    return ModelError(
        f"expected a diffusers pipeline with a transformer, or a transformer of class {', '.join(TRANSFORMERS)}, got "
        f"{name}, whose anatomy cannot be derived: {reason} (to add a class: one row in dgkit.anatomy.TRANSFORMERS)"
    )


def _derived_tokens(model: Any, arguments: dict[str, Any]) -> int:
    """The number of patches of the latents; a wrong one is seen at the first block."""
    sizes, patch = arguments["hidden_states"].shape[2:], model.config.patch_size
    if len(sizes) < 2:
        raise _underivable(type(model).__name__, "its latents are a sequence, of which some tokens could be text")
    if isinstance(patch, int):
        patch = (getattr(model.config, "patch_size_t", None) or 1, patch, patch)
    return prod(size // side for size, side in zip(sizes, patch[-len(sizes) :], strict=True))


def _runs_in_plain_loop(source: str, path: str) -> bool:
    """Whether a forward uses `self.<path>` in one loop only (or the two halves of an `if`), and that loop is plain."""
    nodes = list(ast.walk(ast.parse(dedent(source))))
    blocks = f"self.{path}"
    iterables = (blocks, f"enumerate({blocks})")
    loops = [node for node in nodes if isinstance(node, ast.For) and ast.unparse(node.iter) in iterables]
    uses = sum(isinstance(node, ast.Attribute) and ast.unparse(node) == blocks for node in nodes)
    halves = any(isinstance(node, ast.If) and [node.body, node.orelse] == [[loop] for loop in loops] for node in nodes)
    return uses == len(loops) and (uses == 1 or halves) and all(_is_plain(loop.body, loop.target) for loop in loops)


def _is_plain(body: list[ast.stmt], target: ast.expr) -> bool:
    """Whether the statements do nothing but `hidden_states = block(hidden_states, ...)`, checkpointed or not."""
    block = ast.unparse(target.elts[-1] if isinstance(target, ast.Tuple) else target)
    for statement in body:
        if isinstance(statement, ast.If):
            if not (_is_plain(statement.body, target) and _is_plain(statement.orelse, target)):
                return False
        elif not (
            isinstance(statement, ast.Assign)
            and isinstance(statement.value, ast.Call)
            and [ast.unparse(t) for t in statement.targets] == ["hidden_states"]
            and _first_arguments(statement.value)
            in ([block, "hidden_states"], ["self._gradient_checkpointing_func", block, "hidden_states"])
        ):
            return False
    return True


def _first_arguments(call: ast.Call) -> list[str]:
    """The function called and its arguments up to `hidden_states`."""
    given = [ast.unparse(argument) for argument in call.args]
    given += [ast.unparse(k.value) for k in call.keywords if k.arg == "hidden_states"]
    return [ast.unparse(call.func), *given[: given.index("hidden_states") + 1]] if "hidden_states" in given else []


# ------------------------------------------------------------------------------------------------------------- anatomy


@dataclass
class Layout:
    """How many image tokens the last call of the transformer had; None before the first."""

    tokens: int | None = None


@dataclass(frozen=True)
class Block:
    """One block: its zero-based index over all stacks, its stack, the module, and the layout of the last call."""

    index: int
    stack: Stack
    module: nn.Module
    layout: Layout

    def image(self, output: Any) -> Tensor:
        """The image tokens (B, T, C) in this block's `output`.

        Raises:
            ModelError: `output` does not hold as many tokens as the transformer's call has image tokens.
        """
        tokens = output if self.stack.image is None else output[self.stack.image]
        if self.stack.text is None and not self.stack.derived:
            return tokens
        count = self._count(tokens)
        return tokens[:, -count:] if self.stack.text == "before" else tokens[:, :count]

    def with_image(self, output: Any, image: Tensor) -> Any:
        """A copy of `output` with `image` as its image tokens."""
        if self.stack.text is not None:
            tokens = output if self.stack.image is None else output[self.stack.image]
            count = self._count(tokens)
            before = self.stack.text == "before"
            image = torch.cat([tokens[:, :-count], image] if before else [image, tokens[:, count:]], 1)
        if self.stack.image is None:
            return image
        return (*output[: self.stack.image], image, *output[self.stack.image + 1 :])

    def _count(self, tokens: Any) -> int:
        """The number of image tokens among `tokens`, which must have room for them."""
        count = self.layout.tokens
        if count is None:
            raise ModelError("the number of image tokens is not known: enter `anatomy.follow()` before the model runs")
        length = tokens.shape[1] if isinstance(tokens, Tensor) and tokens.ndim == 3 else None
        if length is None or length < count or (self.stack.derived and length != count):
            found = f"{length} tokens" if length else f"a {type(tokens).__name__} that is not (batch, tokens, channels)"
            raise ModelError(
                f"block {self.index} ({type(self.module).__name__}) returned {found} for {count} image tokens: its "
                f"class needs a row of its own in dgkit.anatomy.TRANSFORMERS"
            )
        return count

    @property
    def gates(self) -> list[tuple[Gate, nn.Module]]:
        """The residual gates that this very block has, each with the submodule that computes it."""
        dual = getattr(self.module, "use_dual_attention", False)
        return [(g, self.module.get_submodule(g.module)) for g in self.stack.gates if g is not MSA2 or dual]


@dataclass(frozen=True)
class Anatomy:
    """A transformer taken apart.

    Attributes:
        model: the transformer.
        row: the row of its class.
        blocks: all blocks in the order in which they run.
        channels: width C of the image stream.
        predicted_channels: how many of the output's channels are the prediction that guidance acts on; None for all.
        layout: of the last call, as long as it is followed.
    """

    model: nn.Module
    row: Transformer = field(repr=False)
    blocks: tuple[Block, ...]
    channels: int
    predicted_channels: int | None
    layout: Layout

    def block(self, index: int) -> Block:
        """The block at zero-based `index`.

        Raises:
            DgkitError: `index` is not an integer from 0 to the number of blocks - 1.
        """
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(self.blocks):
            raise DgkitError(
                f"block={index!r} is not allowed: {type(self.model).__name__} has blocks 0 to {len(self.blocks) - 1}"
            )
        return self.blocks[index]

    def dims(self, dims: Sequence[int]) -> list[int]:
        """`dims` as a checked list of channels.

        Raises:
            DgkitError: `dims` is empty, repeats a channel or holds anything but integers from 0 to C - 1.
        """
        allowed = f"a non-empty list of distinct channels from 0 to {self.channels - 1}"
        if isinstance(dims, str | bytes) or not isinstance(dims, Sequence) or not dims:
            raise DgkitError(f"dims={dims!r} is not allowed: give {allowed}")
        for dim in dims:
            if isinstance(dim, bool) or not isinstance(dim, int) or not 0 <= dim < self.channels:
                raise DgkitError(f"dims={list(dims)!r} is not allowed because of {dim!r}: give {allowed}")
        if len(set(dims)) != len(dims):
            raise DgkitError(f"dims={list(dims)!r} is not allowed because a channel is repeated: give {allowed}")
        return list(dims)

    def norms_after(self, block: int) -> list[nn.LayerNorm]:
        """The LayerNorms that read the image tokens after block `block`.

        Raises:
            ModelError: they are not known for this class.
        """
        if not self.row.last_norm:
            known = ", ".join(name for name, row in TRANSFORMERS.items() if row.last_norm)
            raise ModelError(f"the LayerNorms of {type(self.model).__name__} are not known to dgkit, only of {known}")
        paths = [(later.module, norm) for later in self.blocks[block + 1 :] for norm in later.stack.norms]
        return [module.get_submodule(path) for module, path in (*paths, (self.model, self.row.last_norm))]  # type: ignore[misc]

    @contextmanager
    def follow(self) -> Iterator[None]:
        """Inside, `Block.image` knows where the image tokens of the last call stand, in classes where calls differ.

        Raises (in the call):
            ModelError: image tokens that start at different places in the rows of one batch.
        """
        if self.row.tokens is None:
            yield
            return
        count, before = self.row.tokens, any(stack.text == "before" for stack in self.row.stacks)

        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arguments = named(module, args, kwargs)
            lengths = self.row.text_lengths(arguments) if self.row.text_lengths else [0]
            if before and len(set(lengths)) > 1:
                raise ModelError(
                    f"the prompts of one batch have {lengths} tokens, so {type(module).__name__} puts their images at "
                    f"different places: use one prompt per call"
                )
            self.layout.tokens = count(module, arguments)

        handle = self.model.register_forward_pre_hook(read, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def select_rows(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Tensor, batch: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a transformer call cut down to the given `rows` of its `batch`.

        Dicts and lists are copied, because some forwards change them; what has no batch axis stays as it is.

        Raises:
            ModelError: without the other rows the joint sequence would be shorter, so that the blocks' outputs for the
                whole batch do not fit the cut one.
        """
        if self.row.text_lengths is not None:
            lengths = self.row.text_lengths(named(self.model, args, kwargs))
            if max(lengths[row] for row in rows.tolist()) < max(lengths):
                raise ModelError(
                    f"the prompts of one batch have {lengths} tokens: rows {rows.tolist()} alone would make a shorter "
                    f"sequence; use prompts (and negative prompts) of equal length"
                )

        picked = consecutive(rows.tolist())

        def cut(value: Tensor) -> Tensor:
            return value[picked] if value.ndim and len(value) == batch else value

        def change(name: str, value: Any) -> Any:
            if name in self.row.second_axis and isinstance(value, Tensor):
                return value[:, picked]
            if name in self.row.listed and isinstance(value, list) and len(value) == batch:
                return [value[row] for row in rows.tolist()]
            return _map_tensors(self.row, name, value, cut)

        return _map_arguments(self.model, args, kwargs, change)

    def grow(
        self, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Tensor, batch: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call of `block` with the given `rows` of its `batch` appended once more.

        Whatever has more than `batch` rows already stays as it is, and so does what has no batch axis.
        """

        joining = consecutive(rows.tolist())

        def grown(value: Tensor) -> Tensor:
            return torch.cat([value, value[joining]]) if value.ndim and len(value) == batch else value

        return _map_arguments(
            block.module, args, kwargs, lambda name, value: _map_tensors(self.row, name, value, grown)
        )


def consecutive(rows: list[int]) -> slice | list[int]:
    """`rows` as an index; where they are consecutive a slice, which neither copies nor waits for a GPU."""
    start, stop = min(rows), max(rows) + 1
    return slice(start, stop) if rows == list(range(start, stop)) else rows


@cache
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]  # without `self`


def _positional(module: nn.Module) -> tuple[str, ...]:
    """The names of `forward`'s parameters: of the class, because an instance's own `forward` may be a stand-in."""
    return _parameters(type(_original(module)).forward)


def _original(module: nn.Module) -> nn.Module:
    """The module inside `torch.compile(module)`, or `module`."""
    return getattr(module, "_orig_mod", module)


def named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `module` by name."""
    return dict(zip(_positional(module), args, strict=False)) | kwargs


def _map_arguments(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[str, Any], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call of `module` after `change(name, value)`, positional ones still positional."""
    changed = tuple(change(name, value) for name, value in zip(_positional(module), args, strict=False))
    return changed, {name: change(name, value) for name, value in kwargs.items()}


def _map_tensors(row: Transformer, name: str, value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`change` of every batched tensor in nested tuples, lists and dicts."""
    if name in row.unbatched:
        return value
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_tensors(row, key, item, change) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_map_tensors(row, name, item, change) for item in value)
    return value


def dissect(target: Any) -> Anatomy:
    """The anatomy of a pipeline's transformer or of a bare transformer.

    Raises:
        ModelError: `target` is neither, or its transformer's class has no row in `TRANSFORMERS` and none can be derived
            (see `derive`), or the transformer is compiled as a whole (a compiled module ignores hooks that are added
            later; compile its blocks instead).
    """
    model = getattr(target, "transformer", target)
    # torch.compile(model) wraps the module as `_orig_mod`; model.compile() sets `_compiled_call_impl`
    if isinstance(model, nn.Module) and compiled(model):
        raise ModelError(
            "the transformer is compiled as a whole, which ignores hooks added later: use the uncompiled transformer, "
            "or compile block by block (`for block in transformer.transformer_blocks: block.compile()`)"
        )
    name = type(model).__name__
    if not isinstance(model, ModelMixin):
        raise _underivable(name, "it is no diffusers model")
    row = TRANSFORMERS.get(name) or derive(model)
    layout = Layout()
    blocks = [(stack, module) for stack in row.stacks for module in model.get_submodule(stack.path).children()]
    return Anatomy(
        model=model,
        row=row,
        blocks=tuple(Block(i, stack, module, layout) for i, (stack, module) in enumerate(blocks)),
        channels=row.channels(model),
        predicted_channels=row.predicted_channels(model),
        layout=layout,
    )


@dataclass
class Call:
    """One call of a transformer: its arguments by name, as far as dgkit has to read them.

    Attributes:
        hidden_states: the latents, with the batch first; in Z-Image a list with one tensor per row.
        timestep: of all rows, of each row, or of each row and token.
        class_labels: (B,), where the class has them.
    """

    hidden_states: Any
    timestep: Any
    class_labels: Tensor | None

    @classmethod
    def of(cls, anatomy: Anatomy, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Call":
        """Read the call of `anatomy.model` with (args, kwargs)."""
        arguments = named(anatomy.model, args, kwargs)
        return cls(
            hidden_states=arguments[anatomy.row.latents],
            timestep=arguments[anatomy.row.timestep],
            class_labels=arguments.get("class_labels"),
        )

    @property
    def batch(self) -> int:
        """Number of rows."""
        return len(self.hidden_states)

    @property
    def halves_equal(self) -> bool:
        """Whether the batch is one batch of latents twice, which is how pipelines batch CFG."""
        half = self.batch // 2
        first, second = self.hidden_states[:half], self.hidden_states[half:]
        if isinstance(first, Tensor):
            return torch.equal(first, second)
        return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def timesteps(self) -> list[float]:
        """The timestep of each row, as the transformer receives it (Flux: from 1 to 0).

        With a timestep per token it is the largest: tokens of a given first frame have a smaller one.
        """
        values = torch.as_tensor(self.timestep)
        if values.numel() == 1:
            return [float(values)] * self.batch
        return [float(v) for v in values.reshape(self.batch, -1).amax(1).tolist()]
