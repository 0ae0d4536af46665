"""Small CLIP and T5 text encoders, and tokenizers made from the captions' own words.

Real pipelines take theirs from models that were trained on the web. These start from nothing and are trained together
with the transformer, by its loss alone. Fixed random encoders would be simpler, but they give 500 words random, hence
overlapping, directions in some 100 dimensions, which the transformer's linear projection of the text cannot take apart.
"""

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

LENGTH = 16
"""Tokens per encoder, start, end and padding included; the longest caption has six words."""

CHARACTERS = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
"""What an unknown word falls apart into. Captions are lower-case: CLIP lowers prompts itself, T5 knows no capitals."""


def clip_tokenizer(captions: Iterable[str]) -> CLIPTokenizer:
    """A byte-pair encoding in which every word of `captions` is one token, for texts of `LENGTH` tokens."""
    suffix, start, end = "</w>", "<|startoftext|>", "<|endoftext|>"
    merges: list[Any] = merges_of(captions, suffix)
    pieces = [*CHARACTERS, *(c + suffix for c in CHARACTERS), *(a + b for a, b in merges), start, end]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


def merges_of(captions: Iterable[str], suffix: str) -> list[tuple[str, str]]:
    """The merges of a byte-pair encoding, the most frequent pair first, until every word of `captions` is whole.

    Of equally frequent pairs the first in the alphabet is merged. The library `tokenizers` breaks ties by chance, so
    that a training that is resumed would take its tokens for others.
    """
    counts = Counter(word for caption in captions for word in caption.split())
    words = {word: (*word[:-1], word[-1] + suffix) for word in counts}
    merges: list[tuple[str, str]] = []
    while words := {word: pieces for word, pieces in words.items() if len(pieces) > 1}:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, pieces in words.items():
            for pair in pairwise(pieces):
                pairs[pair] += counts[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {word: _merged(pieces, best) for word, pieces in words.items()}
    return merges


def _merged(pieces: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """`pieces` with every occurrence of `pair`, from the left, as one."""
    found: list[str] = []
    for piece in pieces:
        if found and (found[-1], piece) == pair:
            found[-1] += piece
        else:
            found.append(piece)
    return tuple(found)


def t5_tokenizer(captions: Iterable[str]) -> T5Tokenizer:
    """A unigram tokenizer in which every word of `captions` is one token."""
    words = sorted({word for caption in captions for word in caption.split()})
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    # a word as a whole is likelier than the letters that it consists of
    pieces = [("\u2581", -2.0), *((c, -10.0) for c in CHARACTERS), *(("\u2581" + w, -5.0) for w in words)]
    return T5Tokenizer(vocab=[*special, *pieces], extra_ids=0, model_max_length=LENGTH)


def clip_encoder(
    tokenizer: CLIPTokenizer, config: dict[str, Any], *, projection: bool
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A CLIP text encoder with random weights: SD3's have a projection of the pooled text, Flux's has none.

    Args:
        tokenizer: what its input comes from.
        config: of `CLIPTextConfig`, less what the tokenizer decides.
        projection: see above; then as wide as the encoder.
    """
    full = CLIPTextConfig(
        **config,
        vocab_size=len(tokenizer),
        max_position_embeddings=LENGTH,
        projection_dim=config["hidden_size"],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(full) if projection else CLIPTextModel(full)


def t5_encoder(tokenizer: T5Tokenizer, config: dict[str, Any]) -> T5EncoderModel:
    """A T5 encoder with random weights.

    Args:
        tokenizer: what its input comes from.
        config: of `T5Config`, less what the tokenizer decides.
    """
    full = T5Config(
        **config,
        vocab_size=len(tokenizer),
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",  # as SD3's and Flux's T5 v1.1
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        use_cache=False,
    )
    return T5EncoderModel(full)
