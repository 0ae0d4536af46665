"""Published files by name: found on this machine or downloaded, and used only if they are the published ones.

Files of the hub lie in its own cache (`$HF_HOME`), at a pinned commit. Other files are looked for in `$DGKIT_DATA_DIR`
and in `~/.cache/dgkit`, where a download puts them. Every file is hashed each time before it is opened. Where no source
states its SHA-256, the hash of the first download is written beside it in `~/.cache/dgkit` and later ones must agree.
"""

import hashlib
import os
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pooch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from dgbook.files import write_whole
from dgkit.errors import DataError, first_line
from dgkit.files import read_text

pooch.get_logger().setLevel("WARNING")  # it would tell programmers what to do with each hash


class NotHere(DataError):
    """The file is not on this machine and cannot be downloaded; the message says how to bring it here."""


@dataclass(frozen=True)
class Published:
    """A file that somebody else has published.

    Attributes:
        files: its name, or names of which the first that exists is taken.
        licence: of the file.
        gigabytes: size.
        sha256: of the file; None where no source states it.
        hub: "owner/name" on the Hugging Face hub, or "".
        revision: commit of that repository.
        dataset: whether that repository is a data set.
        companions: small files of the same repository that are read together with it.
        url: where the file is if it is not on the hub.
    """

    files: tuple[str, ...]
    licence: str
    gigabytes: float
    sha256: str | None
    hub: str = ""
    revision: str = ""
    dataset: bool = False
    companions: tuple[str, ...] = ()
    url: str = ""

    @property
    def command(self) -> str:
        """What to type on a machine with a network."""
        if self.url:
            return f"curl -L --create-dirs -o ~/.cache/dgkit/{self.files[0]} '{self.url}'"
        kind = " --repo-type dataset" if self.dataset else ""
        names = " ".join((self.files[0], *self.companions))
        return f"hf download {self.hub}{kind} {names} --revision {self.revision}"


@dataclass(frozen=True)
class Found:
    """A file on this machine, its SHA-256, and whether that hash is the published one (else that of the first use)."""

    path: Path
    sha256: str
    published: bool


def cache_dir() -> Path:
    """`~/.cache/dgkit`."""
    return Path.home() / ".cache" / "dgkit"


def local(item: Published) -> Path | None:
    """Where the file lies on this machine; None if it has to be downloaded."""
    if item.url:
        folders = [cache_dir()]
        if "DGKIT_DATA_DIR" in os.environ:
            folders.insert(0, Path(os.environ["DGKIT_DATA_DIR"]))
        return next((folder / item.files[0] for folder in folders if (folder / item.files[0]).is_file()), None)
    return next((path for path in (_cached(item, name) for name in item.files) if path), None)


def fetch(item: Published) -> Found:
    """The file, downloaded if it is not here.

    Raises:
        NotHere: it is neither here nor to be downloaded.
        DataError: it is not the published file, or has changed since its first use.
    """
    path = (local(item) or _download(item)) if item.url else _from_hub(item)
    found = sha256_of(path)
    if item.sha256 is None:
        check_first_use(f"{item.hub.replace('/', '--')}@{item.revision[:12]}" if item.hub else path.name, found)
    elif found != item.sha256:
        raise DataError(f"{path} has SHA-256 {found}, not {item.sha256} (published): remove it to download it again")
    return Found(path, found, published=item.sha256 is not None)


def check_first_use(name: str, found: str) -> None:
    """Note the SHA-256 of what no source states a hash for, or compare it with the one noted before.

    Raises:
        DataError: they differ.
    """
    note = cache_dir() / "first-use" / f"{name}.sha256"
    if not note.is_file():
        write_whole(note, found + "\n")
    noted = read_text(note).strip()
    if found != noted:
        raise DataError(
            f"{name} has SHA-256 {found}, not {noted} as at its first use on this machine (noted in {note})"
        )


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(item: Published) -> Path:
    known = None if item.sha256 is None else f"sha256:{item.sha256}"
    try:
        return Path(pooch.retrieve(item.url, known, fname=item.files[0], path=cache_dir()))
    except ValueError as error:  # the hash, after which pooch keeps nothing
        raise DataError(f"{item.url} is not the published file of SHA-256 {item.sha256}: {error}") from error
    except OSError as error:  # no network, no space, a broken download
        raise _not_here(item, error) from error


def _cached(item: Published, name: str) -> Path | None:
    kind = "dataset" if item.dataset else "model"
    path = try_to_load_from_cache(item.hub, name, revision=item.revision, repo_type=kind)
    return Path(path) if isinstance(path, str) else None


def _from_hub(item: Published) -> Path:
    def get(name: str) -> Path:
        if path := _cached(item, name):
            return path
        if not constants.HF_HUB_OFFLINE:
            _reach(constants.ENDPOINT)
        kind = "dataset" if item.dataset else "model"
        return Path(hf_hub_download(item.hub, name, revision=item.revision, repo_type=kind))

    *others, last = [name for name in item.files if _cached(item, name)] or item.files
    try:
        for name in others:
            try:
                path = get(name)
                break
            except LocalEntryNotFoundError:  # no network
                raise
            except EntryNotFoundError:  # the repository has no file of this name
                continue
        else:
            path = get(last)
        for name in item.companions:
            get(name)
    except (OSError, EntryNotFoundError, HfHubHTTPError) as error:
        raise _not_here(item, error) from error
    return path


def _reach(url: str) -> None:
    """Without a network the hub's client would try again for half a minute for each file: ask once ourselves."""
    with suppress(urllib.error.HTTPError):  # any answer will do
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10).close()


def _not_here(item: Published, error: Exception) -> NotHere:
    return NotHere(
        f"{item.hub or item.url}: {item.files[0]} is not on this machine and could not be downloaded "
        f"({first_line(error)}). On a machine with a network: "
        f"{item.command} ({item.gigabytes:g} GB, {item.licence})"
    )
