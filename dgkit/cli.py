"""The command line: `dgkit run`, `dgkit book`, `dgkit tiny`, `dgkit results`, `dgkit models`.

What a verb needs is imported inside it, so that `dgkit --help` answers at once.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dgkit.errors import DgkitError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        0, 1 if `results check` found differences, or 2 after an error, which is printed as one line.
    """
    arguments = _parser().parse_args(argv)
    try:
        return arguments.verb(arguments)
    except DgkitError as error:
        print("dgkit:", " ".join(str(error).split()), file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dgkit", description="Massive activations and Detail Guidance: run the book.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    run = verbs.add_parser("run", help="run a notebook with other parameters")
    run.add_argument("name", metavar="NAME", help="short name of the notebook, e.g. intervention")
    run.add_argument("-p", dest="parameters", metavar="KEY=VALUE", action="append", default=[], help="set a parameter")
    run.add_argument("--model", help="the same as -p model=MODEL")
    run.add_argument("--output", type=Path, metavar="DIR", help="folder for the executed notebook and its result file")
    run.add_argument(
        "--reference",
        action="store_true",
        help="start from the parameters in notebooks/reference.toml; output to _build/reference",
    )
    run.set_defaults(verb=_run)

    book = verbs.add_parser("book", help="prepare the book").add_subparsers(required=True, metavar="VERB")
    book.add_parser("execute", help="run all notebooks in place, with their defaults").set_defaults(verb=_book_execute)

    tiny = verbs.add_parser("tiny", help="train the shipped models").add_subparsers(required=True, metavar="VERB")
    train = tiny.add_parser("train", help="train one in _build/tiny/NAME, going on where a killed run was")
    train.add_argument("name", metavar="NAME", help="e.g. tiny-dit")
    train.set_defaults(verb=_tiny_train)
    measure = tiny.add_parser("measure", help="measure a trained one and write its card beside the weights")
    measure.add_argument("name", metavar="NAME", help="e.g. tiny-dit")
    measure.set_defaults(verb=_tiny_measure)

    results = verbs.add_parser("results", help="measured numbers").add_subparsers(required=True, metavar="VERB")
    results.add_parser("check", help="compare the last run with the accepted results").set_defaults(verb=_results_check)
    accept = results.add_parser("accept", help="make the last run's results the accepted ones")
    accept.add_argument("--reference", action="store_true", help="those of the reference runs, in _build/reference")
    accept.set_defaults(verb=_results_accept)

    verbs.add_parser("models", help="list the models known by name").set_defaults(verb=_models)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    from dgkit import notebooks, paths

    parameters = dict(notebooks.parse_parameter(text) for text in arguments.parameters)
    if arguments.model is not None:
        parameters["model"] = arguments.model
    if arguments.reference:
        parameters = notebooks.reference_parameters(arguments.name, parameters.get("model")) | parameters
    output = arguments.output or (paths.build_dir() / "reference" if arguments.reference else None)
    print(notebooks.execute(arguments.name, parameters, output))
    return 0


def _book_execute(arguments: argparse.Namespace) -> int:
    from dgkit import notebooks

    notebooks.execute_all()
    return 0


def _tiny_train(arguments: argparse.Namespace) -> int:
    from dgkit import paths, tiny

    tiny.train(arguments.name, paths.build_dir() / "tiny" / arguments.name)
    return 0


def _tiny_measure(arguments: argparse.Namespace) -> int:
    from dgkit import paths
    from dgkit.tiny import quality

    quality.MEASURES[quality.checked_name(arguments.name)](paths.build_dir() / "tiny" / arguments.name)
    return 0


def _results_check(arguments: argparse.Namespace) -> int:
    from dgkit import paths, results

    differences = results.check(paths.results_dir(), results.ACCEPTED)
    print(results.report(differences))
    return 1 if differences else 0


def _results_accept(arguments: argparse.Namespace) -> int:
    from dgkit import paths, results

    new, accepted = paths.results_dir(), results.ACCEPTED
    if arguments.reference:
        new, accepted = paths.build_dir() / "reference", results.REFERENCE
    for path in results.accept(new, accepted):
        print(path)
    return 0


def _models(arguments: argparse.Namespace) -> int:
    from dgkit import zoo

    width = max(map(len, zoo.MODELS))
    for name, model in zoo.MODELS.items():
        print(f"{name:{width}}  {model.weights_gb:6.2f} GB  {model.licence}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
