"""The small models: `python -m training train NAME`, `measure NAME`, `search`, `ingredients`."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import training
from dgbook.chapters.ladder import RUNGS
from dgbook.pages.trainings import SHIPPED, TRAININGS
from dgbook.paths import build_dir
from dgkit.checks import one_of
from dgkit.errors import DgkitError
from training import ingredients, ladder, quality, search, text_quality, trainings


def measure_shipped(run: Path) -> dict[str, Any]:
    """The card of `tiny-sd3`, and its row among its trainings."""
    trainings.measure_training(run)
    return text_quality.measure(run)


MEASURES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "tiny-dit": quality.measure,
    "fashion-classifier": quality.measure_classifier,
    "tiny-flux": text_quality.measure,
    "tile-matcher": text_quality.measure_matcher,
    **dict.fromkeys(TRAININGS, trainings.measure_training),
    SHIPPED: measure_shipped,
    **dict.fromkeys(RUNGS, ladder.measure_rung),
}
"""What measures each model, by name: takes the folder of its training."""


def main(argv: list[str] | None = None) -> int:
    """Run one verb.

    Returns:
        0, or 2 after an error, printed as one line.
    """
    parser = argparse.ArgumentParser(prog="python -m training", description="Train and measure the small models.")
    verbs = parser.add_subparsers(required=True, dest="verb", metavar="VERB")
    train = verbs.add_parser("train", help="train one in _build/training/NAME, going on where a killed run was")
    measure = verbs.add_parser("measure", help="measure a trained one: its card, or its file in data/ladder")
    for verb in (train, measure):
        verb.add_argument("name", metavar="NAME", help="e.g. tiny-dit")
    verbs.add_parser("search", help="short trainings with other recipes, to data/ladder/search.json")
    mixed = verbs.add_parser(
        "ingredients", help="pixels or latents, noise or velocity, to data/ladder/ingredients.json"
    )
    mixed.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of all four")
    arguments = parser.parse_args(argv)
    runs = build_dir() / "training"
    try:
        if arguments.verb == "train":
            training.train(arguments.name, runs / arguments.name)
        elif arguments.verb == "measure":
            MEASURES[one_of("name", arguments.name, MEASURES)](runs / arguments.name)
        elif arguments.verb == "search":
            for model in search.VARIATIONS:
                search.search(model, runs / "search")
        else:
            ingredients.measure(runs / "ingredients", arguments.lr)
    except DgkitError as error:
        print("training:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
