"""The runner's benchmark counts what it says: time slept over the time that each worker had."""

import os
from pathlib import Path

import numpy as np
import pytest

from benchmarks import runner
from dgbook.paper_scale.generate.store import Shard, Store


def test_efficiency_is_of_each_workers_own_time(tmp_path: Path) -> None:
    """Two workers, the second starts 100 s later; each has 4 blocks and takes 0.05 s more per block than it sleeps."""
    of = runner.sleepy(8)
    store = Store.create(tmp_path, of)
    for block in range(8):
        worker, turn = block % 2, block // 2
        started = 1e9 + 100 * worker + turn * (runner.SECONDS + 0.05)
        image = np.zeros((1, 1, 3), np.uint8)
        store.write(block, Shard(dict.fromkeys(of.block(block), image), {"started": started, "process": worker}))
        ended = started + runner.SECONDS + 0.05
        os.utime(tmp_path / "shards" / f"{block:06d}.safetensors", (ended, ended))
    assert runner.efficiency(tmp_path) == pytest.approx(runner.SECONDS / (runner.SECONDS + 0.05), rel=1e-4)
