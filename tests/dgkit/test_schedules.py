"""Schedules against a loop by hand that is told which steps compute what, and knows nothing of dgkit's counting."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import dgkit
from dgkit.errors import DgkitError
from dgkit.guidance import APG, CFG, SCHEDULES, SLG, Every, Schedule, SGPrev
from dgkit.guidance.schedule import Kept, schedule_of
from tests.dgkit.test_methods import Naive, blocks_of, perturbed, skip
from tests.tiny_models import CLASSES, pipeline, sample

STEPS, S, W = 6, 4.0, 1.5


class ByHand:
    """A direction that is computed in the steps of `computed` alone."""

    def __init__(self, computed: set[int], missing: str) -> None:
        self.computed, self.missing = computed, missing
        self.known: dict[int, Tensor] = {}

    def __call__(self, step: int, value: Tensor) -> Tensor:
        """`value` where it is computed; it is not looked at elsewhere."""
        if step in self.computed:
            self.known[step] = value
            return value
        last = max(self.known)
        if self.missing == "drop":
            return torch.zeros_like(value)
        if self.missing == "reuse" or len(self.known) == 1:
            return self.known[last]
        before = max(k for k in self.known if k < last)
        slope = (self.known[last] - self.known[before]) / (last - before)
        return self.known[last] + slope * (step - last)


# a schedule, and the steps of six that compute c_branch and u
CASES: list[tuple[Any, set[int], set[int]]] = [
    (Schedule(Every(2), Every(3)), {0, 2, 4}, {0, 3}),
    (Schedule(Every(2, missing="extrapolate"), Every(2, 0.5, "extrapolate")), {0, 2, 4}, {0, 1, 2, 4}),
    (Schedule(Every(3, missing="drop"), Every(None, 0.5, "drop")), {0, 3}, {0, 1, 2}),
    (Schedule(Every(None, 0.34, "reuse"), Every(None, 0.5, "extrapolate")), {0, 1}, {0, 1, 2}),
    (Schedule(uncond=Every(None)), set(range(6)), {0}),
    ("cheap", {0, 2, 4}, {0, 1, 3, 5}),
]


@pytest.mark.parametrize(
    ("name", "schedule", "branch", "uncond"),
    [(name, *case) for i, case in enumerate(CASES) for name in (CLASSES[i % 3], "flux")[: 1 + (i % 3 != 1)]],
)
def test_schedules_are_what_a_loop_by_hand_does(name: str, schedule: Any, branch: set[int], uncond: set[int]) -> None:
    pipe = pipeline(name)
    naive, known = Naive(pipe, name, steps=STEPS), schedule_of(schedule)
    to_branch, to_uncond = ByHand(branch, known.branch.missing), ByHand(uncond, known.uncond.missing)

    def formula(x: Tensor, t: Tensor, i: int, *rest: Any) -> Tensor:
        c, u = naive.predict(x, t), naive.predict(x, t, True)
        u = c - to_uncond(i, c - u)
        return u + S * (c - u) + W * to_branch(i, c - perturbed(naive, skip([1]), x, t))

    with dgkit.guide(pipe, SLG(scale=W, blocks=[1], schedule=schedule)) as guidance:
        for _ in range(2):  # the second run starts anew
            ours = sample(pipe, name, guidance_scale=S, steps=STEPS)
    expected = naive.run(formula)
    assert (ours - expected).abs().max() <= 5e-5 * max(1.0, float(expected.abs().max()))
    total = len(blocks_of(pipe.transformer))
    each = total * (STEPS + len(uncond)) + (total - 2) * len(branch)  # one block shared, one skipped
    assert guidance.cost.block_evaluations == 2 * 2 * each
    # what is reused counts as a whole pass, a computed branch of SLG as one block less
    assert guidance.cost.naive_block_evaluations == 2 * 2 * STEPS * (2 * total + total - 1) + 4 * (STEPS - len(branch))
    assert not pipe.transformer._forward_hooks and "_call_impl" not in vars(pipe.transformer)


@pytest.mark.parametrize("name", CLASSES)
def test_everything_in_every_step_is_bitwise_the_same(name: str) -> None:
    pipe = pipeline(name)
    found = []
    for options in (
        {},
        {"schedule": "full"},
        {"schedule": Schedule(Every(1, 0.5, "drop"), Every(1, 0.3, "extrapolate"))},
    ):
        with dgkit.detail_guidance(pipe, scale=W, block=1, dims=[3], **options) as guidance:
            found.append((sample(pipe, name, guidance_scale=S), guidance.cost))
    for images, cost in found[1:]:
        assert torch.equal(images, found[0][0]) and cost == found[0][1]


@pytest.mark.parametrize(("name", "sharing"), [("sd3", "fork"), ("flux", "replay"), ("dit", "replay")])
def test_sharing_makes_no_difference(name: str, sharing: str) -> None:
    pipe, options = pipeline(name), {"scale": W, "block": 1, "dims": [3], "schedule": "cheap"}
    images = []
    for way in ("none", sharing):
        with dgkit.detail_guidance(pipe, sharing=way, **options):
            images.append(sample(pipe, name, guidance_scale=S, steps=STEPS))
    assert (images[0] - images[1]).abs().max() <= 2e-5 * max(1.0, float(images[0].abs().max()))


@pytest.mark.parametrize(("name", "method"), [("sd3", APG), ("flux", CFG), ("flux", APG), ("dit", CFG)])
def test_methods_in_place_of_cfg_save_the_unconditional_rows(name: str, method: Any) -> None:
    pipe, uncond = pipeline(name), {0, 1, 2, 4}
    naive, kept = Naive(pipe, name, steps=STEPS), ByHand(uncond, "extrapolate")

    def formula(x: Tensor, t: Tensor, i: int, *rest: Any) -> Tensor:
        c, u = naive.predict(x, t), naive.predict(x, t, True)
        return c + (S - 1) * kept(i, c - u)  # APG without projection, momentum and limit is CFG

    options = {} if method is CFG else {"eta": 1.0, "momentum": 0.0, "norm": float("inf"), "space": "prediction"}
    chosen = method(scale=S, schedule=Schedule(uncond=Every(2, 0.5, "extrapolate")), **options)
    with dgkit.guide(pipe, chosen) as guidance:
        ours = sample(pipe, name, guidance_scale=2.0, steps=STEPS)
    expected = naive.run(formula)
    assert (ours - expected).abs().max() <= 5e-5 * max(1.0, float(expected.abs().max()))
    assert guidance.cost.block_evaluations == 2 * len(blocks_of(pipe.transformer)) * (STEPS + len(uncond))


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_sg_prev_takes_the_prediction_of_the_step_before(name: str) -> None:
    pipe, previous = pipeline(name), {}
    naive = Naive(pipe, name, steps=STEPS)

    def formula(x: Tensor, t: Tensor, i: int, *rest: Any) -> Tensor:
        previous[i] = c = naive.predict(x, t)
        u = naive.predict(x, t, True)
        return u + S * (c - u) + (W * (c - previous[i - 1]) if i else 0)

    with dgkit.guide(pipe, SGPrev(scale=W)) as guidance:
        ours = sample(pipe, name, guidance_scale=S, steps=STEPS)
    expected = naive.run(formula)
    assert (ours - expected).abs().max() <= 5e-5 * max(1.0, float(expected.abs().max()))
    assert guidance.cost.block_evaluations == 2 * len(blocks_of(pipe.transformer)) * 2 * STEPS


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("name", CLASSES)
def test_a_record_sees_the_rows_that_are_computed(name: str, outer: bool) -> None:
    pipe, schedule = pipeline(name), Schedule(uncond=Every(3))
    record, guide = (lambda: dgkit.record(pipe)), (lambda: dgkit.guide(pipe, CFG(scale=S, schedule=schedule)))
    with record() if outer else guide() as first, guide() if outer else record() as second:
        sample(pipe, name, guidance_scale=2.0, steps=STEPS)
    trace = first if outer else second
    assert len(trace.timesteps("cond")) == STEPS and len(trace.timesteps("uncond")) == 2
    assert trace._cells["cond", trace.timesteps("cond")[1]].images.tolist() == [2] * len(trace.anatomy.blocks)


@given(n=st.integers(1, 5), early=st.integers(0, 12), steps=st.integers(1, 12))
def test_which_steps_are_computed(n: int, early: int, steps: int) -> None:
    kept, every, found = Kept(), Every(n, early / 12), []
    for i in range(steps):
        if kept.due(every, early=i < int(early / 12 * steps)):
            kept.take(every, torch.ones(1, 1))
            found.append(i)
    first = max(int(early / 12 * steps), 1)
    assert found == sorted({*range(min(first, steps)), *range(first - 1, steps, n)})


@pytest.mark.parametrize(
    "value", ["cheap", {"branch": {"n": 2, "missing": "extrapolate"}, "uncond": {"n": None, "after": 0.5}}]
)
def test_a_schedule_may_come_from_json(value: Any) -> None:
    made = schedule_of(json.loads(json.dumps(value)))
    if isinstance(value, Mapping):
        assert made == Schedule(Every(2, missing="extrapolate"), Every(None, 0.5))
    else:
        assert made is SCHEDULES["cheap"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("fast", "schedule='fast' is not allowed: use one of full, cheap"),
        (2, "schedule=2 is not allowed: give a Schedule"),
        ({"cond": {"n": 2}}, "is not allowed: give a Schedule"),
        ({"branch": {"every": 2}}, "is not allowed: give a Schedule"),
        ({"branch": 2}, "is not allowed: give a Schedule"),
        ({"branch": {"n": 0}}, "n=0 is not allowed"),
    ],
)
def test_bad_schedules_are_refused(value: Any, words: str) -> None:
    with pytest.raises(DgkitError, match=words):
        SLG(schedule=value)


def test_schedules_that_contradict_each_other_are_refused() -> None:
    pipe = pipeline("sd3")
    with pytest.raises(DgkitError, match="schedule=.* is not allowed: cfg has no branch"):
        CFG(schedule="cheap")
    methods = [SLG(blocks=[1], schedule=Schedule(uncond=Every(n))) for n in (2, 3)]
    with pytest.raises(DgkitError, match="slg, slg differ in uncond"), dgkit.guide(pipe, *methods):
        pass
