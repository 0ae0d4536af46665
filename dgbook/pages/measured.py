"""What the directive `{measured} NAME` puts on a page: parts that are made from data at every build."""

import inspect
from collections.abc import Callable

from dgbook.pages import across, at_scale, beside, exhibits, runs, search, trainings, verdicts
from dgkit.errors import DgkitError

PARTS: dict[str, Callable[..., str]] = {
    "chapters": across.chapters,
    "help": across.help_of_guidance,
    "sizes": across.sizes,
    "across-models": across.across_models,
    "readings": across.readings_across_models,
    "verdict-counts": verdicts.counts,
    "test-counts": verdicts.test_counts,
    "verdicts": verdicts.section,
    "earlier-words": verdicts.earlier_words,
    "paper-scale": at_scale.paper_scale,
    "costs": at_scale.costs,
    "beside-paper": beside.beside_paper,
    "exhibits": exhibits.exhibits,
    "search": search.trials,
    "trainings": trainings.trainings,
    "trainings-growth": trainings.growth,
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
