"""What to generate, as plain data: everything that decides the bytes of the images, under one hash."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dgkit import checks
from dgkit.disruption import EDIT_KINDS
from dgkit.errors import DgkitError
from dgkit.guidance import METHODS
from dgkit.zoo import MODELS

LIBRARIES = ("torch", "diffusers", "transformers")
SEEDS = 1_000_000  # one seed's share of the seeds of single images
DTYPES = ("float32", "bfloat16", "float16")


@cache
def library_versions() -> Mapping[str, str]:
    """Those libraries' versions here that decide what an image is, to the bit."""
    return {library: version(library) for library in LIBRARIES}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A set of images.

    Image i has condition i modulo their number, and a generator of its own seeded with 1,000,000 x seed + i. Images are
    made in blocks of `block_size` consecutive indices, always in one call of the pipeline with that many rows: how
    many workers there are, and what has failed before, changes no batch's shape.

    Attributes:
        model: what `dgkit.load` takes: a name, a pipeline folder or a hub id.
        conditions: prompts, or class ids.
        count: number of images, at most 1,000,000.
        seed: of the set.
        steps: sampling steps.
        guidance_scale: s of u + s (c - u); 1 for no CFG. For Flux it is the `true_cfg_scale`.
        methods: guidance methods by their name in `dgkit.guidance.METHODS`, with their parameters as JSON has them;
            what is left out is the model's preset.
        disruption: arguments of `dgkit.disrupt`: block and dims, and kind and seed if not its defaults; none if empty.
        call: further arguments of the pipeline's call, such as height and width.
        dtype: of the weights; by default float32 for shipped models and folders, bfloat16 for the hub's.
        block_size: images per block.
        prompt_set: the name of the conditions, for people and metrics.
        versions: of the libraries in `LIBRARIES`; those installed.

    Raises:
        DgkitError: a value out of range, or one that JSON cannot hold.
    """

    model: str
    conditions: tuple[Any, ...]
    count: int
    seed: int = 0
    steps: int
    guidance_scale: float = 1.0
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    disruption: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = ""
    block_size: int = 8
    prompt_set: str = ""
    versions: Mapping[str, str] = field(default_factory=library_versions)

    def __post_init__(self) -> None:
        checks.integer("count", self.count, 1, SEEDS)
        checks.integer("seed", self.seed, 0, 2**63 // SEEDS - 1)
        checks.integer("steps", self.steps, 1)
        checks.integer("block_size", self.block_size, 1)
        scale = checks.number("guidance_scale", self.guidance_scale, 1, allowed="give a number from 1 (no CFG) up")
        if not isinstance(self.model, str | Path) or not str(self.model):
            checks.refuse("model", self.model, "give a name, a pipeline folder or a hub id")
        given = self.conditions if isinstance(self.conditions, Iterable) else ()
        conditions = tuple(c.item() if hasattr(c, "item") else c for c in given if not isinstance(given, str))
        if not conditions or not any(all(type(c) is kind for c in conditions) for kind in (str, int)):
            raise DgkitError("conditions are not allowed: give a list of prompts, or a list of class ids")
        dtype = checks.one_of("dtype", self.dtype or _usual_dtype(str(self.model)), DTYPES)
        for name, plain in (
            ("model", str(self.model)),
            ("conditions", conditions),
            ("dtype", dtype),
            ("guidance_scale", float(scale)),
            ("methods", _plain(self.methods, "methods")),
            ("disruption", _plain(self.disruption, "disruption")),
            ("call", _plain(self.call, "call")),
            ("versions", _plain(self.versions, "versions")),
        ):
            object.__setattr__(self, name, plain)
        checks.text("prompt_set", self.prompt_set)
        self.guidance()
        if self.disruption:
            self._check_disruption()

    # ---- as text

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Job":
        """The inverse of `to_dict`, also through JSON.

        Raises:
            DgkitError: `values` are not those of a job.
        """
        names = {f.name for f in fields(cls)}
        if values.keys() | {"disruption"} != names:
            raise DgkitError(f"not a job: {', '.join(sorted(names ^ values.keys()))} lacking or unknown")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All fields, without an empty `disruption`: it came later, and jobs keep their hashes."""
        return {name: value for name, value in asdict(self).items() if value or name != "disruption"}

    @property
    def sha256(self) -> str:
        """Over the canonical JSON: sorted keys, no spaces, whole numbers without a point."""
        return hashlib.sha256(canonical(self.to_dict()).encode()).hexdigest()

    @property
    def name(self) -> str:
        """`<model>-<method>-<12 digits of the hash>`, the name of its folder."""
        disrupted = [f"disrupted-{self.disruption.get('kind', 'zero')}"] if self.disruption else []
        label = "+".join([*(["cfg"] if self.guidance_scale > 1 else []), *self.methods, *disrupted]) or "none"
        model = Path(self.model).name
        return "-".join(re.sub(r"[^A-Za-z0-9.+-]+", "", part) for part in (model, label, self.sha256[:12]))

    def differences(self, other: "Job") -> list[str]:
        """What differs, "seed: 0 here, 1 there", if anything."""
        mine, others = asdict(self), asdict(other)
        found = []
        for name in mine:
            if canonical(mine[name]) != canonical(others[name]):
                pair = [_short(values[name]) for values in (mine, others)]
                what = f"{pair[0]} here, {pair[1]} there" if pair[0] != pair[1] else "others"
                found.append(f"{name}: {what}")
        return found

    # ---- what to do

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-self.count // self.block_size)

    def block(self, number: int) -> range:
        """The indices of a block; the last one may have fewer."""
        return range(number * self.block_size, min((number + 1) * self.block_size, self.count))

    def rows(self, number: int, wanted: Sequence[int]) -> list[int]:
        """Which image each row of a block's batch makes: an index of the block in its own row, if it is wanted.

        The others, and the rows after the end of the last block, repeat the last wanted image, and are dropped.
        """
        first, kept = number * self.block_size, set(wanted)
        return [i if i in kept else wanted[-1] for i in range(first, first + self.block_size)]

    def condition(self, index: int) -> Any:
        """The condition of one image."""
        return self.conditions[index % len(self.conditions)]

    def image_seed(self, index: int) -> int:
        """The seed of one image's generator, as in `dgbook.chapters.sampling.samples`."""
        return self.seed * SEEDS + index

    def guidance(self) -> list[Any]:
        """The guidance methods, made from `methods`.

        Raises:
            DgkitError: an unknown name or parameter, or a value that is not allowed.
        """
        made = []
        for name, parameters in self.methods.items():
            # autoguidance's parameter is a network, which is no text
            checks.one_of("method", name, [known for known in METHODS if known != "autoguidance"])
            allowed = {f.name for f in fields(METHODS[name]) if f.init}
            if not isinstance(parameters, Mapping):
                checks.refuse(name, parameters, f"give its parameters by name, of {', '.join(sorted(allowed))}")
            for key, value in parameters.items():
                if key not in allowed:
                    raise DgkitError(f"{name} has no parameter {key!r}: it has {', '.join(sorted(allowed))}")
                if value == "auto":
                    raise DgkitError(f'{name}: {key}="auto" is not allowed here: give what dgkit.calibrate finds')
            made.append(METHODS[name](**parameters))
        return made

    def _check_disruption(self) -> None:
        given = self.disruption
        allowed, needed = {"block", "dims", "kind", "seed"}, {"block", "dims"}
        if not needed <= given.keys() <= allowed or given.get("kind", "zero") not in EDIT_KINDS:
            kinds = ", ".join(EDIT_KINDS)
            checks.refuse("disruption", given, f"give block and dims, and if need be seed and a kind of {kinds}")


def read_json(name: str, text: str) -> dict[str, Any]:
    """An argument of a command line that is a JSON object.

    Raises:
        DgkitError: it is not one.
    """
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise DgkitError(f"{name}: {text!r} is not allowed: give JSON such as " + '{"block": 5, "dims": [810]}')
    return value


def canonical(value: Any) -> str:
    """JSON with sorted keys and without spaces; 4.0 is 4."""
    return json.dumps(_whole(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _whole(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _whole(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_whole(entry) for entry in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _plain(value: Any, where: str) -> Any:
    try:
        plain = json.loads(json.dumps(value, allow_nan=where == "methods"))  # which check their own numbers
        if not isinstance(plain, dict):
            raise TypeError(f"it is {plain!r}")
    except (TypeError, ValueError) as error:
        raise DgkitError(f"{where} is not allowed: give finite numbers, strings and lists by name ({error})") from error
    return plain


def _usual_dtype(model: str) -> str:
    own = MODELS[model].source is None if model in MODELS else Path(model).is_dir()
    return "float32" if own else "bfloat16"


def _short(value: Any) -> str:
    text = canonical(value)
    return text if len(text) <= 60 else f"{len(value)} values" if isinstance(value, list | tuple) else text[:57] + "..."
