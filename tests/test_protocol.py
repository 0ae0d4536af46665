"""The tables' settings against the paper's printed numbers, written out here once more by hand."""

import pytest

from dgkit import protocol
from dgkit.errors import DgkitError
from dgkit.generate.job import Job
from dgkit.metrics import METRICS
from dgkit.prompts import SETS


def row(table: str, label: str) -> protocol.Row:
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
            whole = protocol.filled(found, dims=[3], scale=1.0)
            Job(
                model=whole.model, conditions=("a",), count=whole.count, steps=whole.steps,
                guidance_scale=whole.guidance_scale, methods=whole.methods,
            )  # fmt: skip
            little = protocol.small(found)
            assert little.paper == {} and little.lacking == () and little.prompts in ("dungeon-tiles", "fashion-mnist")
            assert little.methods.keys() == found.methods.keys()


def test_the_numbers_of_rows_are_the_papers() -> None:
    assert {table: len(protocol.rows(table)) for table in protocol.TABLES} == {
        "table1": 8, "table2": 6, "table3": 4, "table6": 4
    }  # fmt: skip
    assert [found.label for found in protocol.rows("table1", "sd3")] == [
        "SD3 Cond", "SD3 Cond + DG", "SD3 CFG", "SD3 CFG + DG"
    ]  # fmt: skip


def test_what_the_paper_does_not_state_has_to_be_given() -> None:
    guided = row("table6", "Uncond + DG")
    assert guided.lacking == ("dims", "scale") and not guided.conditional
    with pytest.raises(DgkitError, match="does not state dims and scale for dit-xl-2: give --dims and --scale"):
        protocol.filled(guided)
    with pytest.raises(DgkitError, match="does not state scale"):
        protocol.filled(guided, dims=[4])
    assert protocol.filled(guided, dims=[4], scale=0.5).methods == {"dg": {"block": 6, "dims": [4], "scale": 0.5}}
    stated = row("table1", "SD3 Cond + DG")
    assert protocol.filled(stated, dims=[4], scale=0.5) == stated  # what the paper states is not changed by these


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("table4",), "table='table4' is not allowed: use one of table1, table2, table3, table6"),
        (("table1", "flux-dev"), "model='flux-dev' is not in table1: it has sd3, sd3.5-large"),
    ],
)
def test_unknown_tables_and_models(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(DgkitError, match=message):
        protocol.rows(*arguments)


def test_overview_lists_every_row() -> None:
    assert len(protocol.overview()) == 22
