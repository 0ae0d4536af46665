"""The benchmark scripts: they run what they say, and their tables and JSON have the stated form. Nothing about time."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from benchmarks import __main__ as together
from benchmarks import branches, frontier, full_size, record, runner, runs
from benchmarks.models import ARCHITECTURES, subject
from dgkit.anatomy import dissect
from dgkit.zoo import MODELS, preset_of

# (2N - m) / 2N and (3N - m) / 3N with N and m of the paper
FORMULA = {
    "sd3": (42 / 48, 66 / 72),
    "sd3.5-large": (56 / 76, 94 / 114),
    "flux-dev": (92 / 114, 149 / 171),
    "dit-xl-2": (49 / 56, 77 / 84),
}
GUIDED = [f"{guidance} {sharing}" for guidance in ("DG", "CFG+DG") for sharing in ("replay", "fork", "none")]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_real_configs_are_the_public_ones(name: str) -> None:
    built = subject(name, device="meta", dtype=torch.bfloat16)
    anatomy, row = dissect(built.model), MODELS[name]
    assert (len(anatomy.blocks), anatomy.channels) == (row.blocks, row.channels)
    assert preset_of(built.model) == row.preset
    assert all(p.dtype == torch.bfloat16 and p.device.type == "meta" for p in built.model.parameters())
    parameters = sum(p.numel() for p in built.model.parameters())
    if name == "dit-xl-2":  # diffusers gives each block its own embedding of time and class, the original has one
        parameters -= 27 * (256 * 1152 + 1152 + 1152 * 1152 + 1152 + 1001 * 1152)
    published = {"sd3": 2.03e9, "sd3.5-large": 8.06e9, "flux-dev": 11.9e9, "dit-xl-2": 675e6}
    assert parameters == pytest.approx(published[name], rel=0.03)
    prediction = built.model(**built.cond)[0]  # shapes alone: the calls fit
    assert len(prediction) == 1
    tokens = 256 if name == "dit-xl-2" else 4096
    assert prediction.shape[1:].numel() == tokens * 4 * (8 if name == "dit-xl-2" else 16)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_guided_runs_evaluate_the_blocks_they_claim(name: str) -> None:
    """Images are counted inside the blocks, by hooks on a submodule that a stand-in does not reach."""
    built = subject(name, full_size.TOY[name])
    counted = [0]
    for block in dissect(built.model).blocks:
        block.gates[0][1].register_forward_hook(lambda m, a, o: counted.__setitem__(0, counted[0] + len(o[0])))
    evaluations = {}
    for run, open_run in runs.guided_runs(built).items():
        with open_run() as step:
            counted[0] = 0
            step()
        evaluations[run] = counted[0]
    assert list(evaluations) == GUIDED
    total = MODELS[name].blocks
    assert (evaluations["DG none"], evaluations["CFG+DG none"]) == (2 * total, 3 * total)
    for guidance, expected in zip(("DG", "CFG+DG"), FORMULA[name], strict=True):
        for sharing in ("replay", "fork"):
            ratio = evaluations[f"{guidance} {sharing}"] / evaluations[f"{guidance} none"]
            assert ratio == pytest.approx(expected)


def test_rounds_are_interleaved_and_ratios_paired(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def named(name: str) -> Any:
        @contextmanager
        def run() -> Iterator[Any]:
            yield lambda: order.append(name)

        return run

    times = runs.interleaved({name: named(name) for name in "abc"}, 2)
    assert "".join(order) == "abcabcabc"
    assert [len(taken) for taken in times.values()] == [2, 2, 2], "the first round warms up"
    assert runs.paired_ratio([1.0, 8.0, 3.0], [2.0, 2.0, 3.0]) == 1.0, "not the ratio of the medians, 1.5"
    assert runs.spread([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5) == pytest.approx(100 / 3)


def test_branches_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    table = branches.measure(full_size.TOY, 1)
    assert list(table["run"]) == [run for run in GUIDED if not run.endswith("none")] * 4
    for row in table.itertuples():
        assert row.expected == pytest.approx(FORMULA[row.model][row.run.startswith("CFG")])
        within = abs(row.ratio / row.expected - 1) <= 0.04
        assert row.holds == (within if row.run.endswith("replay") else None)
    monkeypatch.setattr(branches, "REDUCED", {"dit-xl-2": full_size.TOY["dit-xl-2"]})
    branches.main(["--rounds", "1"])
    assert "0.875" in capsys.readouterr().out


def test_record_table() -> None:
    table = record.measure_time({"sd3.5-large": full_size.TOY["sd3.5-large"]}, 1).set_index("run")
    assert table.loc["keep by hand", "MB"] == pytest.approx(38 * 16 * 32 * 4 / 1e6), "blocks, tokens, width, bytes"
    assert table.loc["record", "holds"] == (table.loc["record", "ratio"] <= 1.08)


def test_tensors_without_memory_are_not_counted() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    before = record.live_megabytes()
    with FakeTensorMode():
        fake = torch.zeros(1000, 1000)
    real = torch.zeros(500, 1000)
    assert record.live_megabytes() - before == pytest.approx(2.0, abs=0.01) and len(fake) == 2 * len(real)


@pytest.fixture(scope="module")
def memory() -> pd.DataFrame:
    return record.measure_memory((2, 6))


def test_a_record_stays_as_large_as_it_is(memory: pd.DataFrame) -> None:
    table = memory.set_index("run")
    assert table.loc["record, 6 prompts", "MB"] == table.loc["record, 2 prompts", "MB"] > 0
    assert table.loc["record, 6 prompts", "holds"]
    # 28 blocks, 4 tokens, width 32
    assert table.loc["keep by hand, 6 prompts", "MB"] == pytest.approx(6 * 28 * 4 * 32 * 4 / 1e6)


def test_all_in_one_table(
    memory: pd.DataFrame, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(branches, "REDUCED", {"sd3": full_size.TOY["sd3"]})
    monkeypatch.setattr(record, "SIZES", {"sd3": full_size.TOY["sd3"]})
    monkeypatch.setattr(record, "measure_memory", lambda: memory)
    worker = pd.DataFrame([{"model": "sleeper", "run": "1 process", "ratio": 0.97, "expected": 0.95, "holds": True}])
    monkeypatch.setattr(runner, "measure", lambda: worker)
    together.main(["--rounds", "1"])
    title, empty, header, *rows = capsys.readouterr().out.splitlines()
    assert "random weights" in title and not empty and header.split()[:3] == ["model", "run", "over"]
    assert len(rows) == 4 + 2 + 4 + 1 and "sleeper" in rows[-1]


def test_frontier_table(capsys: pytest.CaptureFixture[str]) -> None:
    frontier.main(["tiny-dit", "--samples", "2", "--steps", "2"])
    assert "cheap" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------- full size


def full_size_json(path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    status = full_size.main(["--toy", "--out", str(path), "--rounds", "1", *arguments])
    return status, json.loads(path.read_text())


def test_full_size_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, content = full_size_json(tmp_path / "a.json", "--models", "dit-xl-2", "--commit", "abc")
    assert status == 0 and content["complete"] and not content["skipped"]
    assert content["title"] == "random weights: time and memory only" and content["title"] in capsys.readouterr().out
    assert (content["commit"], content["device"], content["torch"]) == ("abc", "cpu", torch.__version__)
    assert [(s["model"], s["compiled"], s["rounds"]) for s in content["stages"]] == [
        ("dit-xl-2", False, 1),
        ("dit-xl-2", True, 1),
    ]
    assert all(stage["output_finite"] for stage in content["stages"])
    assert [row["run"] for row in content["rows"]] == ["plain", "CFG", *GUIDED, "record", "plain", "CFG", *GUIDED]
    rows = {(row["run"], row["compiled"]): row for row in content["rows"]}
    for compiled in (False, True):
        for sharing in ("replay", "fork"):
            row = rows[f"DG {sharing}", compiled]
            assert row["expected"] == pytest.approx(49 / 56)
            # what runs outside the blocks is not shared
            assert row["TFLOP ratio"] == pytest.approx(49 / 56, rel=0.02)
    assert list(tmp_path.iterdir()) == [tmp_path / "a.json"]


def test_full_size_says_what_the_budget_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, content = full_size_json(tmp_path / "a.json", "--budget", "0")
    assert status == 0 and not content["complete"] and content["rows"] == []
    assert [(s["model"], s["compiled"]) for s in content["skipped"]] == [
        (name, compiled) for compiled in (False, True) for name in full_size.WEIGHTS
    ]
    assert "of 0 s were left" in content["skipped"][0]["reason"]
    assert capsys.readouterr().out.count("not measured") == 8


def test_full_size_goes_on_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []

    def failing(name: str, *arguments: Any) -> Any:
        built.append(name)
        if len(built) != 2:
            raise RuntimeError("out of memory")
        return subject(name, *arguments)

    monkeypatch.setattr(full_size, "subject", failing)
    status, content = full_size_json(tmp_path / "a.json", "--models", "sd3", "dit-xl-2")
    assert status == 1 and not content["complete"]
    assert [s["reason"] for s in content["skipped"]] == ["failed: RuntimeError('out of memory')"] * 3
    assert [(stage["model"], stage["compiled"]) for stage in content["stages"]] == [("dit-xl-2", False)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_full_size_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        full_size.main([])
    assert "torch finds no GPU: use --toy" in capsys.readouterr().err
