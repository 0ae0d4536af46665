"""Real Ray with two local workers: the same bytes, also when workers and driver are killed at random moments.

DGKIT_KILLS says how many kills (`make stress`: 20).
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from dgbook.paper_scale.generate import cluster
from dgbook.paper_scale.generate.job import Job
from dgbook.paper_scale.generate.run import run
from dgbook.paper_scale.generate.store import Store, load_images
from dgkit.errors import DgkitError, LoadError
from tests.fake_images import Fake, expected, job
from tests.tiny_models import pipeline

# not by importing it: dgkit decides before that how Ray is set up
pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'dgkit[cluster]'")

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("DGKIT_KILLS", "2"))
COUNT = 256
PER_BATCH = 0.05 * KILLS  # seconds, for 64 batches on two workers: long enough for all kills


def command_line(process: str) -> bytes:
    try:
        return Path("/proc", process, "cmdline").read_bytes()
    except OSError:  # it has ended
        return b""


class Killable:
    """A run in a process of its own, and what it leaves behind."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder, self.log = folder, log
        log.mkdir(exist_ok=True)
        self.driver: subprocess.Popen[str] | None = None

    def start(self) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "tests.fake_images", self.folder, "ray", str(COUNT), str(PER_BATCH)]
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {
            "FAKE_LOG": str(self.log),
            "FAKE_FOLDER": str(self.folder),
            "PYTHONPATH": str(ROOT),  # so that Ray's workers find the tests
        }
        with open(self.log.with_suffix(".txt"), "a") as output:
            self.driver = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True
            )
        return self.driver

    def workers(self) -> list[int]:
        """Ray's processes that sample, or will, and are alive."""
        return [int(path.name) for path in self.log.iterdir() if command_line(path.name).startswith(b"ray::")]

    def output(self) -> str:
        return self.log.with_suffix(".txt").read_text()


@pytest.fixture
def killable(tmp_path: Path) -> Iterator[Killable]:
    made = Killable(tmp_path / "run", tmp_path / "log")
    yield made
    if made.driver and made.driver.poll() is None:
        made.driver.kill()
        made.driver.wait()


def test_kills_at_random_moments_lose_and_repeat_nothing(killable: Killable) -> None:
    choose, kills = random.Random(), Counter[str]()
    deadline = time.monotonic() + 60 * max(KILLS, 5)
    while True:
        assert time.monotonic() < deadline, killable.output()
        driver = killable.start()
        while driver.poll() is None and sum(kills.values()) < KILLS:
            if not killable.workers():  # Ray is still starting
                time.sleep(0.02)
                continue
            time.sleep(choose.uniform(0, 2))
            # of the two that every test run can afford, one is a worker and one the driver
            victim = ("worker", "driver")[sum(kills.values())] if KILLS == 2 else choose.choice(["driver", "worker"])
            processes = [driver.pid] if victim == "driver" else killable.workers()
            if driver.poll() is None and processes:
                os.kill(choose.choice(processes), signal.SIGKILL)
                kills[victim] += 1
            if victim == "driver":
                driver.wait()
        if driver.wait(timeout=120) == 0:
            break
        assert driver.returncode in (1, -signal.SIGKILL), killable.output()
    assert sum(kills.values()) == KILLS, "all images were there before the last kill"
    undisturbed = expected(job(COUNT, seed=3))
    assert np.array_equal(load_images(killable.folder), undisturbed)
    indices = [i for shard in Store(killable.folder).shards() for i in shard.images]
    assert indices == list(range(COUNT))
    lines = [line.split() for path in killable.log.iterdir() for line in path.read_text().splitlines()]
    assert [index for index, state in lines if state == "again"] == []
    # an image is only made again if its block was under way when something was killed: two blocks at a time
    times = Counter(int(index) for index, _ in lines)
    assert set(times) == set(range(COUNT))
    assert sum(times.values()) - COUNT <= 2 * job().block_size * KILLS
    assert not list(killable.folder.rglob(".*.partial"))
    assert killable.log.with_suffix(".address").read_text() == "127.0.0.1"  # out of reach for other machines


@pytest.fixture(scope="module")
def cluster_here() -> Iterator[None]:
    """A cluster that several runs connect to, one after the other: to start one takes longer than they do."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(ROOT))
        patched.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patched.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        from ray.cluster_utils import Cluster

        started = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 2, "include_dashboard": False, "object_store_memory": 100_000_000},
        )
        patched.setenv("RAY_ADDRESS", started.address)
        yield
        started.shutdown()


def test_a_block_that_ends_its_workers_is_given_up(
    tmp_path: Path, cluster_here: None, caplog: pytest.LogCaptureFixture
) -> None:
    """One block holds a prompt that ends the process; a prompt that only raises is bisected; the others go on."""
    words = [f"word {i}" for i in range(32)]
    words[5], words[30] = "exit", "poison"
    deadly = job(32, conditions=words)
    report = run(deadly, tmp_path, engine="ray", workers=2, sampler=Fake)
    assert not report.complete and report.present == 32 - 4 - 1
    assert sorted(report.failures) == [4, 5, 6, 7, 30]
    assert report.failures[30] == "ValueError: this prompt is poison"
    assert "its block ended its worker 2 times: ActorDiedError" in report.failures[4]
    assert "block 1 ended 2 workers and is given up" in caplog.text
    store, whole = Store(tmp_path), expected(deadly)
    for block in range(deadly.blocks):
        shard = store.read(block)
        assert (shard is None) == (block == 1)
        assert shard is None or all(np.array_equal(image, whole[i]) for i, image in shard.images.items())


def test_a_real_pipeline_makes_the_same_bytes_on_ray(tmp_path: Path, cluster_here: None) -> None:
    pipeline("dit").save_pretrained(tmp_path / "dit")
    of = Job(model=str(tmp_path / "dit"), conditions=range(7), count=7, block_size=4, steps=2, guidance_scale=3.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as Ray gives its workers
    try:
        run(of, tmp_path / "here")
    finally:
        torch.set_num_threads(threads)
    assert run(of, tmp_path / "ray", engine="ray", workers=2).complete
    assert np.array_equal(load_images(tmp_path / "ray"), load_images(tmp_path / "here"))
    assert (tmp_path / "ray" / "model.json").read_text() == (tmp_path / "here" / "model.json").read_text()


def test_bad_input_found_by_a_worker_is_raised_as_it_was() -> None:
    """Ray wraps what a worker raises; what dgkit raised on purpose comes out again, anything else is a reason."""
    from ray.exceptions import RayTaskError

    def wrapped(error: Exception) -> Exception:
        return RayTaskError("run", "Traceback ...", error).as_instanceof_cause()

    with pytest.raises(LoadError, match="^no such model$"):
        cluster._reason(wrapped(LoadError("no such model")))
    assert cluster._reason(wrapped(RuntimeError("CUDA error: bad\nmore"))) == "RuntimeError: CUDA error: bad"


def test_a_cluster_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(DgkitError, match="Ray does not answer at nonsense .*RAY_AUTH_MODE=token"):
        run(job(), tmp_path, engine="ray", sampler=Fake)


def test_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DgkitError, match='engine="ray" needs Ray: pip install "dgkit\\[cluster\\]"'):
        run(job(), tmp_path, engine="ray", sampler=Fake)
