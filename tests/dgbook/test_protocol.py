"""The tables' settings against the paper's printed numbers, written out here once more by hand."""

import pytest

from dgbook.paper_scale import protocol
from dgbook.paper_scale.generate.job import Job
from dgbook.paper_scale.prompts import SETS
from dgbook.paper_scale.row import Row, block_evaluations, filled, in_small
from dgbook.paper_scale.scores import METRICS
from dgkit.errors import DgkitError
from dgkit.zoo import MODELS


def row(table: str, label: str) -> Row:
    return next(found for found in protocol.rows(table) if found.label == label)


@pytest.mark.parametrize(
    ("table", "label", "scale", "methods", "score"),
    [
        ("table1", "SD3 Cond", 1.0, {}, {"clipscore": 22.11}),
        ("table1", "SD3 Cond + DG", 1.0, {"dg": {"block": 5, "dims": [810], "scale": 1.0}}, {"aesthetic": 6.01}),
        ("table1", "SD3.5 CFG", 4.0, {}, {"blipscore": 92.62}),
        ("table1", "SD3.5 CFG + DG", 4.0, {"dg": {"block": 19, "dims": [676], "scale": 2.0}}, {"hpsv2.1": 30.7}),
        ("table2", "DG", 1.0, {"dg": {"block": 5, "dims": [810], "scale": 1.0}}, {"hpsv2.1/photo": 28.70}),
        ("table2", "CFG+DG", 4.0, {"dg": {"block": 5, "dims": [810], "scale": 1.0}}, {"hpsv2.1": 30.96}),
        ("table3", "Flux CFG", 3.5, {}, {"clipscore": 27.04}),
        ("table3", "Flux CFG + DG", 4.0, {"dg": {"block": 21, "dims": [154, 1446], "scale": 2.0}}, {"hpsv2.1": 29.25}),
        ("table3", "Flux Cond + DG", 1.0, {"dg": {"block": 21, "dims": [154, 1446], "scale": 4.0}}, {}),
        ("table6", "Cond + DG", 1.0, {"dg": {"block": 6}}, {"fid": 5.77, "recall": 0.55}),
    ],
)
def test_rows_are_as_printed(table: str, label: str, scale: float, methods: dict, score: dict) -> None:  # type: ignore[type-arg]
    found = row(table, label)
    assert (found.guidance_scale, found.methods) == (scale, methods)
    assert score.items() <= found.paper.items()


def test_every_row_is_a_job_and_every_score_a_metric() -> None:
    for table in protocol.TABLES:
        for found in protocol.rows(table):
            assert {name.partition("/")[0] for name in found.paper} <= METRICS.keys()
            assert found.prompts in SETS and found.count <= 50_000
            whole = filled(found, dims=[3], scale=1.0)
            Job(
                model=whole.model, conditions=("a",), count=whole.count, steps=whole.steps,
                guidance_scale=whole.guidance_scale, methods=whole.methods, disruption=whole.disruption,
            )  # fmt: skip
            assert found.paper.keys() <= set(found.scores) and found.claims.keys() <= set(found.scores)
            little = in_small(found)
            assert little.paper == {} and little.lacking == () and little.prompts in ("dungeon-tiles", "fashion-mnist")
            assert little.methods.keys() == found.methods.keys() and bool(little.disruption) == bool(found.disruption)


@pytest.mark.parametrize("shrink", [False, True])
def test_a_row_and_its_baseline_differ_in_one_thing_only(shrink: bool) -> None:
    """So that pairs of images have the same prompt and noise."""
    for table in protocol.TABLES:
        found = [in_small(each) if shrink else each for each in protocol.rows(table)]
        by_label = {each.label: each for each in found}
        for each in found:
            if each.baseline:
                other = by_label[each.baseline]
                assert not other.baseline and not other.disruption and not other.methods
                for name in ("model", "prompts", "count", "steps", "seed_blocks", "conditional", "scores"):
                    assert getattr(each, name) == getattr(other, name)
                assert each.methods or each.disruption


def test_rounding_is_that_of_the_digits_in_the_paper() -> None:
    """Table 1 prints two digits but in two places, Table 6 has 0.55; "28.70" is not 28.7."""
    for table in protocol.TABLES:
        for found in protocol.rows(table):
            if not found.wins:
                one = [("SD3.5 CFG", "hpsv2.1"), ("SD3.5 CFG + DG", "hpsv2.1")] if table == "table1" else []
                assert found.rounding == {
                    score: 0.05 if (found.label, score) in one else 0.005 for score in found.paper
                }
            assert in_small(found).rounding == {}
            assert found.wins or 0 not in found.claims.values()  # only win probabilities can be comparable
    halves = [protocol.half_unit(text) for text in ("28.70", "29.9", "-5", "0.462")]
    assert halves == pytest.approx([0.005, 0.05, 0.5, 0.0005])


def test_rows_that_share_their_images_are_known() -> None:
    shared = {("DG, m = 6", "DG, w = 1")}
    by_images: dict[str, list[str]] = {}
    for found in protocol.rows("fig8"):
        by_images.setdefault(found.sampled, []).append(found.label)
    assert {tuple(labels) for labels in by_images.values() if len(labels) > 1} == shared
    assert row("fig8", "Cond").sampled == row("table1", "SD3 Cond").sampled
    assert row("fig5b", "SD3 original").sampled == row("table1", "SD3 CFG").sampled
    assert row("fig5b", "SD3 MAs disrupted").sampled != row("fig5b", "SD3 non-MAs disrupted").sampled
    assert row("table6", "Cond").sampled != row("table6", "Uncond").sampled


@pytest.mark.parametrize(
    ("table", "model", "options"),
    [
        ("table1", "sd3", ""),
        ("table3", "flux-dev", " --weights flux-dev-de-distill"),
        ("table6", "dit-xl-2", " --dims DIM --scale W"),
    ],
)
def test_options_that_a_command_needs(table: str, model: str, options: str) -> None:
    assert protocol.options(table, model) == options


def test_baselines_of_table_1_and_6() -> None:
    assert row("table1", "SD3.5 CFG + DG").baseline == "SD3.5 CFG"
    assert row("table6", "Uncond + DG").baseline == "Uncond"
    assert {each.baseline for each in protocol.rows("table2")} == {"", "CFG"}


def test_figure_5b_is_as_in_section_4_2() -> None:
    disrupted = row("fig5b", "SD3 MAs disrupted")
    assert disrupted.paper == {"blipscore": 0.462, "clipscore": 0.512, "hpsv2.1": 0.028, "aesthetic": 0.078}
    assert disrupted.disruption == {"block": 5, "dims": [810], "kind": "zero"} and disrupted.wins
    assert disrupted.claims == {"clipscore": 0, "blipscore": 0, "hpsv2.1": -1, "aesthetic": -1}
    control = row("fig5b", "Flux non-MAs disrupted")
    assert control.disruption == {"block": 21, "dims": [154, 1446], "kind": "random"} and control.paper == {}
    little = in_small(disrupted)
    assert (little.label, little.baseline) == ("tiny-sd3 MAs disrupted", "tiny-sd3 original")
    preset = MODELS["tiny-sd3"].preset
    assert little.disruption == {"block": preset.block, "dims": [*preset.dims], "kind": "zero"} and little.wins


def test_figure_8_varies_one_thing_at_a_time() -> None:
    found = protocol.rows("fig8")
    alone = [each for each in found if each.methods and each.guidance_scale == 1]
    settings = [(each.methods["dg"]["block"], each.methods["dg"]["scale"]) for each in alone]
    assert all(block == 5 or w == 1.0 for block, w in settings)
    assert {block for block, w in settings if w == 1.0} == set(range(1, 24, 2))
    assert all(each.label == f"DG, m = {each.methods['dg']['block'] + 1}" for each in alone if "m =" in each.label)
    beside = [each for each in found if each.label.startswith("CFG + DG")]
    for each in beside:  # Eq. 5: s = lambda + 1
        assert each.guidance_scale == row("fig8", each.baseline).guidance_scale
        assert each.label == f"CFG + DG, lambda = {each.guidance_scale - 1:g}"
    # section 5.3: "best performance when applied to intermediate blocks (e.g., m ranging from 4 to 10)"
    claimed = [each.methods["dg"]["block"] + 1 for each in alone if "m =" in each.label and each.claims]
    assert claimed == [4, 6, 8, 10]
    assert row("fig8", "CFG + DG, lambda = 3").methods == row("table1", "SD3 CFG + DG").methods
    little = [in_small(each) for each in alone]
    assert [e.methods["dg"]["block"] for e in little if "m =" in e.label] == [0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 7, 7]
    assert all(f"m = {e.methods['dg']['block'] + 1}" in e.label for e in little if "m =" in e.label)
    assert [e.methods["dg"]["scale"] for e in little if "w =" in e.label] == [0.5, 1.0, 2.0, 3.0, 4.0]


def test_small_rows_have_the_small_models_own_scale() -> None:
    assert in_small(row("table2", "APG")).methods == {"apg": {"scale": 3.0}}
    assert in_small(row("table2", "CFG++")).methods == {"cfg++": {}}
    little = in_small(row("table6", "Cond + DG"))
    preset = MODELS["tiny-dit"].preset
    expected = {"block": preset.block, "dims": [*preset.dims], "scale": preset.scale}
    assert little.methods == {"dg": expected} and little.seed_blocks == 3


def test_costs_are_those_of_the_engine() -> None:
    """SD3 has 24 blocks; DG at block 5 computes the 18 after it once more; CFG doubles the ordinary pass."""
    assert block_evaluations(row("table1", "SD3 Cond")) == 500 * 28 * 24
    assert block_evaluations(row("table1", "SD3 CFG + DG")) == 500 * 28 * (2 * 24 + 18)
    assert block_evaluations(row("table6", "Cond")) == 3 * 50_000 * 250 * 28
    assert block_evaluations(row("fig5b", "SD3 MAs disrupted")) == 500 * 28 * 2 * 24


def test_the_numbers_of_rows_are_the_papers() -> None:
    assert {table: len(protocol.rows(table)) for table in protocol.TABLES} == {
        "table1": 8, "table2": 6, "table3": 4, "table6": 4, "fig5b": 9, "fig8": 28
    }  # fmt: skip
    assert [found.label for found in protocol.rows("table1", "sd3")] == [
        "SD3 Cond", "SD3 Cond + DG", "SD3 CFG", "SD3 CFG + DG"
    ]  # fmt: skip


def test_what_the_paper_does_not_state_has_to_be_given() -> None:
    guided = row("table6", "Uncond + DG")
    assert guided.lacking == ("dims", "scale") and not guided.conditional
    with pytest.raises(DgkitError, match="does not state dims and scale for dit-xl-2: give --dims and --scale"):
        filled(guided)
    with pytest.raises(DgkitError, match="does not state scale"):
        filled(guided, dims=[4])
    assert filled(guided, dims=[4], scale=0.5).methods == {"dg": {"block": 6, "dims": [4], "scale": 0.5}}
    stated = row("table1", "SD3 Cond + DG")
    assert filled(stated, dims=[4], scale=0.5) == stated  # what the paper states is not changed by these


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("table4",), "table='table4' is not allowed: use one of table1, table2, table3, table6, fig5b, fig8"),
        (("table1", "flux-dev"), "model='flux-dev' is not in table1: it has sd3, sd3.5-large"),
    ],
)
def test_unknown_tables_and_models(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(DgkitError, match=message):
        protocol.rows(*arguments)
