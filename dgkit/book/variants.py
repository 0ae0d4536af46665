"""`tiny-sd3`, trained for longer or wider: what its page says of `dgkit.tiny.variants`."""

from collections.abc import Mapping

from dgkit import findings, results
from dgkit.book.runs import commit
from dgkit.book.text import chapter_link, code, plain, table
from dgkit.results import Record
from dgkit.tiny import variants

CHAPTERS = ("01_layer_properties", "03_intervention", "04_detail_guidance")
SHIPPED, LONGER = variants.SHIPPED, variants.VARIANTS[0]


def trainings() -> str:
    """The largest channels along the trainings, in words and step by step."""
    shown = variants.table()
    return f"{variants.sentence()}\n\n{table(shown.columns, shown.to_numpy().tolist())}"


def outcomes() -> str:
    """The claims of the chapters on the shipped model and after a longer training, part by part, and the latter's runs.

    Both edit the same block and channels.
    """
    lines = []
    for chapter in CHAPTERS:
        shown = findings.outcomes(chapter, records(chapter))
        for part, *cells in shown.itertuples():
            lines.append((chapter_link(chapter, ""), plain(part), *map(plain, cells)))
    shown = table(("chapter", "", code(SHIPPED), code(LONGER)), lines)
    longer = [records(chapter)[LONGER].provenance for chapter in CHAPTERS]
    made = "; ".join(f"{code(facts['command'])} at commit {commit(facts)}" for facts in longer)
    return f"{shown}\n\nThe runs on {code(LONGER)}: {made}."


def records(chapter: str) -> Mapping[str, Record]:
    """A chapter's reference run on the shipped model, and the same on the longer trained, from `data/ladder`."""
    shipped = results.references(chapter)[SHIPPED]
    return {SHIPPED: shipped, LONGER: results.read(variants.FOLDER / LONGER / f"{chapter}.json")}
