"""The command line: `dgkit VERB`, with the verbs of `dgkit --help`.

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
        0, 1 if `results check` found differences or `generate` lacks images, or 2 after an error, printed as one line.
    """
    arguments = _parser().parse_args(argv)
    try:
        return arguments.verb(arguments)
    except DgkitError as error:
        print("dgkit:", " ".join(str(error).split()), file=sys.stderr)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("dgkit", "dgbook"):
            raise
        print(f'dgkit: {error.name} is not installed: pip install "dgkit[book]"', file=sys.stderr)
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

    book = verbs.add_parser("book", help="the notebooks as committed").add_subparsers(required=True, metavar="VERB")
    book.add_parser("accept", help="make those that `make book` executed the committed ones").set_defaults(
        verb=_book_accept
    )

    results = verbs.add_parser("results", help="measured numbers").add_subparsers(required=True, metavar="VERB")
    results.add_parser("check", help="compare the last run with the accepted results").set_defaults(verb=_results_check)
    accept = results.add_parser("accept", help="make the last run's results the accepted ones")
    accept.add_argument("--reference", action="store_true", help="those of the reference runs, in _build/reference")
    accept.set_defaults(verb=_results_accept)

    generate = verbs.add_parser("generate", help="generate images into a folder, going on where a killed run was")
    generate.add_argument("model", metavar="MODEL", help="a name (see `dgkit models`), a pipeline folder or a hub id")
    conditions = generate.add_mutually_exclusive_group(required=True)
    conditions.add_argument("--prompts", metavar="SET|FILE", help="a prompt set by name, or a file with one per line")
    conditions.add_argument("--classes", metavar="FIRST-LAST", help="class ids, e.g. 0-999")
    generate.add_argument("--count", type=int, metavar="N", help="number of images; by default one per condition")
    generate.add_argument("--seed", type=int, default=0, help="image i has the generator seed 1,000,000 x SEED + i")
    generate.add_argument("--steps", type=int, help="sampling steps; by default the model's preset")
    generate.add_argument("--guidance-scale", type=float, default=1.0, metavar="S", help="of CFG; 1 (default) for none")
    generate.add_argument(
        "--method", dest="methods", metavar="NAME[=JSON]", action="append", default=[],
        help="""a guidance method, e.g. dg or 'dg={"block": 5, "dims": [810]}'""",
    )  # fmt: skip
    generate.add_argument("--call", metavar="JSON", default="{}", help="""of the pipeline, e.g. '{"height": 512}'""")
    generate.add_argument("--dtype", default="", help="float32, float16 or bfloat16 (default for hub models)")
    generate.add_argument("--block-size", type=int, default=8, metavar="N", help="images per batch (default: 8)")
    generate.add_argument("--output", type=Path, metavar="DIR", help="by default _build/images/<model>-<method>-<hash>")
    generate.add_argument("--engine", default="local", help="local (default; also under torchrun and Slurm) or ray")
    generate.add_argument("--workers", type=int, metavar="N", help="of ray; by default one per GPU")
    generate.set_defaults(verb=_generate)

    export = verbs.add_parser("export-npz", help="write a finished run as guided-diffusion's evaluator reads it")
    export.add_argument("folder", type=Path, metavar="FOLDER")
    export.add_argument("path", type=Path, metavar="FILE.npz")
    export.set_defaults(verb=_export_npz)

    study = verbs.add_parser("study", help="let people compare two sets of images").add_subparsers(
        required=True, metavar="VERB"
    )
    make = study.add_parser("make", help="write one HTML page of blinded pairs, and its key")
    make.add_argument("a", type=Path, metavar="A_DIR", help="a folder of images, or of a run of `dgkit generate`")
    make.add_argument("b", type=Path, metavar="B_DIR", help="the other one; images are paired by name")
    make.add_argument("--output", type=Path, metavar="FILE.html", required=True, help="the key goes to FILE.key.json")
    make.add_argument("--seed", type=int, default=0, help="of the blinding (default: 0)")
    make.set_defaults(verb=_study_make)
    analyse = study.add_parser("analyse", help="win rates with intervals, as a table and JSON")
    analyse.add_argument("answers", type=Path, nargs="+", metavar="ANSWERS.csv", help="what the page saved")
    analyse.add_argument("--key", type=Path, metavar="KEY.json", help="by default the one beside the answers")
    analyse.set_defaults(verb=_study_analyse)

    reproduce = verbs.add_parser(
        "reproduce", help="a table of the paper: generate, score, compare; goes on where it was"
    )
    what = reproduce.add_mutually_exclusive_group(required=True)
    what.add_argument("table", metavar="TABLE", nargs="?", help="table1, table2, table3, table6, fig5b or fig8")
    what.add_argument("--all", action="store_true", help="all of them")
    reproduce.add_argument("--model", help="of the table; by default each of them")
    reproduce.add_argument("--small", action="store_true", help="the whole path on the embedded stand-in, in a minute")
    reproduce.add_argument("--count", type=int, metavar="N", help="images per row; by default the paper's")
    reproduce.add_argument(
        "--dims", type=int, nargs="+", metavar="DIM", help="of Detail Guidance, where the paper does not state them"
    )
    reproduce.add_argument("--scale", type=float, metavar="W", help="the same for w")
    reproduce.add_argument("--weights", metavar="NAME|PATH|HUB_ID", help="to use in the model's place")
    reproduce.add_argument("--output", type=Path, metavar="DIR", help="by default _build/reproduce")
    reproduce.add_argument("--engine", default="local", help="local (default; also under torchrun and Slurm) or ray")
    reproduce.add_argument("--workers", type=int, metavar="N", help="of ray; by default one per GPU")
    reproduce.set_defaults(verb=_reproduce)

    plan = verbs.add_parser("plan", help="what a table of the paper costs, before anything starts")
    plan.add_argument("table", metavar="TABLE", help="as for reproduce")
    plan.add_argument("--model", help="only its rows of this model")
    plan.set_defaults(verb=_plan)

    verbs.add_parser("models", help="list the models known by name").set_defaults(verb=_models)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    from dgbook import notebooks, paths

    parameters = dict(notebooks.parse_parameter(text) for text in arguments.parameters)
    if arguments.model is not None:
        parameters["model"] = arguments.model
    if arguments.reference:
        parameters = notebooks.reference_parameters(arguments.name, parameters.get("model")) | parameters
    output = arguments.output or (paths.build_dir() / "reference" if arguments.reference else None)
    print(notebooks.execute(arguments.name, parameters, output))
    return 0


def _book_accept(arguments: argparse.Namespace) -> int:
    from dgbook import notebooks

    for path in notebooks.accept():
        print(path)
    return 0


def _results_check(arguments: argparse.Namespace) -> int:
    from dgbook import paths
    from dgbook.claims import acceptance, results

    differences = acceptance.check(paths.results_dir(), results.ACCEPTED)
    print(acceptance.report(differences))
    return 1 if differences else 0


def _results_accept(arguments: argparse.Namespace) -> int:
    from dgbook import paths
    from dgbook.claims import acceptance, results

    new, accepted = paths.results_dir(), results.ACCEPTED
    if arguments.reference:
        new, accepted = paths.build_dir() / "reference", results.REFERENCE
    for path in acceptance.accept(new, accepted, arrays=arguments.reference):
        print(path)
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    from dgbook.paper_scale.generate.job import Job, read_json
    from dgbook.paper_scale.generate.run import run
    from dgbook.paper_scale.prompts import read_conditions
    from dgkit.zoo import MODELS

    steps = arguments.steps
    if steps is None and arguments.model in MODELS:
        steps = MODELS[arguments.model].preset.steps
    if steps is None:
        raise DgkitError(f"--steps is needed: {arguments.model} has no preset")
    conditions, name = read_conditions(arguments.prompts, arguments.classes)
    methods = {
        name: read_json(f"--method {name}", text or "{}")
        for name, _, text in (method.partition("=") for method in arguments.methods)
    }
    job = Job(
        model=arguments.model,
        conditions=tuple(conditions),
        count=len(conditions) if arguments.count is None else arguments.count,
        seed=arguments.seed,
        steps=steps,
        guidance_scale=arguments.guidance_scale,
        methods=methods,
        call=read_json("--call", arguments.call),
        dtype=arguments.dtype,
        block_size=arguments.block_size,
        prompt_set=name,
    )
    report = run(job, arguments.output, engine=arguments.engine, workers=arguments.workers)
    print(report)
    return 1 if report.failures else 0


def _export_npz(arguments: argparse.Namespace) -> int:
    from dgbook.paper_scale.generate.export import export_npz

    print(export_npz(arguments.folder, arguments.path))
    return 0


def _study_make(arguments: argparse.Namespace) -> int:
    from dgbook.paper_scale.study.page import key_path, make

    key = make(arguments.a, arguments.b, arguments.output, arguments.seed)
    megabytes = arguments.output.stat().st_size / 1e6
    print(
        f"{arguments.output}: {len(key.pairs)} pairs, {len(key.questions)} questions, {megabytes:.1f} MB, to give away"
    )
    print(f"{key_path(arguments.output)}: which image is whose, to keep")
    if "prompt_alignment" not in key.questions:
        print("without prompts (NAME.txt beside the images) the question of prompt alignment is left out")
    return 0


def _study_analyse(arguments: argparse.Namespace) -> int:
    from dgbook.paper_scale.study.analysis import analyse, find_key, results_path, write_json

    key = arguments.key or find_key(arguments.answers[0])
    outcome = analyse(arguments.answers, key)
    print(outcome)
    print(f"\n{write_json(outcome, results_path(key))}")
    return 0


def _reproduce(arguments: argparse.Namespace) -> int:
    from dgbook.paper_scale.reproduce import OthersAtWork, reproduce, wanted

    given = {name: getattr(arguments, name) for name in ("dims", "scale", "weights")}
    parts = wanted(None if arguments.all else arguments.table, arguments.model, small=arguments.small, **given)
    status = 0
    for table, model in parts:
        try:
            found = reproduce(
                table, model, small=arguments.small, count=arguments.count, **given,
                engine=arguments.engine, workers=arguments.workers, output=arguments.output,
            )  # fmt: skip
        except OthersAtWork as waiting:
            print(f"{table} on {model}: {waiting}", flush=True)
        except DgkitError as error:
            if len(parts) == 1:
                raise
            status = 1
            print(f"{table} on {model} was not reproduced: {' '.join(str(error).split())}\n", flush=True)
        else:
            print(found, end="\n\n" if len(parts) > 1 else "\n", flush=True)
    return status


def _plan(arguments: argparse.Namespace) -> int:
    from dgbook.paper_scale.plan import plan

    print(plan(arguments.table, arguments.model))
    return 0


def _models(arguments: argparse.Namespace) -> int:
    from dgkit import zoo

    width = max(map(len, zoo.MODELS))
    for name, model in zoo.MODELS.items():
        print(f"{name:{width}}  {model.weights_gb:6.2f} GB  {model.licence}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
