"""The small models: `python -m training train NAME`, `python -m training measure NAME`, `python -m training search`."""

import argparse
import sys

import training
from dgbook.paths import build_dir
from dgkit.errors import DgkitError
from training import quality, search


def main() -> int:
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
    arguments = parser.parse_args()
    runs = build_dir() / "training"
    try:
        if arguments.verb == "train":
            training.train(arguments.name, runs / arguments.name)
        elif arguments.verb == "measure":
            quality.MEASURES[quality.checked_name(arguments.name)](runs / arguments.name)
        else:
            search.write(runs / "search")
    except DgkitError as error:
        print("training:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
