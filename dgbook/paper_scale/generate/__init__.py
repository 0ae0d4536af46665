"""Conditions and seeds to images: in memory (`generate`), or to a folder by one process or many.

`job` says what to generate, `run` does it, `store` keeps it and reads it back, `export` writes it for others.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dgkit.sampling import generate, own_conditions

__all__ = ["generate", "own_conditions"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # imported on first use: the other modules do without diffusers, which takes seconds
        from dgkit import sampling

        return getattr(sampling, name)
    raise AttributeError(f"module 'dgkit.sampling.generate' has no attribute {name!r}")
