"""The recipes that train the shipped models."""

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

from diffusers import AutoencoderKL

from dgkit.errors import DgkitError
from dgkit.tiny import classifier, data, dit
from dgkit.tiny.loop import Schedule


def train(name: str, folder: Path) -> None:
    """Train the shipped model `name` from nothing and write it to `folder/model`.

    `folder/model` receives the weights, the recipe (a TOML file) and `training.json` (data and, per network, steps,
    seconds, loss and device). The other folders beside it are intermediate. A call with the folder of a run that was
    killed goes on where that run was; finished stages are not repeated. Uses the GPU if there is one, otherwise as many
    threads as torch is set to; either changes the rounding, hence the weights, but not the batches and their noise.

    Args:
        name: a key of `MODELS`.
        folder: the run's folder; made if missing.

    Raises:
        DgkitError: `name` is unknown, or `folder` holds a run of another recipe.
        DataError: Fashion-MNIST is missing or altered.
    """
    if name not in MODELS:
        raise DgkitError(f"name={name!r} is not allowed: use one of {', '.join(map(repr, MODELS))}")
    recipe = Path(__file__).parent / f"{name}.toml"
    folder.mkdir(parents=True, exist_ok=True)
    used = folder / recipe.name
    if not used.exists():
        shutil.copyfile(recipe, used)
    if used.read_bytes() != recipe.read_bytes():
        raise DgkitError(f"folder={str(folder)!r} is not allowed: it holds a run of another recipe than {recipe}")

    def build(model: Path) -> None:
        MODELS[name](recipe, folder, model)
        shutil.copy(recipe, model)
        networks = {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/training.json"))}
        facts = {"model": name, "data": data.FASHION_MNIST, "networks": networks}
        (model / "training.json").write_text(json.dumps(facts, indent=2) + "\n")

    _build_once(folder / "model", build)
    print(f"{name}: {folder / 'model'} is complete", flush=True)


def _train_dit(recipe_file: Path, folder: Path, model: Path) -> None:
    recipe = dit.Recipe.read(recipe_file)

    def build_vae(path: Path) -> None:
        dit.train_autoencoder(recipe, folder / "autoencoder").save_pretrained(path)

    _build_once(folder / "vae", build_vae)
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    transformer = dit.train_transformer(recipe, vae, folder / "transformer")
    dit.save_pipeline(vae, transformer, recipe.scheduler, model)


def _train_classifier(recipe_file: Path, folder: Path, model: Path) -> None:
    schedule = Schedule(**tomllib.loads(recipe_file.read_text())["schedule"])
    classifier.save_classifier(classifier.train_classifier(schedule, folder / "classifier"), model)


def _build_once(result: Path, build: Callable[[Path], object]) -> None:
    """Let `build` fill the folder `result` unless it is complete; a killed build leaves only `result`.partial."""
    if result.exists():
        return
    partial = result.with_name(result.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    build(partial)
    partial.rename(result)


MODELS: dict[str, Callable[[Path, Path, Path], None]] = {
    "tiny-dit": _train_dit,
    "fashion-classifier": _train_classifier,
}
"""The trainings by name: each takes the recipe file, the run's folder and the folder for the model."""
