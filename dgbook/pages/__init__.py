"""The pages of the book that are made from data at every build: what the directive `{measured} NAME` puts there."""

import inspect
from collections.abc import Callable

from dgbook.pages import beside, exhibits, runs, variants, verdicts
from dgbook.pages.text import code, table
from dgbook.paper_scale import protocol
from dgkit.errors import DgkitError
from dgkit.zoo import MODELS


def costs() -> str:
    """What Detail Guidance costs with the presets of the large models: block evaluations over full passes and CFG."""
    lines = []
    for name, model in MODELS.items():
        if model.source is None or model.preset.block is None:
            continue
        n, block = model.blocks, model.preset.block
        alone, beside_cfg = (protocol.evaluations(n, cfg, block) for cfg in (False, True))
        ratios = (alone / (2 * n), beside_cfg / (3 * n), beside_cfg / protocol.evaluations(n, True))
        lines.append((code(name), str(n), str(block + 1), *(f"{ratio:.2f}" for ratio in ratios)))
    header = ("", "N", "m", "DG: (2N - m) / 2N", "CFG + DG: (3N - m) / 3N", "CFG + DG over CFG: (3N - m) / 2N")
    return table(header, lines)


PARTS: dict[str, Callable[..., str]] = {
    "chapters": verdicts.chapters,
    "verdict-counts": verdicts.counts,
    "verdicts": verdicts.section,
    "across-models": verdicts.across_models,
    "readings": verdicts.readings_across_models,
    "paper-scale": verdicts.paper_scale,
    "costs": costs,
    "beside-paper": beside.beside_paper,
    "exhibits": exhibits.exhibits,
    "variants": variants.trainings,
    "variants-outcomes": variants.outcomes,
    "runs": runs.runs,
    "versions": runs.versions,
    "hardware": runs.hardware,
}
"""Name to the function that makes it, as MyST text; some take an argument."""


def measured(name: str, *argument: str) -> str:
    """One part of a page as MyST text.

    Args:
        name: a key of `PARTS`.
        argument: what the part is asked for, such as the section of the paper.

    Raises:
        DgkitError: there is no such part, or it has nothing for `argument`.
    """
    if name not in PARTS:
        raise DgkitError(f"measured={name!r} is not allowed: use one of {', '.join(PARTS)}")
    wanted = len(inspect.signature(PARTS[name]).parameters)
    if len(argument) != wanted:
        raise DgkitError(f"measured={name!r} takes {wanted} argument{'s' * (wanted != 1)}, not {len(argument)}")
    return PARTS[name](*argument)
