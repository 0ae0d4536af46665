"""The recipes that train the shipped models, and those of which only what was measured is kept."""

import json
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from diffusers import AutoencoderKL

from dgbook.measures import datasets
from dgkit.errors import DgkitError
from dgkit.paths import DATA
from training import autoencoder, classifier, dit, flow, matcher
from training.loop import Schedule
from training.tiles import Tiles


def train(name: str, folder: Path) -> None:
    """Train the model `name` from nothing and write it to `folder/model`.

    `folder/model` receives the weights, the recipe (a TOML file, and its base) and `training.json` (data and, per
    network, steps, seconds, loss and device). The other folders beside it are intermediate. A call with the folder of a
    run that was killed goes on where that run was; finished stages are not repeated. Uses the GPU if there is one,
    otherwise as many threads as torch is set to; either changes the rounding, hence the weights, but not the batches
    and their noise.

    `tiny-sd3`, its other trainings (see `training.trainings`) and `tiny-flux` share the autoencoder in the folder
    `tile-autoencoder` beside theirs, and train it first if it is not complete. `tiny-dit-s`, `-b`, `-l` and `-xl` (see
    `training.ladder`) use that of the shipped `tiny-dit`, and are trained once for each seed of their recipe; the
    first training is the one written.

    Args:
        name: a key of `MODELS`.
        folder: the run's folder; made if missing.

    Raises:
        DgkitError: `name` is unknown, or `folder` holds a run of another recipe.
        DataError: the data are missing or altered.
    """
    if name not in MODELS:
        raise DgkitError(f"name={name!r} is not allowed: use one of {', '.join(map(repr, MODELS))}")
    recipe = Path(__file__).parent / f"{name}.toml"
    base = tomllib.loads(recipe.read_text(encoding="utf-8")).get("base")
    files = [recipe, *([recipe.with_name(base)] if base else [])]
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        used = folder / file.name
        if not used.exists():
            shutil.copyfile(file, used)
        if used.read_bytes() != file.read_bytes():
            raise DgkitError(f"folder={str(folder)!r} is not allowed: it holds a run of another recipe than {file}")

    def build(model: Path) -> None:
        MODELS[name].build(recipe, folder, model)
        for config in model.rglob("config.json"):  # diffusers notes the folder that a part was loaded from
            facts = json.loads(config.read_text(encoding="utf-8"))
            if facts.pop("_name_or_path", None) is not None:
                config.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        for file in files:
            shutil.copy(file, model)
        networks = {
            path.parent.name: json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(folder.glob("*/training.json"))
        }
        if MODELS[name].build is _train_text_to_image:
            shared = folder.with_name(TILE_AUTOENCODER) / "model" / "training.json"
            networks = json.loads(shared.read_text(encoding="utf-8"))["networks"] | networks
        facts = {"model": name, "data": MODELS[name].data, "networks": networks}
        (model / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

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


def _train_rung(recipe_file: Path, folder: Path, model: Path) -> None:
    recipe = dit.Recipe.read(recipe_file)
    vae = AutoencoderKL.from_pretrained(DATA / "models" / "tiny-dit" / "vae")
    trained = []
    for seed in recipe.seeds:
        once = replace(recipe, transformer_schedule=replace(recipe.transformer_schedule, seed=seed))
        trained.append(dit.train_transformer(once, vae, folder / f"transformer-{seed}"))
    dit.save_pipeline(vae, trained[0], recipe.scheduler, model)


def _train_classifier(recipe_file: Path, folder: Path, model: Path) -> None:
    schedule = Schedule(**tomllib.loads(recipe_file.read_text(encoding="utf-8"))["schedule"])
    classifier.save_classifier(classifier.train_classifier(schedule, folder / "classifier"), model)


def _train_matcher(recipe_file: Path, folder: Path, model: Path) -> None:
    recipe = matcher.Recipe.read(recipe_file)
    matcher.save_matcher(matcher.train_matcher(recipe, Tiles.load(), folder / "matcher"), model)


def _train_tile_autoencoder(recipe_file: Path, folder: Path, model: Path) -> None:
    vae = autoencoder.train_autoencoder(autoencoder.Recipe.read(recipe_file), Tiles.load(), folder / "autoencoder")
    vae.bfloat16().save_pretrained(model)


def _train_text_to_image(recipe_file: Path, folder: Path, model: Path) -> None:
    train(TILE_AUTOENCODER, folder.with_name(TILE_AUTOENCODER))
    vae = AutoencoderKL.from_pretrained(folder.with_name(TILE_AUTOENCODER) / "model")
    recipe, tiles = flow.Recipe.read(recipe_file), Tiles.load()
    network = flow.build_model(recipe, tiles)
    flow.train_model(recipe, network, vae, tiles, folder / "transformer")
    flow.save_pipeline(network, vae, model)


def _build_once(result: Path, build: Callable[[Path], object]) -> None:
    """Let `build` fill the folder `result` unless it is complete; a killed build leaves only `result`.partial."""
    if result.exists():
        return
    partial = result.with_name(result.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    build(partial)
    partial.rename(result)


class Model(NamedTuple):
    """How one model is trained, given its recipe's file, the run's folder and the folder for the model; on what."""

    build: Callable[[Path, Path, Path], None]
    data: str


TILE_AUTOENCODER = "tile-autoencoder"

MODELS: dict[str, Model] = {
    "tiny-dit": Model(_train_dit, datasets.FASHION_MNIST),
    "fashion-classifier": Model(_train_classifier, datasets.FASHION_MNIST),
    "tile-matcher": Model(_train_matcher, datasets.DUNGEON_TILES),
    TILE_AUTOENCODER: Model(_train_tile_autoencoder, datasets.DUNGEON_TILES),
    "tiny-sd3": Model(_train_text_to_image, datasets.DUNGEON_TILES),
    "tiny-flux": Model(_train_text_to_image, datasets.DUNGEON_TILES),
    "tiny-sd3-first": Model(_train_text_to_image, datasets.DUNGEON_TILES),
    "tiny-sd3-fast": Model(_train_text_to_image, datasets.DUNGEON_TILES),
    "tiny-sd3-long": Model(_train_text_to_image, datasets.DUNGEON_TILES),
    "tiny-sd3-wide": Model(_train_text_to_image, datasets.DUNGEON_TILES),
    "tiny-dit-s": Model(_train_rung, datasets.FASHION_MNIST),
    "tiny-dit-b": Model(_train_rung, datasets.FASHION_MNIST),
    "tiny-dit-l": Model(_train_rung, datasets.FASHION_MNIST),
    "tiny-dit-xl": Model(_train_rung, datasets.FASHION_MNIST),
}
"""The trainings by name."""
