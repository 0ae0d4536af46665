"""From the hub, a folder or a single file to a pipeline on the CPU: what `dgkit.load` does once it knows the source.

Weights are safetensors, never pickles, and no code comes with them. What fails raises one `LoadError`, which says what
to do.
"""

import errno
import logging
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import logging as transformers_logging

from dgkit.errors import LoadError, first_line
from dgkit.files import of_pointer, read_json

# what reading damaged or foreign files raises in diffusers, transformers and safetensors
_UNREADABLE = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, SafetensorError)
_PREFIX = "model.diffusion_model."  # of transformers inside whole single-file checkpoints


# --------------------------------------------------------------------------------------------------------- from the hub


def fetch(repo: str, revision: str = "main", licence: str = "", *, transformer: bool = True) -> Path:
    """The snapshot folder of a pipeline on the hub; what is not here is downloaded.

    Args:
        repo: "owner/name".
        revision: branch, tag, commit or "refs/pr/1".
        licence: its name, for the error.
        transformer: whether its transformer's weights are needed; else only their configuration comes.

    Raises:
        LoadError: no access, no network, no such repository, no safetensors, no room on the disk.
    """
    skipped = {} if transformer else {"transformer": None}

    def get(offline: bool) -> Path:
        # `download` chooses the files: those of the pipeline's parts, without variants and single-file duplicates
        folder = DiffusionPipeline.download(
            repo, revision=revision, use_safetensors=True, local_files_only=offline, **skipped
        )
        if not transformer:
            hf_hub_download(repo, "transformer/config.json", revision=revision, local_files_only=offline)
        if missing := _missing(Path(folder)):
            raise LocalEntryNotFoundError(f"{missing[0]} is missing")
        return Path(folder)

    files = '--include "*/*" --include model_index.json --exclude "*fp16*" --exclude "*.bin"'
    return _get(get, repo, licence, f"{repo} --revision {revision} {files}")


def cached(repo: str, revision: str = "main") -> bool:
    """Whether all parts of a pipeline on the hub seem to be on this machine."""
    path = try_to_load_from_cache(repo, "model_index.json", revision=revision)
    return isinstance(path, str) and not _missing(Path(path).parent)


def _missing(folder: Path) -> list[str]:
    """Parts of the pipeline that have no folder."""
    index = read_json(folder / "model_index.json")
    parts = [name for name, kind in index.items() if isinstance(kind, list) and kind[0] and name != "_class_name"]
    return [part for part in parts if not (folder / part).is_dir()]


def fetch_file(name: str, licence: str = "") -> Path:
    """A single file on the hub, "owner/name/path".

    Raises:
        LoadError: as for `fetch`.
    """
    owner, repo, path = name.split("/", 2)

    def get(offline: bool) -> Path:
        return Path(hf_hub_download(f"{owner}/{repo}", path, local_files_only=offline))

    return _get(get, f"{owner}/{repo}", licence, f"{owner}/{repo} {path}")


def _get(get: Callable[[bool], Path], repo: str, licence: str, download: str) -> Path:
    offline = constants.HF_HUB_OFFLINE or not _reachable()
    try:
        with quiet():
            return get(offline)
    except Exception as error:  # the hub and its HTTP client have no common base of their errors
        raise LoadError(_advice(error, repo, licence, download, offline)) from error


def _reachable() -> bool:
    """Whether the hub answers: without a network its client would try again for half a minute for each file."""
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError:
        return True  # any answer will do
    except OSError:
        return False
    return True


def _advice(error: BaseException, repo: str, licence: str, download: str, offline: bool) -> str:
    """One sentence: what is wrong, what to do."""
    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)

    def any_is(*kinds: type[BaseException]) -> bool:
        return any(isinstance(e, kinds) for e in causes)

    page = f"{constants.ENDPOINT}/{repo}"
    if any(isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT) for e in causes):
        return f"the disk is full: make room in {constants.HF_HUB_CACHE}, or set HF_HOME to a folder on another disk"
    if any_is(GatedRepoError):
        name = f" ({licence})" if licence else ""
        return f"{repo} is gated: accept its licence{name} at {page}, and log in with `hf auth login`"
    if any_is(RepositoryNotFoundError):
        return f"{repo} is not on the hub, or is private: check the name, or log in with `hf auth login`"
    if any(isinstance(e, HfHubHTTPError) and e.response.status_code in (401, 403) for e in causes):
        return f"the hub does not accept this machine's token: log in with `hf auth login`, and see {page}"
    if any("necessary `safetensors`" in str(e) for e in causes):
        return f"{repo} has no safetensors weights, and dgkit opens no pickles: give a folder with converted weights"
    if any("custom code" in str(e) for e in causes):
        return f"{repo} needs code of its own, and dgkit runs no code from the hub"
    if any_is(EntryNotFoundError) and not offline:
        return f"{repo} is not a diffusers pipeline: {first_line(error)}"
    reached = "is switched off (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "cannot be reached"
    if offline:
        return (
            f"{repo} is not completely on this machine and the hub {reached}: run `hf download {download}` on a "
            f"machine with a network, and copy its ~/.cache/huggingface/hub to {constants.HF_HUB_CACHE}"
        )
    return f"{repo} could not be downloaded: {first_line(error)}"


# ------------------------------------------------------------------------------------------------------------ from disk


@dataclass(frozen=True)
class Single:
    """A transformer that lies in one file or folder of its own, without the other parts of a pipeline.

    Attributes:
        path: the file or folder.
        transformer: its diffusers class.
        blocks, channels: N and d.
        guidance: whether it has Flux's embedding of the distilled guidance.
        dual: whether some blocks have a second attention, as SD3.5-Medium's.
    """

    path: Path
    transformer: str
    blocks: int
    channels: int
    guidance: bool
    dual: bool

    @classmethod
    def of(cls, path: Path) -> "Single":
        """What `path` holds, by its header or configuration alone.

        Raises:
            LoadError: not a 16- or 32-bit safetensors file or a folder with an SD3 or Flux transformer.
        """
        return cls._of_folder(path) if path.is_dir() else cls._of_file(path)

    @classmethod
    def _of_folder(cls, path: Path) -> "Single":
        try:
            config = read_json(path / "config.json")
            blocks = config["num_layers"] + config.get("num_single_layers", 0)
            channels = config["num_attention_heads"] * config["attention_head_dim"]
            guidance, dual = bool(config.get("guidance_embeds")), bool(config.get("dual_attention_layers"))
            return cls(path, config["_class_name"], blocks, channels, guidance, dual)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LoadError(
                f"{path} is not a diffusers pipeline folder: it has no model_index.json, and no config.json of a "
                f"transformer either"
            ) from error

    @classmethod
    def _of_file(cls, path: Path) -> "Single":
        if path.suffix != ".safetensors":
            raise LoadError(f"{path} is not a .safetensors file, and dgkit opens no other kind of weights")
        try:
            with safe_open(path, "pt") as file:
                slices = {name.removeprefix(_PREFIX): file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                kinds = {part.get_dtype() for part in slices.values()}
                shapes = {name: part.get_shape() for name, part in slices.items()}
        except (OSError, SafetensorError) as error:
            raise LoadError(f"{path} could not be read{of_pointer(path)}: {first_line(error)}") from error
        if foreign := sorted(kinds - {"F32", "F16", "BF16", "F64", "I64"}):
            raise LoadError(
                f"{path} has {', '.join(foreign)} weights, with which the activations are others: give a 16-bit file"
            )

        def count(group: str) -> int:
            return len({name.split(".")[1] for name in shapes if name.startswith(group)})

        sd3, flux = "SD3Transformer2DModel", "FluxTransformer2DModel"
        layouts = (  # the original authors', and diffusers'
            (flux, ("double_blocks.", "single_blocks."), "img_in.weight"),
            (sd3, ("joint_blocks.",), "x_embedder.proj.weight"),
            (flux, ("transformer_blocks.", "single_transformer_blocks."), "x_embedder.weight"),
            (sd3, ("transformer_blocks.",), "pos_embed.proj.weight"),
        )
        for name, groups, first in layouts:
            if all(map(count, groups)) and first in shapes:
                guidance, dual = (any(part in key for key in shapes) for part in ("guidance", ".attn2."))
                return cls(path, name, sum(map(count, groups)), shapes[first][0], guidance, dual)
        raise LoadError(f"{path} holds no SD3 or Flux transformer in a layout known here")

    def read(self, base: Path, dtype: torch.dtype) -> nn.Module:
        """The transformer.

        Args:
            base: pipeline folder whose transformer has the same configuration.
            dtype: of the weights.

        Raises:
            LoadError: the weights are broken, incomplete or of another size.
        """
        try:
            model = getattr(diffusers, self.transformer)
            with quiet():
                if self.path.is_dir():
                    return model.from_pretrained(self.path, dtype=dtype, use_safetensors=True, local_files_only=True)
                # without the embedding the model is de-distilled, whatever the base is
                options = {"guidance_embeds": self.guidance} if "Flux" in self.transformer else {}
                return model.from_single_file(
                    str(self.path), config=str(base), subfolder="transformer", dtype=dtype, local_files_only=True,
                    **options,
                )  # fmt: skip
        except _UNREADABLE as error:
            reason = "weights are missing" if "meta tensor" in str(error) else first_line(error)
            raise LoadError(f"{self.path} could not be loaded as {self.transformer}: {reason}") from error


def pipeline_around(path: Path) -> Path | None:
    """The pipeline folder in which a file or folder lies, or the one around that."""
    return next((folder for folder in path.resolve().parents[:2] if (folder / "model_index.json").is_file()), None)


def read(folder: Path, dtype: torch.dtype, single: Single | None = None) -> Any:
    """The pipeline in `folder`, on the CPU.

    Args:
        folder: laid out as on the hub; of parts that have no other weights, their fp16 or bf16 variants will do.
        dtype: of the weights.
        single: takes the place of the folder's own transformer.

    Raises:
        LoadError: the folder is not complete, or its weights are broken, pickles or need code of their own.
    """
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "local_files_only": True}
    parts = {} if single is None else {"transformer": single.read(folder, dtype)}
    try:
        with quiet():
            for name, variant in _variants(folder).items():
                if name not in parts:  # for all parts alike a variant would also be taken where there is better
                    parts[name] = _class_of(folder, name).from_pretrained(folder / name, variant=variant, **options)
            return DiffusionPipeline.from_pretrained(folder, **options, **parts)
    except _UNREADABLE as error:
        advice = next(filter(None, map(of_pointer, folder.glob("*/*.safetensors"))), "")
        if "no file named" in str(error) and any(folder.glob("*/*.bin")):
            advice = "; it has pickles, which dgkit does not open: convert them to safetensors"
        raise LoadError(f"{folder} could not be loaded: {first_line(error)}{advice}") from error


def _variants(folder: Path) -> dict[str, str]:
    """The parts that have no weights but those of a variant, and which: of several, the more exact fp16."""
    found: dict[str, str] = {}
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        names = [re.sub(r"-\d+-of-\d+$", "", file.stem) for file in part.glob("*.safetensors")]
        kinds = {name.partition(".")[2] for name in names}  # "" of model.safetensors, "bf16" of model.bf16.safetensors
        if kinds and "" not in kinds and (variant := next((v for v in ("fp16", "bf16") if v in kinds), None)):
            found[part.name] = variant
    return found


def _class_of(folder: Path, part: str) -> Any:
    """The class of one part, which is one of diffusers or transformers."""
    library, name = read_json(folder / "model_index.json")[part]
    if library not in ("diffusers", "transformers"):
        raise LoadError(f"{folder} needs code of its own for {part}, and dgkit runs none that comes with a model")
    return getattr(import_module(library), name)


_NEEDLESS = (
    "Expected types for id2label",  # DiT's class names, whose keys JSON turns into strings
    "Couldn't connect to the Hub",  # a `LoadError` says so, unless everything is here
    "should be kept in float32: []",
)


@contextmanager
def quiet() -> Iterator[None]:
    """Progress bars only on a terminal, and no needless warnings."""

    def needed(record: logging.LogRecord) -> bool:
        return not any(words in record.getMessage() for words in _NEEDLESS)

    loggers = [logging.getLogger(f"diffusers.{name}") for name in ("pipelines.pipeline_utils", "models.modeling_utils")]
    for logger in loggers:
        logger.addFilter(needed)
    shown = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    if not sys.stderr.isatty():
        for library in shown:
            library.disable_progress_bar()
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(needed)
        for library in shown:
            library.enable_progress_bar()
