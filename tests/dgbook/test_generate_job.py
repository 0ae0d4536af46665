"""What a job says: its hash, its blocks and rows, its guidance; and every value it refuses."""

import hashlib
import json
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgbook.paper_scale.generate.job import Job, read_json
from dgbook.paper_scale.prompts import read_conditions
from dgkit.errors import DgkitError
from dgkit.guidance import APG, DG, METHODS, Every, Schedule
from tests.fake_images import job


def test_the_hash_is_that_of_canonical_json() -> None:
    made = Job(
        model="some/model",
        conditions=["a fox", "ein Bär"],
        count=3,
        steps=28,
        guidance_scale=4.0,
        methods={"dg": {"scale": 1.0, "dims": (810,), "block": 5}},
        call={"width": 512, "height": 512},
        versions={"torch": "2"},
    )
    text = (
        '{"block_size":8,"call":{"height":512,"width":512},"conditions":["a fox","ein Bär"],"count":3,'
        '"dtype":"bfloat16","guidance_scale":4,"methods":{"dg":{"block":5,"dims":[810],"scale":1}},'
        '"model":"some/model","prompt_set":"","seed":0,"steps":28,"versions":{"torch":"2"}}'
    )
    assert made.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert made.name == f"model-cfg+dg-{made.sha256[:12]}"


@pytest.mark.parametrize(
    ("change", "label"),
    [
        ({}, "none"),
        ({"guidance_scale": 2.0}, "cfg"),
        ({"methods": {"dg": {}}}, "dg"),
        ({"guidance_scale": 2.0, "methods": {"cfg-zero*": {}}}, "cfg+cfg-zero"),
        ({"disruption": {"block": 1, "dims": [2]}}, "disrupted-zero"),
        ({"guidance_scale": 2.0, "disruption": {"block": 1, "dims": [2], "kind": "random"}}, "cfg+disrupted-random"),
    ],
)
def test_the_name_says_the_method(change: dict[str, Any], label: str) -> None:
    made = job(**change)
    assert made.name == f"fake-{label}-{made.sha256[:12]}"


def test_every_field_changes_the_hash_but_the_way_it_is_written_does_not() -> None:
    base = job(methods={"dg": {"scale": 1, "block": 2}})
    changes: dict[str, Any] = {
        "model": "other",
        "conditions": ("one", "two"),
        "count": 11,
        "seed": 1,
        "steps": 2,
        "guidance_scale": 1.5,
        "methods": {},
        "disruption": {"block": 1, "dims": [2]},
        "call": {"height": 16},
        "dtype": "float16",
        "block_size": 5,
        "prompt_set": "words",
        "versions": {"torch": "0"},
    }
    assert changes.keys() == asdict(base).keys()
    hashes = {base.sha256} | {replace(base, **{name: value}).sha256 for name, value in changes.items()}
    assert len(hashes) == 1 + len(changes)
    assert job(methods={"dg": {"block": 2, "scale": 1.0}}, guidance_scale=1).sha256 == base.sha256


def test_a_job_survives_json() -> None:
    made = job(methods={"pag": {"blocks": [1, 2], "schedule": {"branch": {"n": 2}}}})
    again = Job.from_dict(json.loads(json.dumps(asdict(made))))
    assert again == made and again.sha256 == made.sha256
    values = asdict(made)
    with pytest.raises(DgkitError, match="seed"):
        Job.from_dict({k: v for k, v in values.items() if k != "seed"})
    with pytest.raises(DgkitError, match="colour"):
        Job.from_dict(values | {"colour": 1})


def test_a_job_of_before_disruptions_is_the_same_job() -> None:
    values = asdict(job())
    del values["disruption"]
    assert Job.from_dict(values) == job() and job().to_dict() == values
    disrupted = job(disruption={"block": 1, "dims": (2, 3), "seed": 4})
    assert Job.from_dict(json.loads(json.dumps(disrupted.to_dict()))) == disrupted
    assert disrupted.to_dict()["disruption"] == {"block": 1, "dims": [2, 3], "seed": 4}


def test_versions_are_those_installed() -> None:
    assert job().versions == {name: version(name) for name in ("torch", "diffusers", "transformers")}


@pytest.mark.parametrize(
    ("model", "dtype"), [("tiny-dit", "float32"), ("sd3", "bfloat16"), ("owner/name", "bfloat16"), (".", "float32")]
)
def test_the_usual_dtype(model: str, dtype: str) -> None:
    assert job(model=model, dtype="").dtype == dtype
    assert job(model=model, dtype="float16").dtype == "float16"


@given(count=st.integers(1, 500), block_size=st.integers(1, 70))
def test_blocks_cover_every_index_once(count: int, block_size: int) -> None:
    made = job(count, block_size)
    assert [i for block in range(made.blocks) for i in made.block(block)] == list(range(count))
    assert all(len(made.block(block)) == block_size for block in range(made.blocks - 1))


@given(st.data(), st.integers(1, 20), st.integers(1, 9))
def test_rows_keep_wanted_images_in_their_place(data: st.DataObject, count: int, block_size: int) -> None:
    made = job(count, block_size)
    block = data.draw(st.integers(0, made.blocks - 1))
    indices = list(made.block(block))
    wanted = data.draw(st.lists(st.sampled_from(indices), min_size=1, unique=True).map(sorted))
    rows = made.rows(block, wanted)
    assert len(rows) == block_size  # whatever is wanted: the shape of the batch never changes
    for row, index in enumerate(rows):
        own = block * block_size + row
        assert index == (own if own in wanted else wanted[-1])


def test_conditions_and_seeds_of_images() -> None:
    made = job(5, seed=7, conditions=np.array([3, 1]))
    assert [made.condition(i) for i in range(5)] == [3, 1, 3, 1, 3]
    assert all(type(condition) is int for condition in made.conditions)
    assert [made.image_seed(i) for i in range(5)] == [7_000_000, 7_000_001, 7_000_002, 7_000_003, 7_000_004]


def test_guidance_is_made_of_plain_data() -> None:
    parameters = {
        "dg": {"scale": 2.0, "block": 1, "dims": [4], "schedule": {"branch": {"n": 3}}},
        "apg": {"norm": float("inf")},
    }
    dg, apg = job(methods=parameters, guidance_scale=2.0).guidance()
    assert dg == DG(scale=2.0, block=1, dims=[4], schedule=Schedule(Every(3)))
    assert apg == APG(norm=float("inf"))
    for name in METHODS:
        if name != "autoguidance":
            (made,) = job(methods={name: {}}).guidance()
            assert made == METHODS[name]()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"count": 0}, "count=0 is not allowed"),
        ({"count": 1_000_001}, "from 1 to 1000000"),
        ({"count": True}, "count=True"),
        ({"seed": -1}, "seed=-1"),
        ({"steps": 0}, "steps=0"),
        ({"block_size": 1.5}, "block_size=1.5"),
        ({"guidance_scale": 0.5}, "guidance_scale=0.5"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"model": ""}, "model=''"),
        ({"conditions": "a fox"}, "list of prompts"),
        ({"conditions": []}, "list of prompts"),
        ({"conditions": ["a", 1]}, "list of prompts"),
        ({"conditions": [True]}, "list of prompts"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"methods": {"magic": {}}}, "method='magic' is not allowed: use one of dg, pag"),
        ({"methods": {"autoguidance": {}}}, "method='autoguidance' is not allowed"),
        ({"methods": {"dg": {"depth": 1}}}, "dg has no parameter 'depth'"),
        ({"methods": {"dg": {"dims": "auto"}}}, 'dims="auto" is not allowed here'),
        ({"methods": {"dg": {"scale": -1}}}, "scale=-1"),
        ({"methods": {"dg": {"scale": abs}}}, "methods is not allowed"),
        ({"call": {"generator": object()}}, "call is not allowed"),
        ({"disruption": {"block": 1}}, "disruption=.*give block and dims"),
        ({"disruption": {"block": 1, "dims": [2], "depth": 3}}, "disruption=.*give block and dims"),
        ({"disruption": {"block": 1, "dims": [2], "kind": "blur"}}, "a kind of zero, mean, random"),
        ({"disruption": {"block": 1, "dims": {2}}}, "disruption is not allowed"),
    ],
)
def test_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(DgkitError, match=words):
        job(**change)


def test_differences_name_what_differs() -> None:
    assert job().differences(job()) == []
    assert job().differences(job(seed=1)) == ["seed: 0 here, 1 there"]
    long = ["a very long prompt " * 5] * 20
    assert job().differences(job(conditions=long, count=3)) == [
        'conditions: ["one","two","three"] here, 20 values there',
        "count: 10 here, 3 there",
    ]
    assert job(conditions=long).differences(job(conditions=long[:-1] + ["x"])) == ["conditions: others"]


def test_conditions_of_a_command_line(tmp_path: Path) -> None:
    assert read_conditions(None, "3-5") == ([3, 4, 5], "")
    prompts, name = read_conditions("offline", None)
    assert name == "offline" and len(prompts) == 24 and "tabby cat" in prompts[1]
    classes, _ = read_conditions("imagenet", None)
    assert classes[:1001] == [*range(1000), 0]
    file = tmp_path / "mine.txt"
    file.write_text("ein Bär\na fox\n", encoding="utf-8")
    assert read_conditions(str(file), None) == (["ein Bär", "a fox"], "mine")


@pytest.mark.parametrize("classes", ["", "7", "5-3", "a-b", "-1-3"])
def test_classes_that_are_no_range(classes: str) -> None:
    with pytest.raises(DgkitError, match="give FIRST-LAST"):
        read_conditions(None, classes)


def test_prompts_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DgkitError, match="'nowhere' is not allowed: give a text file, a .csv file, or a set: pickapic"):
        read_conditions("nowhere", None)
    file = tmp_path / "gap.txt"
    file.write_text("one\n\ntwo\n")
    with pytest.raises(DgkitError, match="gap.txt, line 2 is empty"):
        read_conditions(str(file), None)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(DgkitError, match="gap.txt is not text in UTF-8"):
        read_conditions(str(file), None)


def test_json_of_a_command_line() -> None:
    assert read_json("--call", '{"height": 8}') == {"height": 8}
    for text in ("", "8", "[1]", "{height: 8}"):
        with pytest.raises(DgkitError, match="--call: .* is not allowed: give JSON"):
            read_json("--call", text)
