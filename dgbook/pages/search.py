"""The short trainings that a recipe is chosen by (`training.search`), as the models page shows them."""

import json

from dgbook.markdown import code, table
from dgkit.paths import DATA
from dgkit.zoo import MODELS

FILE = DATA / "ladder" / "search.json"


def trials() -> str:
    """A row per trial; the lowest loss of each model in bold."""
    rows = sorted(json.loads(FILE.read_text(encoding="utf-8")), key=lambda row: list(MODELS).index(row["model"]))
    lowest = {row["model"]: min(r["loss"] for r in rows if r["model"] == row["model"]) for row in rows}
    lines = [
        (
            code(row["model"]),
            f"{row['lr']:g}" + (f", text encoders {text:g}" if (text := row.get("text_lr")) else ""),
            str(row["width"]),
            str(row["batch"]),
            f"{row['beta2']:g}",
            f"{row['steps']:,}",
            f"**{row['loss']:.4f}**" if row["loss"] == lowest[row["model"]] else f"{row['loss']:.4f}",
            f"{row['ratio']:.1f} (block {row['block']})",
        )
        for row in rows
    ]
    head = ("", "peak rate", "channels", "batch", "beta2", "steps", "loss, held out", "largest channel / median")
    return table(head, lines)
