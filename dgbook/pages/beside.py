"""The paper's tables beside ours: what Detail Guidance changes there, and here, with its interval."""

from collections.abc import Iterator

from dgbook.claims import names, paper
from dgbook.claims.paper import SCORES
from dgbook.claims.results import Record, at, references
from dgbook.markdown import code, plain, table
from dgbook.measures.stats import Interval
from dgbook.paper_scale import protocol
from dgkit.errors import DgkitError

GUIDANCE = {"agreement": "agreement", "frechet": "Frechet distance", "high_frequency_change": "high-frequency share"}
"""Measures of chapter 4 that stand in for the scores of Tables 1 and 3."""

_SMALL = {"SD3": "tiny-sd3", "Flux": "tiny-flux"}
"""The small model of the same class."""

_METHODS = {"APG": "apg", "CFG++": "cfg++", "CFG-Zero": "cfg-zero*", "CFG+DG": "cfg+dg"}
"""Table 2's rows, but CFG and DG without CFG, by their keys in chapter 5's results."""


def beside_paper(number: str) -> str:
    """One table of the paper and our reference runs, with the change against its baseline.

    Of Tables 1, 3 and 6 each pair of rows without and with DG; of Table 2 each method against CFG.

    Args:
        number: of the table, "1", "2", "3" or "6".

    Raises:
        DgkitError: another table.
    """
    if number not in ("1", "2", "3", "6"):
        raise DgkitError(f"table={number!r} is not allowed: use 1, 2, 3 or 6, the tables of results")
    if number == "2":
        return _methods()
    header = ("", "row", "score", "without DG", "with DG", "change", "better")
    return table(header, _imagenet() if number == "6" else _guidance(int(number)))


def _paper_rows(number: int, kind: str, model: str = "") -> Iterator[tuple[str, ...]]:
    rows = paper.table(number)
    rows = rows[(rows["type"] == kind) & (rows.get("model", model) == model)]
    rounding = protocol.printed_rounding(number).loc[rows.index].sum()  # of both numbers of a difference
    rows = rows.set_index("dg")
    for score, name in SCORES.items():
        if score in rows:
            before, after = float(rows.loc["no", score]), float(rows.loc["yes", score])
            change, reach = round(after - before, 6), rounding[score]
            better = _beyond(Interval(change, change - reach, change + reach), lower=score == "fid")
            yield model or "DiT-XL/2", kind, name, f"{before:.2f}", f"{after:.2f}", f"{change:+.2f}", better


def _guidance(number: int) -> Iterator[tuple[str, ...]]:
    """Tables 1 and 3, and under each pair the same pair of chapter 4's reference run."""
    runs = references("04_detail_guidance")
    for model in dict.fromkeys(paper.table(number)["model"]):
        for kind in ("Cond", "CFG"):
            yield from _paper_rows(number, kind, model)
            small = _SMALL.get(model)
            if small in runs:
                yield from _our_guidance(runs[small], small, kind)


def _our_guidance(record: Record, model: str, kind: str) -> Iterator[tuple[str, ...]]:
    before, after = ("none", "dg") if kind == "Cond" else ("cfg", "cfg+dg")
    settings = record["settings"]
    contrast = record[f"contrast.{after} - {before}"]
    for measure, name in GUIDANCE.items():
        if measure not in contrast:
            continue
        relative = measure == "high_frequency_change"  # known as a change against no guidance only
        digits = "+.4f" if relative else "+.2f"
        levels = ("", "") if relative else tuple(_level(settings[row][measure]) for row in (before, after))
        better = _beyond(contrast[measure], lower=measure == "frechet")
        yield code(model), kind, name, *levels, plain(format(contrast[measure], digits)), better


def _methods() -> str:
    """Table 2: what each method changes against CFG, in the paper's scores and in chapter 5's Frechet distance."""
    printed, runs = paper.table(2).set_index("method"), references("05_ablations")
    header = ["method", "HPSv2.1 (SD3, paper)", "Aesthetic (SD3, paper)"]
    header += [f"Frechet distance, lower is better ({code(model)})" for model in runs]
    lines = []
    for theirs, ours in _METHODS.items():
        changes = (
            printed.loc[theirs, ["average", "aesthetic"]].astype(float) - printed.loc["CFG", ["average", "aesthetic"]]
        )
        measured = [at(record.decoded(), f"methods.{ours}.frechet_change") for record in runs.values()]
        lines.append(
            (
                names.label(ours),
                *(f"{change:+.2f}" for change in changes),
                *(plain(format(change, "+.2f")) if change else "not measured" for change in measured),
            )
        )
    return table(header, lines)


def _imagenet() -> Iterator[tuple[str, ...]]:
    """Table 6, and under each pair the same pair of chapter 6's reference runs."""
    measures = {"frechet": "Frechet distance", "is": "IS", "precision": "precision", "recall": "recall"}
    for kind in ("Uncond", "Cond"):
        yield from _paper_rows(6, kind)
        plain_row, guided_row = kind.lower(), f"{kind.lower()}+dg"
        for model, record in references("06_imagenet").items():
            values = record.decoded()
            for measure, name in measures.items():
                before, after = (values["settings"][row][measure] for row in (plain_row, guided_row))
                change = at(values, f"contrast.{guided_row} - {plain_row}.{measure}")
                shown = plain(format(change, "+.2f")) if change else f"{after.value - before.value:+.2f}"
                difference = Interval(after.value - before.value, after.low - before.high, after.high - before.low)
                better = _beyond(change or difference, lower=measure == "frechet")
                yield code(model), kind, name, _level(before), _level(after), shown, better


def _level(value: Interval | float) -> str:
    return plain(format(value, ".2f"))


def _beyond(change: Interval, lower: bool) -> str:
    """Whether a change is for the better, if its whole interval is on one side."""
    low, high = (-change.high, -change.low) if lower else (change.low, change.high)
    return "yes" if low > 0 else "no" if high < 0 else "undecided"
