"""Where massive activations are and what sets their size: hooks put in by hand, and values made up for the answer."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from dgbook.chapters import layers, sampling, timesteps
from dgbook.measures.stats import Interval
from dgkit.errors import DgkitError
from dgkit.massive import Massive
from tests.dgbook.chapter_examples import BLOCK, CHANNELS


class FakeTrace:
    """A trace whose tracked values (timesteps, images), gates (G, C) and mean |z| (L, C) are given."""

    def __init__(self, values=None, *, mean_abs=None, gates=None, token_share=None, timesteps=(900.0, 500.0, 100.0)):
        values = np.zeros((3, 2)) if values is None else values
        self.track = [7, 9]
        # at block 1 alone the first tracked dim holds the values, the second the same halved
        self.values = np.random.default_rng(3).uniform(size=(*values.shape, 2, 2))
        self.values[:, :, 1, 0], self.values[:, :, 1, 1] = values, values / 2
        self.mean, self.alpha, self.share = mean_abs, gates, token_share
        self.gate_rows = [(0, "msa"), (0, "mlp"), (1, "msa")]
        self.anatomy = SimpleNamespace(channels=4)
        self.steps = list(timesteps)

    def tracked(self):
        return torch.from_numpy(self.values)

    def num_gates_seen(self, label=None, timestep=None):
        return len(self.gate_rows)

    def timesteps(self):
        return self.steps

    def mean_abs(self, label=None):
        return self.mean

    def max_abs(self):
        return self.mean

    def energy_share(self):
        return self.mean**2 / (self.mean**2).sum(1, keepdim=True)

    def token_share(self):
        return self.share

    def gates(self, label=None, timestep=None, absolute=True):
        return self.alpha


TIME = np.array([1.0, 2.0, 4.0])[:, None]  # at each of three timesteps
CLASS = np.array([1.0, 1.0, 2.0, 2.0, 5.0, 5.0])  # of each of six images
CONDITIONS = [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("dim", [7, 9])
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (TIME + 0 * CLASS, {"timestep": 1, "condition": 0, "noise": 0, "residual": 0}),
        (0 * TIME + CLASS, {"timestep": 0, "condition": 1, "noise": 0, "residual": 0}),
        # variances 14/9 of (1, 2, 4) and 26/9 of (1, 2, 5)
        (TIME + CLASS, {"timestep": 14 / 40, "condition": 26 / 40, "noise": 0, "residual": 0}),
        (0 * TIME + np.array([1, 2, 1, 2, 1, 2]), {"timestep": 0, "condition": -2 / 3, "noise": 5 / 3, "residual": 0}),
    ],
)
def test_timestep_shares_of_constructed_values(values, expected, dim):
    shares = timesteps.timestep_shares(FakeTrace(values), CONDITIONS, block=1)[dim]
    assert {part: interval.value for part, interval in shares.items()} == pytest.approx(expected, abs=1e-12)


def test_a_class_of_one_image_is_not_told_from_its_image():
    for conditions in (list(range(6)), [0] * 6, [0, 0, 0, 1, 1, 2]):
        shares = timesteps.timestep_shares(FakeTrace(TIME + CLASS), conditions, block=1)[7]
        assert {part: interval.value for part, interval in shares.items()} == pytest.approx(
            {"timestep": 14 / 40, "condition and noise": 26 / 40, "residual": 0}, abs=1e-12
        )


def test_timestep_values():
    mean_abs = torch.tensor([[1.0, 2, 3, 4], [4, 3, 2, 1]])
    gates = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1], [0.2, 0.3, 0.1, 0.05]])
    trace = FakeTrace(TIME * CLASS, mean_abs=mean_abs, gates=gates)
    values = timesteps.timestep_values(trace, CONDITIONS, block=1)
    assert values["dim"] == 7 and values["timesteps"] == [900.0, 500.0, 100.0]
    assert values["magnitude_by_timestep"] == pytest.approx([16 / 6, 32 / 6, 64 / 6])
    assert values["trend"] == Interval(4.0, 4.0, 4.0)  # of every image
    assert (values["gates"]["count"], values["gates"]["same_largest"]) == (3, 1)
    # ranks: equal (1); reversed (-1); 3 4 2 1 against 4 3 2 1: 1 - 6 * 2 / (4 * 15) = 0.8
    assert values["gates"]["rank_correlation"] == pytest.approx(0.8)
    shares = timesteps.timestep_shares(trace, CONDITIONS, block=1)[7]
    assert values["share"] == {"timestep": shares["timestep"], "condition": shares["condition"]}
    alone = timesteps.timestep_values(trace, list(range(6)), block=1)
    together = shares["condition"].value + shares["noise"].value
    assert alone["share"].keys() == {"timestep", "condition_and_noise"}
    assert alone["share"]["condition_and_noise"].value == pytest.approx(together)


def test_tracked_values_are_those_of_a_hand_hook(pipe, run):
    seen = []

    def hook(module, args, output):
        seen.append(output.abs().mean(1)[:, 7].numpy())

    handle = pipe.transformer.transformer_blocks[BLOCK].register_forward_hook(hook)
    trace = sampling.observe(pipe, run, track=[7])
    handle.remove()
    assert np.allclose(trace.tracked()[:, :, BLOCK, 0], seen, rtol=1e-6)


def test_layer_values():
    mean_abs = torch.tensor([[1.0, 1, 2, 60], [2.0, 2, 2, 40]])
    share = torch.tensor([[0.0, 0, 0, 0.75], [0, 0, 0, 0.5]])
    rows = pd.DataFrame({"block": [0, 1], "dim": [3, 3], "ratio": [40.0, 20.0]})
    values = layers.layer_values(FakeTrace(mean_abs=mean_abs, token_share=share), Massive("", 2, rows), 5.0)
    assert values["blocks"] == values["blocks_with_massive"] == 2 and values["threshold"] == 5.0
    assert values["massive_dims"] == [3]
    expected = {"block": 0, "dim": 3, "ratio": pytest.approx(40), "token_share": 0.75}  # median 1.5
    assert values["largest"] == expected | {"energy": pytest.approx(3600 / 3606), "max_abs": 60}
    assert values["over"].tolist() == [[t, 2] for t in layers.THRESHOLDS]
    assert values["largest_ratio_by_block"].tolist() == pytest.approx([40, 20])
    assert torch.equal(values["mean_abs"], mean_abs)


def test_fixed_channels_are_counted_over_blocks_steps_tokens_and_images(pipe, run):
    counts = np.zeros(CHANNELS, int)

    def hook(module, args, output):
        counts[:] += np.bincount(output.abs().argmax(-1).flatten().numpy(), minlength=CHANNELS)

    handles = [block.register_forward_hook(hook) for block in pipe.transformer.transformer_blocks]
    for i in range(2):
        one = sampling.Samples(run.conditions[i : i + 1], run.seeds[i : i + 1], 3)
        one.images(pipe)
    for handle in handles:
        handle.remove()
    fixed = layers.fixed_channels(pipe, run, images=2, steps=3, count=2)["fixed"]
    assert sorted(counts[fixed["channels"]]) == sorted(counts)[-2:]
    assert fixed["share"] == pytest.approx(sum(sorted(counts)[-2:]) / counts.sum())


def test_arrays_of_timesteps_and_gates():
    """Of two gates z's largest channel has the largest alpha of four, of one the smallest."""
    alpha = torch.tensor([[1.0, 2, 3, 9], [4, 3, 9, 1], [2, 8, 1, 3]])  # gates of blocks 0, 0, 1
    mean_abs = torch.tensor([[1.0, 1, 1, 5], [1, 5, 1, 1]])  # largest: 3 and 1
    values = TIME * CLASS
    trace = FakeTrace(values, mean_abs=mean_abs, gates=alpha)
    arrays = timesteps.timestep_arrays(trace, CONDITIONS, 1)
    assert arrays["gates.percentile"].tolist() == [1, 0, 1]
    assert arrays["magnitude.by_timestep"] == pytest.approx(values)
    assert arrays["magnitude.trend"] == pytest.approx(2)  # of classes from the middle on
    words = timesteps.timestep_arrays(trace, [*"aabbcc"], 1)
    assert words["magnitude.trend"] == pytest.approx(4) and words["magnitude.condition"].tolist() == CONDITIONS
    expected = [np.mean([row[p[c]] for row, c in zip(alpha.argsort(1).argsort(1) / 3, (3, 3, 1), strict=True)])
                for p in itertools.permutations(range(4))]  # fmt: skip
    assert np.mean(arrays["gates.permuted"]) == pytest.approx(np.mean(expected), abs=0.05)
    assert set(np.round(arrays["gates.permuted"], 3)) <= set(np.round(np.array(expected, float), 3))


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_token_maps_equal_tensors_kept_by_hand(pipe, guidance_scale):
    run = sampling.samples(pipe, 3, seed=5, steps=4, guidance_scale=guidance_scale)
    seen = []
    block = pipe.transformer.transformer_blocks[BLOCK]
    handle = block.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    run.first(2).images(pipe)
    handle.remove()
    maps, timesteps = layers.token_maps(pipe, run, BLOCK, 7, count=2)
    assert timesteps == sorted(timesteps, reverse=True) and len(set(timesteps)) == 3 == len(maps)
    for shown, output in zip(maps, (seen[0], seen[2], seen[3]), strict=True):
        conditional = output[:2]  # the first half of a DiT batch
        assert np.array_equal(shown, conditional[..., 7].abs().reshape(2, 4, 4).numpy())


def test_token_maps_refuse_tokens_that_form_no_square(monkeypatch, pipe, run):
    fake = SimpleNamespace(timesteps=lambda: [1.0], tensors=lambda block, timestep: torch.zeros(1, 12, CHANNELS))
    monkeypatch.setattr(layers, "observe", lambda *args, **kwargs: fake)
    with pytest.raises(DgkitError, match="12 image tokens"):
        layers.token_maps(pipe, run, BLOCK, 7)


def test_training_history(monkeypatch, tmp_path):
    (tmp_path / "models" / "m").mkdir(parents=True)
    rows = [{"step": 5, "ratio": [2.0, 3.0], "dim": [1, 7]}, {"step": 9, "ratio": [4.0, 8.5], "dim": [1, 1]}]
    (tmp_path / "models" / "m" / "quality.json").write_text(json.dumps({"massive": rows}))
    monkeypatch.setattr(layers, "DATA", tmp_path)
    history = layers.training_history("m")
    assert history.to_numpy().tolist() == [[5, 0, 2, 1], [5, 1, 3, 7], [9, 0, 4, 1], [9, 1, 8.5, 1]]
    assert layers.training_history("other").empty
    assert list(layers.training_history("other").columns) == ["step", "block", "ratio", "dim"]
