"""What a table costs: work against independent counts of FLOPs, hours by hand, and the words that are printed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dgkit
from benchmarks.full_size import main as measure_full_size
from benchmarks.models import Size, subject
from benchmarks.runs import guided, plain
from dgbook import cli
from dgbook.paper_scale import plan, protocol
from dgbook.paper_scale.row import Row, block_evaluations
from dgbook.paper_scale.scores.weights import WEIGHTS
from dgkit import loading, memory, zoo
from dgkit.errors import DgkitError
from dgkit.sampling import generate

LARGE = ("sd3", "sd3.5-large", "flux-dev", "dit-xl-2")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No timings, nothing downloaded, whatever this machine has; timings may be put into the folder."""
    (tmp_path / "benchmarks").mkdir()
    monkeypatch.setattr(plan, "CHECKOUT", tmp_path)
    monkeypatch.setattr(plan, "local", lambda item: None)
    monkeypatch.setattr(loading, "cached", lambda repo, revision: False)
    return tmp_path / "benchmarks"


# ---------------------------------------------------------------------------------------------------------------- FLOPs


@pytest.mark.parametrize("name", LARGE)
def test_flops_are_those_that_torch_counts_on_the_real_architecture(name: str) -> None:
    built, row = subject(name, device="meta", dtype=torch.bfloat16), zoo.MODELS[name]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        built.model(**built.cond)
    assert row.blocks * plan.block_flops(row) == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("name", ["tiny-dit", "tiny-sd3", "tiny-flux"])
def test_flops_of_the_embedded_models(name: str) -> None:
    """In all of a sampling run; here embeddings and modulation are not negligible."""
    pipe, row = dgkit.load(name), zoo.MODELS[name]
    counted: list[int] = []
    forward = pipe.transformer.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            output = forward(*args, **kwargs)
        counted.append(counter.get_total_flops())
        return output

    pipe.transformer.forward = counting
    generate(pipe, [0] if name == "tiny-dit" else ["a floor"], [0], num_inference_steps=2)
    assert len(counted) == 2
    assert row.blocks * plan.block_flops(row) == pytest.approx(counted[0], rel=0.08)


@pytest.mark.parametrize("name", ["sd3", "dit-xl-2"])
@pytest.mark.parametrize("guidance", ["plain", "CFG", "DG", "CFG+DG"])
def test_work_of_a_guided_step_is_that_of_its_block_evaluations(name: str, guidance: str) -> None:
    """At the real depth and reduced width."""
    size = Size(heads=4, head_dim=32, side=16, text=32 if name == "sd3" else 0, embedding=64)
    built, row = subject(name, size), zoo.MODELS[name]
    run = guided(built, guidance, "replay") if "DG" in guidance else plain(built, guidance)
    with torch.no_grad(), run() as step, FlopCounterMode(display=False) as counter:
        step()
    dg = {"dg": {"block": row.preset.block}} if "DG" in guidance else {}
    one = replace(
        protocol.rows("table6" if name == "dit-xl-2" else "table1", name)[0], count=1, steps=1, seed_blocks=1,
        guidance_scale=4.0 if "CFG" in guidance else 1.0, methods=dg,
    )  # fmt: skip
    reduced = replace(row, channels=128, tokens=16**2 + size.text)
    evaluations = block_evaluations(one)
    assert evaluations * plan.block_flops(reduced) == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_what_is_left_out_is_as_small_as_it_says() -> None:
    """Encoding with T5 and decoding, of the cheapest row: SD3 without guidance, 28 steps."""
    import transformers
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, **blocks)
        vae.decode(torch.empty(1, 16, 128, 128))
        config = transformers.T5Config(
            vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
            feed_forward_proj="gated-gelu", is_encoder_decoder=False,
        )  # fmt: skip
        transformers.T5EncoderModel(config)(torch.zeros(1, 256, dtype=torch.long))
    row = zoo.MODELS["sd3"]
    share = counter.get_total_flops() / (28 * row.blocks * plan.block_flops(row))
    assert 0.04 < share < 0.06


# ---------------------------------------------------------------------------------------------------------------- hours


def row(table: str, label: str) -> Row:
    return next(found for found in protocol.rows(table) if found.label == label)


def test_hours_from_flops_by_hand() -> None:
    """SD3.5-Large, CFG + DG: 38 blocks twice, and 18 after block 19; 31.1 TFLOP per pass of 38 blocks."""
    found = row("table1", "SD3.5 CFG + DG")
    assert block_evaluations(found) == 500 * 28 * (38 + 38 + 18)
    seconds = 500 * 28 * (94 / 38) * 31.14e12 / (0.4 * 989e12)
    assert plan.gpu_hours(found, None) == pytest.approx(seconds / 3600, rel=1e-3)


TIMES = {"plain": 100.0, "CFG": 190.0, "DG replay": 150.0, "CFG+DG replay": 240.0, "record": 104.0}


def write(path: Path, **changes: Any) -> None:
    """A JSON as `benchmarks.full_size` writes it, of SD3.5-Large."""
    rows = [
        {"model": "sd3.5-large", "compiled": compiled, "run": run, "ms": ms / (2 if compiled else 1)}
        for run, ms in TIMES.items()
        for compiled in (False, True)
    ]
    facts = {"toy": False, "device": "NVIDIA H100 80GB HBM3", "date": "2026-01-01T00:00:00+00:00", "rows": rows}
    path.write_text(json.dumps(facts | changes))


def test_hours_from_measured_times(alone: Path) -> None:
    write(alone / "full_size.json")
    write(alone / "older.json", date="2025-01-01T00:00:00+00:00", device="older")
    write(alone / "toy.json", toy=True, date="2027-01-01T00:00:00+00:00", device="toy")
    (alone / "other.json").write_text("{}")
    measured = plan.timing("sd3.5-large")
    assert measured == plan.Timing("NVIDIA H100 80GB HBM3", "full_size.json", TIMES)
    assert plan.timing("sd3") is None
    expected = {"SD3.5 Cond": 100, "SD3.5 Cond + DG": 150, "SD3.5 CFG": 190, "SD3.5 CFG + DG": 240}
    for label, ms in expected.items():
        assert plan.gpu_hours(row("table1", label), measured) == pytest.approx(500 * 28 * ms / 3.6e6)
    made = plan.plan("table1", "sd3.5-large")
    assert made.gpu_hours == pytest.approx(500 * 28 * sum(expected.values()) / 3.6e6)
    assert "measured on NVIDIA H100 80GB HBM3, one image at a time (benchmarks/full_size.json)" in str(made)


def test_measured_times_move_with_the_depth() -> None:
    """Measured at the preset's block 19, asked for at block 9: 28 blocks after it instead of 18."""
    found = row("table1", "SD3.5 Cond + DG")
    deeper = replace(found, methods={"dg": {**found.methods["dg"], "block": 9}})
    hours = plan.gpu_hours(deeper, plan.Timing("", "", TIMES))
    assert hours == pytest.approx(500 * 28 * 150 * (38 + 28) / (38 + 18) / 3.6e6)


def test_the_json_of_the_benchmark_is_understood(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the script writes it, but for its word that it was only tried; the budget leaves no time for compiling."""
    path = alone / "full_size.json"
    assert (
        measure_full_size(["--toy", "--out", str(path), "--rounds", "1", "--models", "dit-xl-2", "--budget", "50"]) == 0
    )
    content = json.loads(path.read_text())
    assert plan.timing("dit-xl-2") is None
    path.write_text(json.dumps(content | {"toy": False}))
    found = plan.timing("dit-xl-2")
    assert found is not None and set(TIMES) <= set(found.milliseconds) and found.device == "cpu"


def test_images_that_rows_share_are_counted_once() -> None:
    """Fig. 8's m = 6 and w = 1 are one setting: 27 sets of images for 28 rows."""
    made = plan.plan("fig8")
    assert len(made.work) == 28
    assert made.images_gb == pytest.approx(27 * 500 * 3 * 1024**2 / 1e9)
    again = next(work for work in made.work if work.row.label == "DG, w = 1")
    assert made.gpu_hours == pytest.approx(sum(work.gpu_hours for work in made.work) - again.gpu_hours)
    total = next(line for line in str(made).splitlines() if line.startswith("all")).split()
    assert total[:5] == ["all,", "shared", "rows", "once", "13,500"]
    evaluations = sum(work.block_evaluations for work in made.work) - again.block_evaluations
    assert total[5] == f"{evaluations:,}"


# ------------------------------------------------------------------------------------------------------------- the rest


@pytest.mark.parametrize("table", protocol.TABLES)
def test_every_table_has_a_plan(table: str) -> None:
    rows, made = protocol.rows(table), plan.plan(table)
    assert [work.row for work in made.work] == rows
    assert sum(work.images for work in made.work) == sum(found.count * found.seed_blocks for found in rows)
    models = {found.model for found in rows}
    assert made.basis.keys() == models
    for name in models:
        assert f"{name} ({zoo.MODELS[name].source})" in {item.name for item in made.items}
    assert made.gpu_hours > 0 and str(made)


def test_downloads_and_licences_of_table_1(monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan.plan("table1", "sd3.5-large")
    sizes = {item.name.split(" ")[0]: item.gigabytes for item in made.items}
    assert sizes == {
        "sd3.5-large": 27.6,
        **{
            name: WEIGHTS[name].gigabytes
            for name in ("clip-vit-large-patch14", "blip-itm-large-coco", "hpsv2.1", "laion-aesthetics")
        },
    }
    assert made.download_gb == pytest.approx(sum(sizes.values()))
    assert made.images_gb == pytest.approx(4 * 500 * 3 * 1024**2 / 1e9)
    pickles = sizes["hpsv2.1"] + sizes["laion-aesthetics"]  # kept a second time as safetensors
    assert made.disk_gb == pytest.approx(made.download_gb + made.images_gb + pickles)
    text = str(made)
    page = "https://huggingface.co/stabilityai/stable-diffusion-3.5-large"
    assert f"Stability AI Community (accept it at {page}, then `hf auth login`)" in text
    monkeypatch.setattr(loading, "cached", lambda repo, revision: repo.endswith("3.5-large"))
    again = plan.plan("table1", "sd3.5-large")
    assert again.download_gb == pytest.approx(made.download_gb - 27.6) and "3.5-large) (here)" in str(again)


def test_table_6_needs_inception_and_its_reference_and_says_what_the_paper_lacks() -> None:
    made = plan.plan("table6")
    assert [item.name.split(" ")[0] for item in made.items] == [
        "dit-xl-2", "inception-2015-12-05", "imagenet-256-reference"
    ]  # fmt: skip
    assert "not stated by the paper, to be given to `dgkit reproduce`: --dims and --scale" in str(made)


def test_memory_names_each_gpu_and_the_way() -> None:
    assert plan.memory(zoo.MODELS["sd3.5-large"]) == (
        "27.6 GB of weights; one image takes about 20 of 24 GB part by part, 32 of 48 GB as a whole, "
        "32 of 80 GB as a whole"
    )
    assert "4 of 24 GB block by block, 38 of 48 GB as a whole" in plan.memory(zoo.MODELS["flux-dev"])


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "table1", "--model", "sd3.5-large"]) == 0
    assert capsys.readouterr().out == f"{plan.plan('table1', 'sd3.5-large')}\n"
    assert cli.main(["plan", "table4"]) == 2
    assert "table='table4' is not allowed" in capsys.readouterr().err
    with pytest.raises(DgkitError, match="model='flux-dev' is not in table1"):
        plan.plan("table1", "flux-dev")


def test_the_book_shows_what_is_printed() -> None:
    text = (Path(__file__).parents[2] / "book" / "rerun.md").read_text()
    shown = text.partition("dgkit plan table1 --model sd3.5-large\n```\n\n```text\n")[2].partition("\n```")[0]
    assert shown == str(plan.plan("table1", "sd3.5-large"))
    cells = [
        [cell.strip(" `") for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")
    ]
    downloads = {line[0]: line for line in cells if len(line) == 4 and line[2].endswith("GB")}
    placed = {
        name: line for line in cells if line[1] in plan._WAYS or " by " in line[1] for name in line[0].split("`, `")
    }
    large = {name: row for name, row in zoo.MODELS.items() if row.source}
    assert downloads.keys() == placed.keys() == large.keys()
    words = {"whole": "whole", "parts": "part by part", "blocks": "block by block"}
    for name, row in large.items():
        assert (
            downloads[name][2] == f"{row.download_gb} GB" and str(row.source).rpartition("/")[2] in downloads[name][1]
        )
        ways = [memory.placement(row.weights_gb, row.largest_gb, free) for free in plan.GPUS_GB.values()]
        assert placed[name][1:] == [words[str(way)] for way in ways]
