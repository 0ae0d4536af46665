"""The closing sentence of each notebook: it says what the numbers say, and no more."""

import re
from typing import Any

import numpy as np
import pytest

from dgbook.claims import findings, results
from dgbook.claims.results import Result
from dgbook.measures.stats import Interval


def around(value, half=0.01):
    """An interval about `value`."""
    return Interval(value, value - half, value + half)


LAYERS = {
    "model": "tiny-dit", "blocks": 8, "threshold": 5.0, "blocks_with_massive": 6, "fixed_dims": [17, 93],
    "largest.block": 7, "largest.dim": 93, "largest.ratio": 41.26, "largest.token_share": 0.98,
}  # fmt: skip
TIME = {
    "model": "tiny-dit", "block": 2, "dim": 93, "share.timestep": around(0.81), "share.condition": around(0.07),
    "trend": around(1.93), "gates.same_largest": 5, "gates.count": 16, "gates.rank_correlation": 0.37,
}  # fmt: skip
INTERVENTION = {
    "model": "tiny-dit", "block": 2, "dims": [93], "massive.low_error": around(0.05), "massive.high_error": around(0.4),
    "random.high_error": around(0.123), "contrast.random.high_error": around(0.277),
    "massive.sharpness_ratio": around(0.62),
    "matched.high_error": around(0.3), "contrast.matched.high_error": around(0.1), "matched_dims": [1, 5, 9],
}  # fmt: skip
GUIDANCE = {
    "model": "tiny-dit", "block": 2, "w": 1.5, "w_cfg": 0.75, "DG.high_frequency_change": around(0.0312, 0.001),
    "contrast.cfg.high_frequency_change": around(0.0123, 0.001), "DG.cost": 0.8125, "CFG+DG.cost": 0.875,
}  # fmt: skip
ABLATIONS = {
    "model": "tiny-dit", "blocks": 8, "block.strongest": 3, "block.strongest_ratio": 1.42, "block.last_ratio": 1.03,
    "w.rank_correlation": 0.91, "lambda.rank_correlation": -0.83,
}  # fmt: skip
TABLE_6 = {
    "model": "tiny-dit", "count": 50, "w": 1.5,
    "uncond.frechet_change": Interval(-3.21, -4.5, -1.25), "cond.frechet_change": Interval(2.5, 1.5, 3.75),
}  # fmt: skip
READINGS = {
    "model": "tiny-dit", "CFG alone.distance": around(1), "as in this book.distance": around(0),
    "lambda is s.distance": around(0.71), "another channel.distance": around(0.94),
}  # fmt: skip
CASES = {
    "01_layer_properties": LAYERS,
    "02_timestep_vs_text": TIME,
    "03_intervention": INTERVENTION,
    "04_detail_guidance": GUIDANCE,
    "05_ablations": ABLATIONS,
    "06_imagenet": TABLE_6,
    "07_ambiguities": READINGS,
}


def test_one_finding_per_notebook():
    assert findings.FINDINGS.keys() == CASES.keys()


@pytest.mark.parametrize("notebook", CASES)
def test_every_finding_is_one_sentence_about_the_model(notebook):
    sentence = findings.FINDINGS[notebook](CASES[notebook])
    assert sentence.endswith(".") and "tiny-dit" in sentence
    assert ". " not in sentence.replace("Fig. ", "") and "\n" not in sentence and "nan" not in sentence


@pytest.mark.parametrize(
    ("notebook", "name"),
    # the threshold is told only where nothing reaches it (below); readings are told as far as they were measured
    [(n, key) for n, values in CASES.items() for key in values if key != "threshold" and ".distance" not in key],
)
def test_a_missing_number_is_an_error(notebook, name):
    values = {key: value for key, value in CASES[notebook].items() if key != name}
    with pytest.raises(KeyError, match=re.escape(name)):
        findings.FINDINGS[notebook](values)


def test_massive_at_fixed_dims():
    sentence = findings.layer_properties(LAYERS)
    for part in ("in 6 of 8 blocks", "fixed dims (17 and 93 in", "channel 93 of block 7", "41.3 times", "98% of"):
        assert part in sentence


def test_massive_without_fixed_dims():
    sentence = findings.layer_properties(LAYERS | {"fixed_dims": []})
    assert "in 6 of 8 blocks" in sentence and "at no dim that is massive" in sentence and "at fixed" not in sentence


def test_nothing_massive():
    none = LAYERS | {"blocks_with_massive": 0, "fixed_dims": [], "largest.ratio": 3.14}
    sentence = findings.layer_properties(none)
    assert sentence.startswith("No channel of tiny-dit is massive") and "massive activations occur" not in sentence
    assert "reaches 3.1 times" in sentence and "not above the threshold of 5" in sentence
    del none["threshold"]
    with pytest.raises(KeyError, match="threshold"):
        findings.layer_properties(none)


def test_large_on_too_few_tokens_is_not_said_to_be_below_the_threshold():
    few = LAYERS | {"blocks_with_massive": 0, "fixed_dims": [], "largest.ratio": 8.0, "largest.token_share": 0.25}
    sentence = findings.layer_properties(few)
    assert "reaches 8.0 times" in sentence and ", above the threshold of 5" in sentence
    assert "25% of the image tokens" in sentence


@pytest.mark.parametrize(
    ("trend", "said"),
    [
        (Interval(1.93, 1.7, 2.2), "which grows from"),
        (Interval(0.52, 0.4, 0.6), "which shrinks from"),
        (Interval(1.1, 0.9, 1.3), "which neither grows nor shrinks beyond chance from"),
        (Interval(1.0, 1.0, 1.0), "which neither grows nor shrinks beyond chance from"),
        (Interval(1.2, 1.0, 1.4), "which neither grows nor shrinks beyond chance from"),
    ],
)
def test_trend_over_time(trend, said):
    sentence = findings.timestep_vs_text(TIME | {"trend": trend})
    assert said in sentence and f"ratio {trend:.2f}" in sentence


@pytest.mark.parametrize(
    ("timestep", "condition", "leads"),
    [
        (Interval(0.8, 0.7, 0.9), Interval(0.1, 0.0, 0.2), "timestep"),
        (Interval(0.1, 0.0, 0.2), Interval(0.8, 0.7, 0.9), "condition"),
        (Interval(0.5, 0.3, 0.7), Interval(0.3, 0.1, 0.4), "neither clearly"),
        (Interval(0.3, 0.1, 0.4), Interval(0.5, 0.3, 0.7), "neither clearly"),
        (Interval(0.5, 0.4, 0.6), Interval(0.3, 0.2, 0.4), "neither clearly"),
    ],
)
def test_the_larger_share_is_named_only_where_the_intervals_part(timestep, condition, leads):
    sentence = findings.timestep_vs_text(TIME | {"share.timestep": timestep, "share.condition": condition})
    assert f"(the larger share: {leads})" in sentence
    assert f"{timestep:.2f}" in sentence and f"{condition:.2f}" in sentence


@pytest.mark.parametrize(
    ("timestep", "said"),
    [
        (Interval(0.8, 0.7, 0.9), "timestep"),
        (Interval(0.1, 0.0, 0.2), "condition and noise together"),
        (Interval(0.4, 0.3, 0.6), "neither clearly"),
    ],
)
def test_condition_and_noise_are_told_apart_only_where_they_can_be(timestep, said):
    both = {key: value for key, value in TIME.items() if key != "share.condition"}
    both |= {"share.timestep": timestep, "share.condition_and_noise": Interval(0.5, 0.4, 0.6)}
    sentence = findings.timestep_vs_text(both)
    assert "the condition and noise together 0.50 [0.40, 0.60] of the variance" in sentence
    assert f"(the larger share: {said})" in sentence
    assert findings.CLAIMS["02_timestep_vs_text"][0].outcome(both) == (None, "")


def test_gate_agreement_is_told():
    sentence = findings.timestep_vs_text(TIME)
    assert "in 5 of 16 gates" in sentence and "correlation of 0.37" in sentence and "channel 93" in sentence


UNDECIDED = Interval(0.1, -0.1, 0.3)


@pytest.mark.parametrize(
    ("difference", "said"),
    [
        (Interval(0.3, 0.2, 0.4), ", more than zeroing"),
        (Interval(-0.3, -0.4, -0.2), ", less than zeroing"),
        (UNDECIDED, ", neither more nor less beyond chance than zeroing"),
    ],
)
def test_massive_against_random(difference, said):
    assert said in findings.intervention(INTERVENTION | {"contrast.random.high_error": difference})


@pytest.mark.parametrize(
    ("ratio", "said"),
    [
        (Interval(1.5, 1.2, 1.7), "images sharper (sharpness ratio 1.50 [1.20, 1.70])"),
        (Interval(0.5, 0.4, 0.7), "images smoother (sharpness ratio 0.50 [0.40, 0.70])"),
        (Interval(0.9, 0.7, 1.1), "images neither sharper nor smoother beyond chance"),
    ],
)
def test_sharpness_after_the_intervention(ratio, said):
    assert said in findings.intervention(INTERVENTION | {"massive.sharpness_ratio": ratio})


def test_intervention_numbers():
    sentence = findings.intervention(INTERVENTION)
    for part in ("Zeroing channel 93 after block 2", "0.050 [0.040, 0.060]", "0.400 [0.390, 0.410]", "(8.0 times"):
        assert part in sentence
    assert "high: 0.123 [0.113, 0.133]" in sentence and "judge" not in sentence
    assert "Zeroing channels 1, 2 and 3 after" in findings.intervention(INTERVENTION | {"dims": [1, 2, 3]})
    small = findings.intervention(INTERVENTION | {"massive.low_error": around(0.8)})
    assert "(0.5 times as much)" in small


def test_intervention_tells_the_judges_finding_only_where_there_is_one():
    agreement = {"massive.agreement": around(0.75), "original.agreement": around(0.92)}
    assert "finds what was asked for in 75% of them, against 92% of the originals." in findings.intervention(
        INTERVENTION | agreement
    )
    with pytest.raises(KeyError, match="original.agreement"):
        findings.intervention(INTERVENTION | {"massive.agreement": around(0.75)})


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (Interval(0.02, 0.01, 0.03), "more"),
        (Interval(-0.02, -0.03, -0.01), "less"),
        (UNDECIDED, "neither more nor less beyond chance"),
    ],
)
def test_detail_guidance_alone_and_beside_cfg(change, word):
    alone = findings.detail_guidance(GUIDANCE | {"DG.high_frequency_change": change})
    assert f"DG alone gives {word} high-frequency energy (share {change:+.4f})" in alone
    assert "CFG + DG more than" in alone
    beside = findings.detail_guidance(GUIDANCE | {"contrast.cfg.high_frequency_change": change})
    assert f"CFG + DG {word} than CFG ({change:+.4f})" in beside and "DG alone gives more" in beside


def test_detail_guidance_numbers():
    sentence = findings.detail_guidance(GUIDANCE)
    assert (
        "w = 1.5 alone and 0.75 beside CFG, at block 2" in sentence
        and "costs 0.81 (DG) and 0.88 (CFG + DG)" in sentence
    )
    names = {"none": 0.61, "DG": 0.72, "CFG": 0.83, "CFG+DG": 0.94}
    distances = {"none.frechet": 5.5, "CFG.frechet": 3.5, "contrast.none.frechet": around(0.25)}
    judged = findings.detail_guidance(
        GUIDANCE
        | {f"{k}.agreement": around(v) for k, v in names.items()}
        | distances
        | {"contrast.cfg.frechet": around(-1.5)}
    )
    assert "by +0.25 [+0.24, +0.26] alone (5.50 without guidance) and by -1.50 [-1.51, -1.49] beside CFG" in judged
    assert "in 61% without guidance, 72% with DG, 83% with CFG and 94% with both" in judged


@pytest.mark.parametrize(("strongest", "middle"), [(0, "an outer"), (1, "an intermediate"), (7, "an outer")])
def test_strongest_block(strongest, middle):
    sentence = findings.ablations(ABLATIONS | {"block.strongest": strongest})
    assert f"at block {strongest} (m = {strongest + 1} of 8, {middle} block" in sentence
    assert "ratio of 1.42, against 1.03 at the last block" in sentence


@pytest.mark.parametrize(
    ("correlation", "said"),
    [(0.9, "rises"), (-0.9, "falls"), (0.3, "has no clear trend"), (-0.3, "has no clear trend"),
     (float("nan"), "has no clear trend")],
)  # fmt: skip
def test_trends_of_the_sweeps(correlation, said):
    both = findings.ablations(ABLATIONS | {"w.rank_correlation": correlation, "lambda.rank_correlation": correlation})
    assert f"sharpness {said} (rank correlation {correlation:+.2f}) with w and {said}" in both
    assert both.endswith(f"{said} (rank correlation {correlation:+.2f}) with lambda.")


@pytest.mark.parametrize("kind", ["uncond", "cond"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (Interval(-3.0, -4.0, -2.0), "falls in every seed block (-3 [-4, -2])"),
        (Interval(3.0, 2.0, 4.0), "rises in every seed block (+3 [+2, +4])"),
        (Interval(-1.0, -2.0, 0.5), "does not move the same way in every seed block (-1 [-2, +0.5])"),
        (Interval(1.0, -0.5, 2.0), "does not move the same way in every seed block (+1 [-0.5, +2])"),
    ],
)
def test_frechet_change(kind, change, said):
    sentence = findings.imagenet(TABLE_6 | {f"{kind}.frechet_change": change})
    assert f"the {kind}itional Frechet distance {said}" in sentence
    assert "50 images per seed block" in sentence and "w = 1.5" in sentence and "no FID" in sentence


# verdicts -------------------------------------------------------------------------------------------------------------

HOLDS: dict[str, dict[str, Any]] = {
    "01_layer_properties": {
        "blocks": 8,
        "blocks_with_massive": 8,
        "fixed_dims": [7],
        "largest.token_share": 0.95,
        "largest.ratio": 12.1,
    },
    "02_timestep_vs_text": {
        "share.timestep": Interval(0.8, 0.7, 0.9),
        "share.condition": Interval(0.05, 0.02, 0.08),
        "trend": Interval(2, 1.5, 2.5),
        "gates.same_largest": 9,
        "gates.count": 16,
    },
    "03_intervention": {
        "massive.high_error": Interval(0.5, 0.4, 0.6),
        "massive.low_error": Interval(0.03, 0.02, 0.04),
        "random.high_error": Interval(0.03, 0.02, 0.04),
        "contrast.random.high_error": Interval(0.2, 0.1, 0.3),
        "contrast.matched.high_error": Interval(0.2, 0.1, 0.3),
        "massive.sharpness_ratio": Interval(0.7, 0.6, 0.8),
        "contrast.original.agreement": Interval(-0.02, -0.04, 0.0),
    },
    "04_detail_guidance": {
        "DG.high_frequency_change": Interval(0.2, 0.1, 0.3),
        "contrast.cfg.high_frequency_change": Interval(0.2, 0.1, 0.3),
        "DG.low_error": Interval(0.03, 0.02, 0.04),
        "DG.agreement": Interval(0.7, 0.65, 0.75),
        "CFG.high_frequency_change": Interval(-0.3, -0.4, -0.2),
        "CFG.agreement": Interval(0.8, 0.76, 0.84),
        "contrast.none.agreement": Interval(0.1, 0.01, 0.2),
        "contrast.cfg.agreement": Interval(-0.01, -0.04, 0.02),
        "contrast.none.frechet": Interval(-1, -2, -0.5),
        "contrast.cfg.frechet": Interval(-1, -2, -0.5),
        "none.frechet": 5.5,
        "CFG.frechet": 3.5,
    },
    "05_ablations": {
        "blocks": 3,
        "block.last_ratio": 1.02,
        "block.sharpness_ratio": np.array([[0, 1.2, 1, 2], [1, 1.5, 1.1, 2], [2, 1.0234567891, 1, 2]]),
        "w.agreement_change": np.array([[0, 0, 0, 0], [0.5, 0.1, -0.04, 0.2], [1, -0.02, -0.04, 0.01]]),
        "CFG.frechet": 3.5,
        "CFG.frechet_change": Interval(0, 0, 0),
        "none.frechet_change": Interval(-9, -9, -9),
        "APG.frechet_change": Interval(-0.5, -0.55, -0.2),
        "CFG + DG.frechet_change": Interval(-1, -1.4, -0.6),
    },
    "06_imagenet": {
        "uncond.frechet_change": Interval(-2, -3, -1),
        "cond.frechet_change": Interval(-2, -3, -1),
        "uncond.is": Interval(4, 3, 5),
        "uncond+DG.is": Interval(6, 5.1, 7),
        "cond.is": Interval(6, 5, 7),
        "cond+DG.is": Interval(8, 7.1, 9),
        "uncond.precision": Interval(0.5, 0.4, 0.6),
        "uncond+DG.precision": Interval(0.7, 0.61, 0.8),
        "cond.precision": Interval(0.6, 0.5, 0.7),
        "cond+DG.precision": Interval(0.8, 0.71, 0.9),
    },
}
FAILS: list[tuple[str, str, Any]] = [
    ("01_layer_properties", "blocks_with_massive", 7),
    ("01_layer_properties", "fixed_dims", []),
    ("01_layer_properties", "largest.token_share", 0.8),
    ("02_timestep_vs_text", "share.timestep", Interval(0.3, 0.07, 0.9)),
    ("02_timestep_vs_text", "share.condition", Interval(0.05, 0.02, 0.11)),
    ("02_timestep_vs_text", "trend", Interval(1.1, 0.9, 1.3)),
    ("02_timestep_vs_text", "gates.same_largest", 8),
    ("03_intervention", "massive.low_error", Interval(0.04, 0.03, 0.06)),
    ("03_intervention", "contrast.random.high_error", Interval(0.1, -0.1, 0.3)),
    ("03_intervention", "contrast.matched.high_error", Interval(-0.1, -0.2, -0.05)),
    ("03_intervention", "massive.sharpness_ratio", Interval(0.9, 0.8, 1.1)),
    ("03_intervention", "contrast.original.agreement", Interval(-0.03, -0.06, 0.0)),
    ("04_detail_guidance", "contrast.none.frechet", Interval(-1, -2, 0.5)),
    ("04_detail_guidance", "DG.high_frequency_change", Interval(0.1, -0.1, 0.3)),
    ("04_detail_guidance", "contrast.cfg.high_frequency_change", Interval(-0.1, -0.2, -0.05)),
    ("04_detail_guidance", "contrast.cfg.agreement", Interval(-0.3, -0.4, -0.1)),
    ("05_ablations", "block.sharpness_ratio", np.array([[0, 1.2, 1, 2], [1, 1.1, 1, 2], [2, 1.01, 1, 2]])),
    ("05_ablations", "block.sharpness_ratio", np.array([[0, 1.2, 1, 2], [1, 1.5, 0.9, 2], [2, 1.01, 1, 2]])),
    ("05_ablations", "block.sharpness_ratio", np.array([[0, 1.05, 1, 2], [1, 1.5, 1.1, 2], [2, 1.1, 1, 2]])),
    ("05_ablations", "block.sharpness_ratio", np.array([[0, 1.05, 1, 2], [1, 1.5, 1.1, 2], [2, 0.6, 0, 2]])),
    ("06_imagenet", "cond.frechet_change", Interval(-2, -3, 0.5)),
    ("03_intervention", "random.high_error", Interval(0.04, 0.03, 0.06)),
    ("04_detail_guidance", "contrast.none.agreement", Interval(0.1, 0.0, 0.2)),
    ("04_detail_guidance", "DG.low_error", Interval(0.06, 0.05, 0.07)),
    ("04_detail_guidance", "CFG.high_frequency_change", Interval(0.05, 0.01, 0.15)),
    ("04_detail_guidance", "CFG.agreement", Interval(0.8, 0.72, 0.88)),
    ("05_ablations", "w.agreement_change", np.array([[0, 0, 0, 0], [0.5, 0.1, -0.06, 0.2], [1, 0, 0, 0]])),
    ("05_ablations", "APG.frechet_change", Interval(-0.5, -0.8, -0.2)),
    ("06_imagenet", "uncond+DG.is", Interval(6, 4.9, 7)),
    ("06_imagenet", "cond+DG.is", Interval(6, 4.9, 7)),
    ("06_imagenet", "uncond+DG.precision", Interval(0.7, 0.59, 0.8)),
    ("06_imagenet", "cond+DG.precision", Interval(0.7, 0.69, 0.8)),
]


CONTROLS = INTERVENTION | {
    "draws.below": 17, "draws.high_error": np.arange(20.0), "norm kept.high_error": around(0.21),
    "contrast.norm kept.high_error": around(0.19), "half.contrast": around(0.3), "half.edited.high_error": around(0.5),
    "half.other.high_error": around(0.2),
}  # fmt: skip


def test_controls_of_zeroing() -> None:
    sentence = findings.intervention(CONTROLS)
    assert "It does more than 17 of 20 random draws." in sentence
    assert "zeroing does less (high: 0.210" in sentence
    assert "changes the left half of the image more than the right (high: 0.500" in sentence and "and 0.200" in sentence
    opposite = {"contrast.norm kept.high_error": around(-0.1), "half.contrast": around(-0.3)}
    sentence = findings.intervention(CONTROLS | opposite)
    assert "zeroing does more (high" in sentence and "the left half of the image less than the right" in sentence
    chance = {"contrast.norm kept.high_error": around(0, 1), "half.contrast": around(0, 1)}
    sentence = findings.intervention(CONTROLS | chance)
    assert "zeroing does no less and no more beyond chance" in sentence
    assert "the left half of the image no more and no less beyond chance than the right" in sentence
    without = {key: value for key, value in CONTROLS.items() if "norm kept" not in key}
    assert "LayerNorms" not in findings.intervention(without)


def test_other_worse_models_in_the_place_of_dg() -> None:
    values = GUIDANCE | {
        "none.frechet": 5.0, "blurred.frechet": 4.5, "contrast.blurred.frechet": around(0.8),
        "autoguidance.frechet": 6.25, "contrast.autoguidance.frechet": around(-0.95),
    }  # fmt: skip
    sentence = findings.detail_guidance(values)
    assert "blurred attention -0.50 (DG minus it +0.80 [" in sentence
    assert "(autoguidance) +1.25 (DG minus it -0.95 [" in sentence


def test_both_regimes() -> None:
    values = ABLATIONS | {
        "regimes.settings": 9, "regimes.largest.detail only": 6, "regimes.largest.content lost": 2,
        "regimes.largest.collapse_at": 16, "regimes.random.detail only": 8, "regimes.random.content lost": 0,
        "regimes.random.collapse_at": 0,
    }  # fmt: skip
    sentence = findings.ablations(values)
    assert (
        "largest channels of one block costs detail only in 6 and the content in 2 of 9 settings (first at k = 16)"
        in sentence
    )
    assert sentence.endswith("k random channels cost detail only in 8 and the content in 0 of 9 settings.")


def test_nothing_measured_is_no_verdict() -> None:
    assert findings.verdict("03_intervention", {})[0] == "not measured"


def test_closer_than_every_other_method_is_undecided_while_their_intervals_overlap() -> None:
    part = next(p for p in findings.CLAIMS["05_ablations"] if "every other" in p.text)
    values = HOLDS["05_ablations"]
    assert part.word(values) == "holds"
    assert part.word(values | {"APG.frechet_change": Interval(-0.5, -0.8, -0.2)}) == "undecided"
    assert part.word(values | {"APG.frechet_change": Interval(-2.5, -2.8, -2.2)}) == "does not hold"


def test_a_part_about_a_sweep_is_undecided_while_every_interval_leaves_room() -> None:
    part = next(p for p in findings.CLAIMS["05_ablations"] if p.key == "w.agreement_change")

    def word(low: float, high: float) -> str:
        return part.word({part.key: np.array([[0, 0, 0, 0], [1, 0, low, high]])})

    assert [word(-0.04, 0.1), word(-0.1, 0.1), word(-0.2, -0.06)] == ["holds", "undecided", "does not hold"]


def test_every_finding_has_a_claim() -> None:
    chapters = [name for name in findings.FINDINGS if name != "07_ambiguities"]  # about the reading of all claims
    assert list(findings.CLAIMS) == chapters == list(HOLDS)


@pytest.mark.parametrize("name", HOLDS)
def test_verdict_holds_for_what_is_read_back_from_a_result_file(name: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DGKIT_RESULTS_DIR", str(tmp_path))
    result = Result(name, model="m")
    result.update(HOLDS[name])
    monkeypatch.setattr(results, "ACCEPTED", tmp_path)
    result.save()
    word, parts = findings.verdict(name, results.load(name, "m").decoded())
    assert word == "reproduced" and len(parts) == len(findings.CLAIMS[name])
    assert all("**holds** (" in part for part in parts)


@pytest.mark.parametrize(("name", "key", "value"), FAILS)
def test_one_part_that_does_not_hold_is_told(name: str, key: str, value: Any) -> None:
    word, parts = findings.verdict(name, HOLDS[name] | {key: value})
    count = len(parts)
    assert word == f"{count - 1} of {count} parts reproduced"
    assert sum("**holds** (" not in part for part in parts) == 1
    assert sum("**does not hold** (" in part or "**undecided** (" in part for part in parts) == 1


@pytest.mark.parametrize(
    ("interval", "word"),
    [
        (Interval(0.2, 0.1, 0.3), "holds"),
        (Interval(0.1, -0.1, 0.3), "undecided"),
        (Interval(-0.1, -0.3, 0.1), "undecided"),
        (Interval(-0.2, -0.3, -0.1), "does not hold"),
    ],
)
def test_an_interval_with_both_signs_leaves_a_part_undecided(interval: Interval, word: str) -> None:
    part = next(p for p in findings.CLAIMS["04_detail_guidance"] if p.key == "DG.high_frequency_change")
    assert part.word({part.key: interval}) == word and part.word({}) == "not measured"


@pytest.mark.parametrize(
    ("high", "low", "word"),
    [
        (Interval(0.5, 0.4, 0.6), Interval(0.1, 0.05, 0.2), "holds"),
        (Interval(0.5, 0.4, 0.6), Interval(0.3, 0.2, 0.45), "undecided"),  # they overlap
        (Interval(0.3, 0.2, 0.45), Interval(0.5, 0.4, 0.6), "undecided"),
        (Interval(0.1, 0.05, 0.2), Interval(0.5, 0.4, 0.6), "does not hold"),
    ],
)
def test_overlapping_intervals_leave_a_comparison_undecided(high: Interval, low: Interval, word: str) -> None:
    part = next(p for p in findings.CLAIMS["02_timestep_vs_text"] if "more of" in p.text)
    assert part.word({"share.timestep": high, "share.condition": low}) == word


def test_nothing_that_holds_is_not_reproduced() -> None:
    values = {"uncond.frechet_change": Interval(2, 1, 3), "cond.frechet_change": Interval(1, -1, 3)}
    assert findings.verdict("06_imagenet", values)[0] == "not reproduced"


def test_what_was_not_measured_does_not_count() -> None:
    values = {k: v for k, v in HOLDS["04_detail_guidance"].items() if "high_frequency" in k}
    word, parts = findings.verdict("04_detail_guidance", values)
    assert word == "reproduced" and sum("not measured" in part for part in parts) == 7


def test_models_side_by_side(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    name = "04_detail_guidance"
    unjudged = {k: v for k, v in HOLDS[name].items() if "high_frequency" in k}
    failing = HOLDS[name] | {"DG.high_frequency_change": UNDECIDED}
    monkeypatch.setenv("DGKIT_RESULTS_DIR", str(tmp_path))
    monkeypatch.setattr(results, "REFERENCE", tmp_path)
    for model, values in (("flux-dev", unjudged), ("tiny-dit", failing)):
        result = Result(name, model=model)
        result.update(values)
        result.save()
    table = findings.outcomes(name)
    assert list(table.columns) == ["tiny-dit", "flux-dev"] and len(table) == 11
    assert table["tiny-dit"].iloc[0] == f"undecided: share {UNDECIDED:+.4f}"
    assert [cell.split(":")[0] for cell in table["tiny-dit"]] == [
        "undecided", *["holds"] * 9, "9 of 10 parts reproduced"
    ]  # fmt: skip
    assert [cell.split(":")[0] for cell in table["flux-dev"]] == [
        *["holds"] * 2, *["not measured"] * 6, "holds", "not measured", "reproduced"
    ]  # fmt: skip
    assert findings.outcomes("06_imagenet").empty


def test_efficientnet_distances_are_told_where_measured() -> None:
    distances = {"uncond": 12.34, "uncond+DG": 13.45, "cond": 8.91, "cond+DG": 9.87}
    measured = {f"{k}.frechet_efficientnet": d for k, d in distances.items()} | {"efficientnet_count": 2100}
    told = findings.imagenet(TABLE_6 | measured)
    assert "of 2100 images it goes from 12.3 to 13.4 (unconditional) and from 8.91 to 9.87 (conditional)" in told
    assert "EfficientNet" not in findings.imagenet(TABLE_6)


def test_methods_with_a_lower_distance_are_named_best_first_and_dg_always():
    values = {"CFG.steps": 20, "CFG.frechet": 4.0, "CFG + DG.scale": 0.3, "CFG.frechet_change": Interval(0, 0, 0)}
    values |= {f"{n}.frechet_change": Interval(m, m - 0.1, m + 0.1) for n, m in (("APG", -0.5), ("CFG + PAG", -0.9))}
    values |= {"CFG + DG.frechet_change": Interval(0.05, -0.1, 0.2)}
    sentence = findings._methods(values)
    assert "in 20 steps (Frechet distance 4.00)" in sentence
    assert "a lower one are: CFG + PAG (-0.90 [-1.00, -0.80]), APG (-0.50 [-0.60, -0.40]); CFG + DG at" in sentence
    assert "w = 0.3 changes it by +0.05 [-0.10, +0.20]" in sentence
    values = {key: value for key, value in values.items() if not key.startswith(("APG", "CFG + PAG"))}
    assert "a lower one are: none; CFG + DG" in findings._methods(values)
    assert findings._methods({"CFG.steps": 20}) == ""


def test_what_reuse_saves_is_said_where_it_was_measured():
    values = {"every step.reuse_cost": 1.31, "every 2nd step.reuse_cost": 1.16}
    values |= {"every 2nd step.reuse_distance": Interval(0.06, 0.04, 0.07)}
    assert "from 1.31 to 1.16 times the cost of CFG and moves the images by 0.06 of" in findings._reuse(values)
    assert findings._reuse({}) == ""
