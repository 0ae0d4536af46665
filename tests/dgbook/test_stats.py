"""Intervals and shares of variance against scipy, hand formulas and simulated coverage."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, norm, ttest_1samp

from dgbook.measures import stats
from dgbook.measures.stats import (
    Interval,
    bootstrap,
    holm,
    p_value,
    paired_bootstrap,
    rank_p_value,
    variance_explained,
    wilson,
    win_probability,
)
from dgkit.errors import DgkitError


def test_interval_prints_value_and_bounds():
    interval = Interval(0.1234, 0.1009, 0.14)
    assert str(interval) == "0.123 [0.101, 0.140]"
    assert f"{interval:.1f}" == "0.1 [0.1, 0.1]"


def test_bootstrap_of_a_mean_approaches_the_normal_interval():
    sample = np.random.default_rng(1).normal(3, 2, 400)
    interval = bootstrap(sample)
    half = norm.ppf(0.975) * sample.std() / np.sqrt(len(sample))
    assert interval.value == pytest.approx(sample.mean(), abs=1e-12)
    assert interval.low == pytest.approx(sample.mean() - half, abs=0.05 * half)
    assert interval.high == pytest.approx(sample.mean() + half, abs=0.05 * half)


def test_bootstrap_of_a_median_is_that_of_resampled_medians():
    sample = np.array([1.0, 2.0, 3.0, 4.0, 100.0])
    draws = np.random.default_rng(5).choice(sample, (40_000, 5))
    interval = bootstrap(sample, "median")
    assert interval.value == 3
    assert [interval.low, interval.high] == np.quantile(np.median(draws, axis=1), [0.025, 0.975]).tolist()


def test_paired_bootstrap_covers_the_true_difference(monkeypatch):
    monkeypatch.setattr(stats, "RESAMPLES", 500)
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        image = generator.normal(0, 10, 40)  # shared by both methods: pairing removes it
        interval = paired_bootstrap(image + 0.5 + generator.normal(0, 1, 40), image)
        covered += interval.low <= 0.5 <= interval.high
    assert binomtest(covered, 300, 0.94).pvalue > 0.001  # percentile intervals of 40 values cover about 94 %


def test_a_mean_of_zeros_and_ones_is_a_share_and_of_others_is_not():
    for wins in (0, 3, 8):
        expected = binomtest(wins, 8).proportion_ci(method="wilson")
        interval = stats.mean(np.arange(8) < wins)
        assert (interval.value, interval.low, interval.high) == pytest.approx((wins / 8, expected.low, expected.high))
    assert stats.mean([0, 0.5, 1]) == bootstrap([0, 0.5, 1])


def test_pairing_is_by_position():
    a = np.arange(10.0)
    assert paired_bootstrap(a + 1, a) == Interval(1, 1, 1)
    assert paired_bootstrap(a + 1, a[::-1]).high > 2


def test_same_call_gives_the_same_interval():
    sample = np.random.default_rng(3).normal(size=24)
    assert bootstrap(sample) == bootstrap(sample)


def test_win_probability_counts_ties_half():
    interval = win_probability([1, 2, 3, 4], [0, 2, 5, 1])
    assert interval.value == (1 + 0.5 + 0 + 1) / 4
    assert interval.low < interval.value < interval.high


@pytest.mark.parametrize(("shift", "wins"), [(1, 24), (-1, 0), (0, 12)])
def test_win_probability_does_not_claim_certainty_when_all_pairs_agree(shift, wins):
    a = np.arange(24.0)
    expected = binomtest(wins, 24).proportion_ci(method="wilson")
    interval = win_probability(a + shift, a)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("wins", "n"), [(0, 5), (3, 10), (10, 10), (871, 1000)])
def test_wilson_is_scipys(wins, n):
    expected = binomtest(wins, n).proportion_ci(method="wilson")
    interval = wilson(wins, n)
    assert (interval.value, interval.low, interval.high) == pytest.approx((wins / n, expected.low, expected.high))


def test_variance_shares_of_a_table_worked_by_hand():
    # grand mean 4, image means 2 and 6, timestep means 3, 4, 5:
    # total 9+4+1+1+4+9 = 28, images 3*(4+4) = 24, timesteps 2*(1+0+1) = 4, rest 0
    shares = variance_explained([[1, 2, 3], [5, 6, 7]])
    assert shares["image"].value == pytest.approx(24 / 28)
    assert shares["timestep"].value == pytest.approx(4 / 28)
    assert shares["residual"].value == pytest.approx(0, abs=1e-12)


def shares_by_loops(table, labels):
    """The sums of squares written out."""
    grand = table.mean()
    parts = dict.fromkeys(("timestep", "class", "image", "residual"), 0.0)
    for i, row in enumerate(table):
        class_mean = table[labels == labels[i]].mean()
        for t, value in enumerate(row):
            timestep_mean = table[:, t].mean()
            parts["timestep"] += (timestep_mean - grand) ** 2
            parts["class"] += (class_mean - grand) ** 2
            parts["image"] += (row.mean() - class_mean) ** 2
            parts["residual"] += (value - timestep_mean - row.mean() + grand) ** 2
    total = ((table - grand) ** 2).sum()
    classes = len(np.unique(labels))
    chance = (classes - 1) * parts["image"] / (len(table) - classes)  # (classes - 1) x the mean square within classes
    parts["class"], parts["image"] = parts["class"] - chance, parts["image"] + chance
    return {name: part / total for name, part in parts.items()}


def test_class_shares_and_their_intervals_are_those_of_written_out_resamples(monkeypatch):
    generator = np.random.default_rng(2)
    labels = np.repeat([3, 7, 8], [4, 5, 6])
    table = 100 + labels[:, None] / 2 + generator.normal(0, 1, (15, 1)) + np.arange(4) + generator.normal(0, 1, (15, 4))
    shares = variance_explained(table, labels)
    assert {name: share.value for name, share in shares.items()} == pytest.approx(shares_by_loops(table, labels))
    assert sum(share.value for share in shares.values()) == pytest.approx(1)

    resampled = []
    for _ in range(1000):
        rows = np.concatenate([generator.choice(np.flatnonzero(labels == label), (labels == label).sum())
                               for label in (3, 7, 8)])  # fmt: skip
        resampled.append(shares_by_loops(table[rows], labels[rows]))
    for name, share in shares.items():
        low, high = np.quantile([shares[name] for shares in resampled], [0.025, 0.975])
        assert (share.low, share.high) == pytest.approx((low, high), abs=0.03)


def test_intervals_over_sampled_labels_are_those_of_written_out_resamples():
    generator = np.random.default_rng(5)
    labels = np.repeat(np.arange(12), 2)
    effect = generator.normal(0, 1, 12)[labels][:, None]
    table = effect + generator.normal(0, 1, (24, 1)) + np.arange(4) + generator.normal(0, 1, (24, 4))
    shares = variance_explained(table, labels, sampled_labels=True)
    assert {name: share.value for name, share in shares.items()} == pytest.approx(shares_by_loops(table, labels))
    resampled = []
    for _ in range(1000):
        drawn = generator.integers(12, size=12)
        rows = np.concatenate([np.flatnonzero(labels == label) for label in drawn])
        resampled.append(shares_by_loops(table[rows], np.repeat(np.arange(12), 2)))
    for name, share in shares.items():
        low, high = np.quantile([shares[name] for shares in resampled], [0.025, 0.975])
        assert (share.low, share.high) == pytest.approx((low, high), abs=0.03)


def test_classes_that_mean_nothing_explain_nothing_on_average():
    generator = np.random.default_rng(6)
    shares = [
        variance_explained(generator.normal(size=(40, 1)) + np.arange(3) + 0.0, np.repeat(np.arange(20), 2))["class"]
        for _ in range(60)
    ]
    values = np.array([share.value for share in shares])
    assert abs(values.mean()) < 3 * values.std() / len(values) ** 0.5
    assert (values < 0).any()


def test_without_labels_the_image_share_is_class_and_image_together():
    generator = np.random.default_rng(4)
    table, labels = generator.normal(size=(12, 5)), np.repeat([0, 1], 6)
    plain, split = variance_explained(table), variance_explained(table, labels)
    assert list(plain) == ["timestep", "image", "residual"]
    assert list(split) == ["timestep", "class", "image", "residual"]
    assert plain["image"].value == pytest.approx(split["class"].value + split["image"].value)


@pytest.mark.parametrize(
    "call",
    [
        lambda: bootstrap([1.0]),
        lambda: bootstrap([[1.0, 2.0], [3.0, 4.0]]),
        lambda: bootstrap([1.0, np.nan]),
        lambda: bootstrap([1.0, 2.0], "mode"),
        lambda: stats.mean([1.0]),
        lambda: paired_bootstrap([1.0, 2.0], [1.0, 2.0, 3.0]),
        lambda: win_probability([1.0, 2.0, 3.0], [1.0, 2.0]),
        lambda: wilson(3, 0),
        lambda: wilson(4, 3),
        lambda: variance_explained([[1.0], [2.0]]),
        lambda: variance_explained([[0.1, 0.1], [0.1, 0.1]]),
        lambda: variance_explained([[1.0, 2.0], [3.0, 5.0]], [0]),
        lambda: variance_explained([[1.0, 2.0], [3.0, 5.0]], [0, 1]),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(DgkitError):
        call()


def test_p_value_of_a_mean_is_that_of_a_t_test_where_images_are_many() -> None:
    rng = np.random.default_rng(3)
    for shift in (0.0, 0.1, 0.2, -0.15):
        values = rng.normal(shift, 1, 400)
        expected = ttest_1samp(values, 0).pvalue
        assert p_value(values, 0) == pytest.approx(expected, abs=0.02)


def test_p_value_is_never_zero_and_one_at_the_bound() -> None:
    assert p_value(np.full(10, 3.0), 0) == pytest.approx(2 / 10_001)
    assert p_value(np.full(10, 3.0), 3) == 1


@pytest.mark.parametrize(("wins", "n", "bound"), [(0, 100, 0.1), (3, 50, 0.1), (20, 60, 0.1), (5, 50, 0.1)])
def test_p_value_of_a_share_is_the_exact_binomials(wins: int, n: int, bound: float) -> None:
    values = np.arange(n) < wins
    at_most = sum(math.comb(n, k) * bound**k * (1 - bound) ** (n - k) for k in range(wins + 1))
    at_least = 1 - at_most + math.comb(n, wins) * bound**wins * (1 - bound) ** (n - wins)
    assert p_value(values, bound, share=True) == pytest.approx(min(1, 2 * min(at_most, at_least)))


def test_rank_p_value_counts_the_draws_as_large() -> None:
    assert rank_p_value(5, [1, 2, 5, 7]) == pytest.approx(3 / 5)
    assert rank_p_value(9, [1, 2, 5, 7]) == pytest.approx(1 / 5)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1, 1]) and len(holm([])) == 0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_the_order_and_never_lowers_a_p_value(p: list[float]) -> None:
    adjusted = holm(p)
    assert (adjusted >= np.array(p) - 1e-12).all() and (adjusted <= 1).all()
    order = np.argsort(p, kind="stable")
    assert (np.diff(adjusted[order]) >= 0).all()
    assert adjusted.min() == pytest.approx(min(1, len(p) * min(p)))  # Bonferroni's for the smallest
