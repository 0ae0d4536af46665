"""One worker and its failures; the division of work; real pipelines through the runner."""

import errno
import logging
import os
import signal
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dgkit
from dgbook.paper_scale.generate import pipeline as pipelines
from dgbook.paper_scale.generate import run as module
from dgbook.paper_scale.generate.job import Job
from dgbook.paper_scale.generate.pipeline import PipelineSampler, own_device
from dgbook.paper_scale.generate.run import blocks_of, run, share
from dgbook.paper_scale.generate.store import Store, load_images
from dgbook.paper_scale.generate.worker import Worker
from dgkit.errors import DgkitError, LoadError
from dgkit.sampling import generate
from tests.fake_images import Fake, expected, job
from tests.tiny_models import pipeline


class Kept:
    """Makes one `Fake`, and keeps it for questions."""

    def __init__(self) -> None:
        self.fake: Any = None

    def __call__(self, of: Job) -> Fake:
        self.fake = Fake(of)
        return self.fake

    @property
    def calls(self) -> list[list[int]]:
        return self.fake.calls if self.fake else []


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever started the tests: this process is one worker."""
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name)


# Whole runs -----------------------------------------------------------------------------------------------------------


def test_a_run_makes_every_image_in_batches_of_one_shape(tmp_path: Path) -> None:
    made = Kept()
    report = run(job(), tmp_path, sampler=made)
    assert report.complete and (report.expected, report.present, report.failures) == (10, 10, {})
    assert np.array_equal(load_images(tmp_path), expected(job()))
    assert made.calls == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 9, 9]]
    provenance = Store(tmp_path).read(2).provenance  # type: ignore[union-attr]
    assert provenance["batch"] == 4 and provenance["device"] == "fake" and provenance["seconds"] > 0


def test_nothing_is_made_twice(tmp_path: Path) -> None:
    run(job(), tmp_path, sampler=Kept())
    again = Kept()
    assert run(job(), tmp_path, sampler=again).complete
    assert again.fake is None  # not even loaded


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_an_interrupted_run_goes_on(tmp_path: Path, stop: int) -> None:
    class Interrupted(Fake):
        def __call__(self, conditions: Any, seeds: Any) -> Any:
            if len(self.calls) == stop - 1:
                raise KeyboardInterrupt
            return super().__call__(conditions, seeds)

    with pytest.raises(KeyboardInterrupt):
        run(job(), tmp_path, sampler=Interrupted)
    rest = Kept()
    assert run(job(), tmp_path, sampler=rest).complete
    assert len(rest.calls) == 3 - (stop - 1)
    assert np.array_equal(load_images(tmp_path), expected(job()))


def test_a_kill_at_any_step_of_writing(tmp_path: Path) -> None:
    """A process that kills itself before it gives its first, second, ... file its name, until it gets through."""
    killed = 0
    while True:
        folder = tmp_path / str(killed)
        child = os.fork()
        if child == 0:
            _run_and_die(folder, killed + 1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL)
        there = Store(folder).count() if (folder / "manifest.json").exists() else 0
        rest = Kept()
        assert run(job(), folder, sampler=rest).complete
        assert np.array_equal(load_images(folder), expected(job()))
        assert len(rest.calls) == 3 - -(-there // 4)  # finished blocks stay
        assert not list(folder.rglob(".*"))
        if status == 0:
            break
        killed += 1
    assert killed == 5  # manifest, model and three shards


def _run_and_die(folder: Path, call: int) -> None:
    real, count = os.replace, [0]

    def deadly(*arguments: Any) -> None:
        count[0] += 1
        if count[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*arguments)

    os.replace = deadly  # type: ignore[assignment]
    try:
        run(job(), folder, sampler=Fake)
    except BaseException:
        os._exit(3)
    os._exit(0)


def test_a_damaged_shard_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(job(), tmp_path, sampler=Kept())
    path = tmp_path / "shards" / "000001.safetensors"
    path.write_bytes(path.read_bytes()[:-7] + b"damaged")
    again = Kept()
    assert run(job(), tmp_path, sampler=again).complete
    assert again.calls == [[4, 5, 6, 7]]
    assert caplog.text.count("000001.safetensors is damaged") == 1
    assert np.array_equal(load_images(tmp_path), expected(job()))


def test_a_failure_that_is_made_good_is_forgotten(tmp_path: Path) -> None:
    """Killed between its shard and its failures, a worker leaves both."""
    run(job(), tmp_path, sampler=Kept())
    Store(tmp_path).fail(1, {5: "ValueError: from before"})
    assert run(job(), tmp_path, sampler=Kept()).failures == {}


def test_the_default_folder_is_named_by_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "build_dir", lambda: tmp_path)
    report = run(job(), sampler=Kept())
    assert report.folder == tmp_path / "images" / job().name and len(load_images(report.folder)) == 10


def test_a_full_disk_stops_the_run_and_keeps_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, count = os.replace, [0]

    def full(*paths: Any) -> None:
        count[0] += 1
        if count[0] > 3:  # manifest, model and one shard
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*paths)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(DgkitError, match="No space left on device"):
            run(job(), tmp_path, sampler=Kept())
    assert Store(tmp_path).count() == 4 and not list(tmp_path.rglob(".*"))
    rest = Kept()
    assert run(job(), tmp_path, sampler=rest).complete
    assert len(rest.calls) == 2
    assert np.array_equal(load_images(tmp_path), expected(job()))


@pytest.mark.parametrize(("fits", "batch"), [(3, 2), (2, 2), (1, 1)])
def test_out_of_memory_halves_the_batch_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fits: int, batch: int
) -> None:
    hungry, made = job(conditions=[f"oom {fits}"]), Kept()
    assert run(hungry, tmp_path, sampler=made).complete
    assert np.array_equal(load_images(tmp_path), expected(hungry))
    assert {len(call) for call in made.calls} == {2**k for k in range(3) if 2**k >= batch}
    assert len([c for c in made.calls if len(c) > batch]) == (1 if batch == 2 else 2)  # tried once, then remembered
    assert caplog.text.count("out of memory: from block 0 on") == (1 if batch == 2 else 2)
    for block in range(3):
        assert Store(tmp_path).read(block).provenance["batch"] == batch  # type: ignore[union-attr]


def test_halves_of_odd_batches_have_one_shape_too(tmp_path: Path) -> None:
    hungry, made = job(10, 7, conditions=["oom 4"]), Kept()
    assert run(hungry, tmp_path, sampler=made).complete
    assert np.array_equal(load_images(tmp_path), expected(hungry))
    # rows 8 and 9 of the last block, then nothing: its second half holds no image of the job
    assert made.calls == [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3], [4, 5, 6, 6], [7, 8, 9, 9]]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("CUDA out of memory"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
)
def test_every_kind_of_out_of_memory(tmp_path: Path, error: Exception) -> None:
    class Hungry(Fake):
        def __call__(self, conditions: Any, seeds: Any) -> Any:
            if len(seeds) > 2:
                raise error
            return super().__call__(conditions, seeds)

    assert run(job(), tmp_path, sampler=Hungry).complete
    assert np.array_equal(load_images(tmp_path), expected(job()))


def test_no_memory_for_one_image(tmp_path: Path) -> None:
    with pytest.raises(DgkitError, match="not even one image at a time fits into memory"):
        run(job(conditions=["oom 0"]), tmp_path, sampler=Kept())


def test_a_poisoned_prompt_costs_only_its_own_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = [f"word {i}" for i in range(64)]
    poisoned, made = job(64, 32, conditions=[*words[:37], "poison", *words[38:]]), Kept()
    report = run(poisoned, tmp_path, sampler=made)
    assert not report.complete and report.present == 63
    assert report.failures == {37: "ValueError: this prompt is poison"}
    assert "image 37: ValueError: this prompt is poison" in str(report)
    assert "image 37 ('poison') failed" in caplog.text
    assert {len(call) for call in made.calls} == {32}
    assert len(made.calls) == 2 + 2 * 5  # bisected: log2(32) more times two
    store, whole = Store(tmp_path), expected(poisoned)
    for block in range(2):
        shard = store.read(block)
        assert shard and all(np.array_equal(image, whole[i]) for i, image in shard.images.items())

    # a later run tries the failure alone
    again = Kept()
    assert run(poisoned, tmp_path, sampler=again).failures == report.failures
    assert again.calls == [[37] * 32]

    class Cured(Fake):
        def __call__(self, conditions: Any, seeds: Any) -> Any:
            return super().__call__(["cured" for _ in conditions], seeds)

    report = run(poisoned, tmp_path, sampler=Cured)
    assert report.complete and report.failures == {}
    shard = store.read(1)
    assert shard and shard.provenance["earlier"]["batch"] == 32
    kept = load_images(tmp_path)
    assert np.array_equal(np.delete(kept, 37, 0), np.delete(whole, 37, 0))


@pytest.mark.parametrize(
    ("count", "block_size", "failed", "calls"),
    [(1000, 16, 16, 31), (10, 4, 4, 7), (3, 4, 3, 5), (10, 1, 1, 1), (1, 4, 1, 1)],
)
def test_what_fails_whatever_the_image_is_raised(
    tmp_path: Path, count: int, block_size: int, failed: int, calls: int
) -> None:
    made = Kept()
    with pytest.raises(DgkitError, match=f"the first {failed} images all failed, so it is not their prompts: Value"):
        run(job(count, block_size, conditions=["poison"]), tmp_path, sampler=made)
    assert len(made.calls) == calls and Store(tmp_path).failures() == {}


def test_a_pipeline_that_cannot_be_called_so_is_raised_at_once(dit: Path, tmp_path: Path) -> None:
    of = Job(model=str(dit), conditions=[1], count=8, steps=1, call={"heigth": 8})
    with pytest.raises(DgkitError, match="has no argument 'heigth': it takes class_labels"):
        run(of, tmp_path)
    assert Store(tmp_path).failures() == {}


def test_many_known_failures_do_not_stop_the_others(tmp_path: Path) -> None:
    """Retried in a later run, they come first and all fail."""
    words = ["fine"] * 4 + ["poison"] * 12 + ["fine"] * 16
    poisoned = job(32, 4, conditions=words)
    run(poisoned, tmp_path, sampler=Kept())
    (tmp_path / "shards" / "000007.safetensors").unlink()
    report = run(poisoned, tmp_path, sampler=Kept())
    assert report.present == 20 and sorted(report.failures) == list(range(4, 16))


def test_errors_of_dgkit_and_of_the_device_are_nobodys_prompt(tmp_path: Path) -> None:
    made = Kept()
    with pytest.raises(DgkitError, match="steps=0"):
        run(job(conditions=["refuse"]), tmp_path / "a", sampler=made)
    assert len(made.calls) == 1

    class Broken(Fake):
        def __call__(self, conditions: Any, seeds: Any) -> Any:
            self.calls.append(seeds)
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    broken: list[Broken] = []

    def make(of: Job) -> Broken:
        broken.append(Broken(of))
        return broken[0]

    with pytest.raises(RuntimeError, match="device-side assert"):
        run(job(), tmp_path / "b", sampler=make)
    assert len(broken[0].calls) == 1 and Store(tmp_path / "b").failures() == {}


def test_a_sampler_has_to_make_images(tmp_path: Path) -> None:
    class Floats(Fake):
        def __call__(self, conditions: Any, seeds: Any) -> Any:
            return super().__call__(conditions, seeds).astype(np.float32)

    with pytest.raises(DgkitError, match="the sampler made float32"):
        run(job(), tmp_path, sampler=Floats)


def test_another_model_or_other_libraries_are_refused(tmp_path: Path) -> None:
    class Other(Fake):
        def __init__(self, of: Job) -> None:
            super().__init__(of)
            self.identity = {"weights_sha256": {"fake": "1"}}

    run(job(), tmp_path, sampler=Kept())
    (tmp_path / "shards" / "000000.safetensors").unlink()
    with pytest.raises(DgkitError, match="another model: weights_sha256"):
        run(job(), tmp_path, sampler=Other)
    old = replace(job(), versions=dict(job().versions) | {"torch": "1.0"})
    with pytest.raises(DgkitError, match="this job was begun with torch 1.0: install that"):
        Worker(Store.create(tmp_path / "old", old), Fake(old))


@pytest.mark.parametrize(
    "arguments",
    [{"engine": "slurm"}, {"workers": 2}, {"engine": "ray", "workers": 0}, {"engine": "ray", "workers": True}],
)
def test_refused(tmp_path: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(DgkitError, match="is not allowed"):
        run(job(), tmp_path, sampler=Kept(), **arguments)
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"conditions": [10]}, "class=10 is not allowed: give an integer from 0 to 9"),
        ({"conditions": [0, 1, 999]}, "class=999 is not allowed"),
        ({"conditions": ["a shirt"]}, "class='a shirt' is not allowed"),
        ({"call": {"num_images_per_prompt": 2}}, "num_images_per_prompt=2 is not allowed: leave it out"),
        ({"call": {"output_type": "pil"}}, "output_type='pil' is not allowed: leave it out"),
        ({"call": {"guidance_scale": 4}}, "guidance_scale=4 is not allowed: leave it out"),
        ({"call": {"hieght": 28}}, "DiTPipeline has no argument 'hieght': it takes class_labels"),
    ],
)
def test_what_is_wrong_for_every_image_is_refused_before_the_first(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    wrong = job(**{"model": "tiny-dit", "conditions": [0]} | change)
    with pytest.raises(DgkitError, match=words):
        run(wrong, tmp_path)
    assert Store(tmp_path).count() == 0 and not Store(tmp_path).failures()


# Dividing the work ----------------------------------------------------------------------------------------------------


@given(world=st.integers(1, 300), blocks=st.integers(0, 500))
def test_ranks_cover_each_block_once(world: int, blocks: int) -> None:
    parts = [list(blocks_of(rank, world, blocks)) for rank in range(world)]
    assert sorted(block for part in parts for block in part) == list(range(blocks))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def array(index: int, count: int, first: int = 0, step: int = 1) -> dict[str, str]:
    """What Slurm sets in element number `index` of `--array=first-last:step`."""
    ids = [first + step * i for i in range(count)]
    values = {"ID": ids[index], "COUNT": count, "MIN": ids[0], "MAX": ids[-1], "STEP": step}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


@pytest.mark.parametrize(
    ("environment", "result"),
    [
        ({}, (0, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 1)),  # a batch script without srun runs once
        ({"RANK": "2", "WORLD_SIZE": "4"}, (2, 4)),
        ({"RANK": "2", "WORLD_SIZE": "4"} | array(1, 3), (2, 4)),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "8"}, (3, 4)),
        (array(2, 5), (2, 5)),
        (array(2, 5, first=1), (2, 5)),
        (array(2, 5, first=10, step=10), (2, 5)),
        (array(0, 1, first=7), (0, 1)),  # one element submitted again does what is missing
        (array(1, 3) | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, (3, 6)),
    ],
)
def test_the_share_of_this_process(environment: dict[str, str], result: tuple[int, int]) -> None:
    assert share(environment) == result


@given(st.integers(1, 20), st.integers(0, 50), st.integers(1, 7), st.integers(1, 8))
def test_elements_and_tasks_count_every_rank_once(count: int, first: int, step: int, tasks: int) -> None:
    shares = [
        share(array(i, count, first, step) | {"SLURM_PROCID": str(task), "SLURM_STEP_NUM_TASKS": str(tasks)})
        for i in range(count)
        for task in range(tasks)
    ]
    assert sorted(shares) == [(rank, count * tasks) for rank in range(count * tasks)]


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "1"}, "WORLD_SIZE=''"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK='one'"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 of 2"),
        (array(1, 3) | {"SLURM_ARRAY_TASK_MAX": "5"}, "has gaps"),  # --array=0,1,5
        (array(1, 3) | {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_STEP": "2"}, "has gaps"),
    ],
)
def test_a_share_that_makes_no_sense(environment: dict[str, str], words: str) -> None:
    with pytest.raises(DgkitError, match=words):
        share(environment)


@pytest.mark.parametrize(
    "environments", [[{"RANK": str(r), "WORLD_SIZE": "2"} for r in (1, 0)], [array(i, 4) for i in range(4)]]
)
def test_ranks_make_the_same_bytes_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environments: list[Mapping[str, str]]
) -> None:
    calls: list[list[int]] = []
    for environment in environments:
        with monkeypatch.context() as patched:
            for name, value in environment.items():
                patched.setenv(name, value)
            made = Kept()
            report = run(job(), tmp_path, sampler=made)
            calls += made.calls
        assert report.complete == (len(calls) == 3)
    assert sorted(calls) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 9, 9]]
    assert np.array_equal(load_images(tmp_path), expected(job()))


@pytest.mark.parametrize(
    ("environment", "device"),
    [
        ({}, "cuda:0"),
        ({"LOCAL_RANK": "1"}, "cuda:1"),
        ({"SLURM_LOCALID": "5"}, "cuda:1"),
        ({"LOCAL_RANK": "2"}, "cuda:2"),
    ],
)
def test_each_process_takes_its_own_gpu(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert own_device() == device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert own_device() == "cpu"


def test_only_the_first_worker_shows_its_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, shown in (("1", False), ("0", True)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        run(job(), tmp_path, sampler=Kept())
        assert ("images of worker 1 of 2: 100%" in capsys.readouterr().err) == shown


# Real pipelines -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipelines") / "dit"
    pipeline("dit").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def plain(dit: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, np.ndarray]:
    """A run on a real pipeline, undisturbed."""
    of = Job(model=str(dit), conditions=list(range(10)), count=10, block_size=4, steps=2, guidance_scale=3.0, seed=2)
    folder = tmp_path_factory.mktemp("plain")
    assert run(of, folder).complete
    return of, load_images(folder)


def test_a_pipelines_images_are_those_in_memory(plain: tuple[Job, np.ndarray], dit: Path) -> None:
    of, made = plain
    pipe = dgkit.load(str(dit))
    rows = [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 9, 9]
    for batch in rows:
        by_hand = generate(pipe, batch, [2_000_000 + i for i in batch], num_inference_steps=2, guidance_scale=3.0)
        for row, index in enumerate(batch):
            assert np.array_equal(made[index], by_hand[row])
    assert len(np.unique(made.reshape(10, -1), axis=0)) == 10


def test_guidance_reaches_the_pipeline(plain: tuple[Job, np.ndarray], dit: Path, tmp_path: Path) -> None:
    of, unguided = plain
    guided = replace(of, methods={"dg": {"scale": 2.0, "block": 1, "dims": [0, 3]}}, count=4)
    run(guided, tmp_path)
    made = load_images(tmp_path)
    pipe = dgkit.load(str(dit))
    with dgkit.detail_guidance(pipe, scale=2.0, block=1, dims=[0, 3]):
        by_hand = generate(
            pipe, [0, 1, 2, 3], [2_000_000 + i for i in range(4)], num_inference_steps=2, guidance_scale=3.0
        )
    assert np.array_equal(made, by_hand) and not np.array_equal(made, unguided[:4])
    identity = PipelineSampler(guided).identity
    assert identity["methods"]["dg"]["dims"] == [0, 3] and identity["methods"]["dg"]["scale_with_cfg"] == 2.0
    assert set(identity["weights_sha256"]) == {"transformer", "vae"}


@pytest.mark.parametrize("methods", [{}, {"dg": {"scale": 2.0, "block": 0, "dims": [5]}}])
def test_a_disruption_reaches_the_pipeline(
    plain: tuple[Job, np.ndarray], dit: Path, tmp_path: Path, methods: dict[str, Any]
) -> None:
    of, intact = plain
    disrupted = replace(
        of, disruption={"block": 1, "dims": [0, 3], "kind": "random", "seed": 1}, methods=methods, count=4
    )
    run(disrupted, tmp_path)
    made, pipe = load_images(tmp_path), dgkit.load(str(dit))
    with ExitStack() as stack:
        if methods:
            stack.enter_context(dgkit.detail_guidance(pipe, scale=2.0, block=0, dims=[5]))
        edit = stack.enter_context(dgkit.disrupt(pipe, block=1, dims=[0, 3], kind="random", seed=1))
        by_hand = generate(
            pipe, [0, 1, 2, 3], [2_000_000 + i for i in range(4)], num_inference_steps=2, guidance_scale=3.0
        )
    assert np.array_equal(made, by_hand) and not np.array_equal(made, intact[:4])
    identity = PipelineSampler(disrupted).identity
    assert identity["disruption"] == {"block": 1, "dims": edit.dims, "kind": "random", "seed": 1}
    assert "disruption" not in PipelineSampler(of).identity


def test_two_ranks_make_the_bytes_of_one(
    plain: tuple[Job, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of, made = plain
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        run(of, tmp_path)
    assert np.array_equal(load_images(tmp_path), made)


def test_a_poisoned_class_leaves_the_others_bytes(plain: tuple[Job, np.ndarray], tmp_path: Path) -> None:
    class Poisoned(PipelineSampler):
        def __call__(self, conditions: Any, seeds: Any) -> Any:
            if 5 in conditions:
                raise IndexError("class 5 is poison")
            return super().__call__(conditions, seeds)

    of, made = plain
    report = run(of, tmp_path, sampler=Poisoned)
    assert list(report.failures) == [5] and "IndexError" in report.failures[5]
    shards = [Store(tmp_path).read(block) for block in range(3)]
    kept = {i: image for shard in shards if shard for i, image in shard.images.items()}
    assert sorted(kept) == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert all(np.array_equal(image, made[i]) for i, image in kept.items())


def test_across_batch_shapes_values_differ_by_rounding_only(dit: Path, tmp_path: Path) -> None:
    """What the docstring of dgbook.paper_scale.generate.worker says of a small model in float32."""
    of = Job(model=str(dit), conditions=list(range(10)), count=32, block_size=8, steps=4, guidance_scale=3.0)
    whole, single = tmp_path / "8", tmp_path / "1"
    run(of, whole)
    run(replace(of, block_size=1), single)
    difference = np.abs(load_images(whole).astype(int) - load_images(single))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 0.001


def test_an_image_that_is_not_finite_fails(dit: Path, tmp_path: Path) -> None:
    class Overflowing(PipelineSampler):
        def __call__(self, conditions: Any, seeds: Any) -> Any:
            table = self.pipe.transformer.transformer_blocks[0].norm1.emb.class_embedder.embedding_table
            with torch.no_grad():
                table.weight[3] = float("nan")
            return super().__call__(conditions, seeds)

    report = run(
        Job(model=str(dit), conditions=range(8), count=8, block_size=4, steps=1), tmp_path, sampler=Overflowing
    )
    # found by bisection, where it fills the rows of those that are left out
    assert report.failures == {3: "FloatingPointError: 4 of 4 images are not finite: use a wider dtype"}
    assert report.present == 7


def test_changed_weights_are_refused(dit: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    of = Job(model=str(dit), conditions=[1], count=2, block_size=1, steps=1)

    class Retrained(PipelineSampler):
        def __init__(self, of: Job) -> None:
            real = pipelines.identity
            with torch.no_grad(), pytest.MonkeyPatch.context() as patched:

                def changed(pipe: Any, *rest: Any) -> Any:
                    next(pipe.transformer.parameters()).add_(1e-3)
                    return real(pipe, *rest)

                patched.setattr(pipelines, "identity", changed)
                super().__init__(of)

    run(of, tmp_path)
    (tmp_path / "shards" / "000001.safetensors").unlink()
    with caplog.at_level(logging.ERROR), pytest.raises(DgkitError, match="another model: weights_sha256 differ"):
        run(of, tmp_path, sampler=Retrained)
    assert run(of, tmp_path).complete


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    of = Job(model="no-such-model", conditions=["x"], count=1, steps=1)
    with pytest.raises(LoadError, match="no-such-model"):
        run(of, tmp_path)
