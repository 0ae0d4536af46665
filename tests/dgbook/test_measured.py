"""The pages made from data: what they say has to be in the result files, and nothing may be left out."""

import inspect
import json
import re
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from markdown_it import MarkdownIt

from dgbook import notebooks
from dgbook.claims import paper, results
from dgbook.claims.results import Result
from dgbook.claims.verdicts import parts
from dgbook.markdown import plain, table
from dgbook.measures.stats import Interval
from dgbook.pages import across, at_scale, beside, exhibits, measured, runs, verdicts
from dgbook.pages.text import ZOO, on_models
from dgbook.pages.verdicts import Evidence
from dgbook.paper_scale import protocol, reproduce
from dgbook.paper_scale.generate.job import Job
from dgbook.paper_scale.row import NAMES
from dgkit.errors import DgkitError
from dgkit.paths import CHECKOUT

assert CHECKOUT is not None
BOOK = CHECKOUT / "book"
USED = [
    tuple(text.split())
    for page in [*BOOK.glob("*.md"), *(CHECKOUT / "notebooks").glob("*.ipynb")]
    for text in re.findall(r"```\{measured\} (.*?)(?:\\n\",)?$", page.read_text(), re.MULTILINE)
]
CLAIMS = paper.claims().set_index("id", drop=False)
TESTED = {claim for chapter in parts().values() for part in chapter for claim in part.claims} | {"4.1b", "4.1c"}


def rows(text: str) -> list[list[str]]:
    """The cells of a table's rows, without the header."""
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines()[2:]]


@pytest.fixture
def reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes reference runs into an empty folder."""
    monkeypatch.setattr(results, "REFERENCE", tmp_path / "reference")

    def write(name: str, model: str, values: dict[str, Any]) -> None:
        with monkeypatch.context() as patch:
            patch.setenv("DGKIT_RESULTS_DIR", str(tmp_path / "reference"))
            result = Result(name, model=model, seed=0)
            result.update(values)
            result.save()

    return write


# the list of claims ---------------------------------------------------------------------------------------------------


def test_every_claim_is_tested_or_says_why_not() -> None:
    assert CLAIMS.index.is_unique
    assert set(CLAIMS.index) >= TESTED
    assert set(verdicts.NOT_TESTED) == set(CLAIMS.index) - TESTED


def test_every_claim_says_what_would_test_it_on_the_papers_models() -> None:
    without = {name for name, claim in CLAIMS.iterrows() if not at_scale.commands(claim)}
    assert without == {*at_scale.NOT_REPEATABLE, "4.2e"}  # an interpretation


def test_the_claims_cover_the_papers_sections_and_cite_what_exists() -> None:
    sections = list(dict.fromkeys(CLAIMS["section"]))
    assert sections == ["4.1", "4.2", "4.3", "5.2", "5.3", "B", "C", "D", "E", "F", "H", "I"]
    known = set(paper.exhibits()["exhibit"])
    for _, claim in CLAIMS.iterrows():
        assert claim["id"].startswith(claim["section"]) and claim["claim"].endswith(".")
        for exhibit in claim["exhibits"].split("; "):
            assert re.sub(r"\(\w\)$", "", exhibit).replace("Fig.", "Figure") in known
        assert all(name in ZOO for name in claim["models"].split("; "))


def test_numbers_quoted_from_a_table_are_in_it() -> None:
    for _, claim in CLAIMS[CLAIMS["exhibits"].str.contains("Table [136]")].iterrows():
        cited = pd.concat([paper.table(int(n)) for n in re.findall(r"Table (\d)", claim["exhibits"])])
        printed = set(cited.select_dtypes("number").to_numpy().ravel())
        assert {float(number) for number in re.findall(r"(?<!SD)\b\d+\.\d+", claim["numbers"])} <= printed


def test_win_probabilities_are_those_of_the_data() -> None:
    printed = set(re.findall(r"0\.\d+", " ".join(CLAIMS["numbers"])))
    rows = pd.read_csv(CHECKOUT / "data" / "paper" / "fig5b.csv", dtype=str)  # type: ignore[operator]
    assert set(rows["win_probability"]) <= printed


@pytest.mark.parametrize(
    ("claim", "needed"),
    [
        ("4.1a", {"dgkit run layer-properties": ["dit-xl-2"]}),
        ("4.2b", {"dgkit reproduce fig5b": ["sd3"]}),
        ("5.2a", {"dgkit reproduce table1": ["sd3", "sd3.5-large"], "dgkit reproduce table3": ["flux-dev"]}),
        ("5.3c", {"dgkit reproduce fig8": ["sd3"]}),
        ("Cb", {"dgkit run timestep-vs-text": ["sd3.5-large", "flux-dev", "dit-xl-2"]}),
        ("I", {}),
    ],
)
def test_commands(claim: str, needed: dict[str, list[str]]) -> None:
    assert at_scale.commands(CLAIMS.loc[claim]) == needed


# evidence -------------------------------------------------------------------------------------------------------------


def test_a_claim_shows_the_numbers_of_every_reference_run(reference: Any) -> None:
    assert verdicts.evidence()["4.1g"] == []
    reference("02_timestep_vs_text", "tiny-dit", {"share": {"condition": Interval(0.05, 0.04, 0.06)}})
    reference("02_timestep_vs_text", "tiny-sd3", {"share": {"condition": Interval(0.5, 0.4, 0.6)}})
    reference("02_timestep_vs_text", "sd3", {"gates": {"count": 3}})  # did not measure it
    found = verdicts.evidence()["4.1g"]
    assert [(e.model, e.word, e.numbers) for e in found] == [
        ("tiny-dit", "holds", "0.05 [0.04, 0.06]"),
        ("tiny-sd3", "does not hold", "0.50 [0.40, 0.60]"),
    ]
    card = verdicts.section("4.1").split("(claim-4-1g)=")[1]
    assert "{bdg-warning}`holds on 1 of 2 tested`" in card
    assert r"`tiny-sd3`: **does not hold**, 0.50 \[0.40, 0.60\]" in card


def test_a_claim_without_evidence_is_not_tested_and_has_its_reason(reference: Any) -> None:
    card = verdicts.section("5.2").split("(claim-5-2a)=")[1].split("::::\n")[0]
    assert "{bdg-secondary}`not tested`" in card and "No reference run that measures it" in card
    card = verdicts.section("5.2").split("(claim-5-2g)=")[1].split("::::\n")[0]
    assert "{bdg-secondary}`not tested`" in card and verdicts.NOT_TESTED["5.2g"] in card
    assert "`dgkit reproduce table2 --model sd3`" in card


@pytest.mark.parametrize(
    ("words", "said", "colour"),
    [
        ([], "not tested", "secondary"),
        ([("a", "holds")], "holds on the one tested", "success"),
        ([("a", "undecided")], "undecided on the one tested", "danger"),
        ([("a", "holds"), ("b", "holds")], "holds on all 2 tested", "success"),
        ([("a", "holds"), ("a", "does not hold"), ("b", "holds")], "holds on 1 of 2 tested", "warning"),
        ([("a", "holds"), ("a", "undecided")], "undecided on the one tested", "danger"),
        ([("a", "undecided"), ("b", "does not hold")], "holds on none of 2 tested, undecided on 1", "danger"),
    ],
)
def test_a_claim_holds_on_a_model_where_all_its_parts_do(words: list[tuple[str, str]], said: str, colour: str) -> None:
    found = [Evidence("part", "01_layer_properties", model, word, "") for model, word in words]
    assert verdicts.summary(found) == said and verdicts._colour(found) == colour


def test_counts_are_of_all_claims(reference: Any) -> None:
    reference("02_timestep_vs_text", "tiny-dit", {"share": {"condition": Interval(0.05, 0.04, 0.06)}})
    assert rows(verdicts.test_counts()) == [["`tiny-dit`", "1", "0", "0"]]
    counted = {cells[0]: cells[1:] for cells in rows(verdicts.counts())}
    assert counted.pop("**all**")[0] == f"**{len(CLAIMS)}**" and len(counted) == CLAIMS["section"].nunique()
    # 4.1b and 4.1c rest on files that are shipped with the models
    assert counted["{ref}`4.1 <claim-4-1a>`"][0] == "9" and counted["{ref}`C <claim-ca>`"] == ["3", "1", "", "", "2"]


def test_early_is_within_a_tenth_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    table = pd.DataFrame(
        {"step": [100, 100, 500, 500, 1000, 1000], "block": [0, 1] * 3, "ratio": [2, 5.5, 6, 7, 8, 9.0], "dim": 0}
    )
    monkeypatch.setattr(verdicts, "training_history", lambda model: table)
    assert {(e.word, e.numbers) for e in verdicts._early()} == {("holds", "from step 100 of 1,000 on")}
    monkeypatch.setattr(verdicts, "training_history", lambda model: table[table["step"] > 100])
    assert {(e.word, e.numbers) for e in verdicts._early()} == {("does not hold", "from step 500 of 1,000 on")}
    monkeypatch.setattr(verdicts, "training_history", lambda model: table[table["ratio"] < 5])
    assert {e.numbers for e in verdicts._early()} == {"not within 100 steps: 2.0 times the median at most"}


def test_sizes_need_a_massive_channel_each(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = pd.DataFrame({"size": list("SBLL"), "step": 9, "ratio": [7.0, 4, 9, 8], "massive_blocks": [0.5, 0, 1, 1]})
    monkeypatch.setattr(verdicts.ladder, "measurements", lambda: dict.fromkeys("SBL"))
    monkeypatch.setattr(verdicts.ladder, "history", lambda: None)
    monkeypatch.setattr(verdicts.ladder, "sizes", lambda table: sizes)
    (found,) = verdicts._sizes()
    assert found.word == "does not hold"
    assert found.numbers == "in 3 of 4 trainings after 9 steps: ratios 7.0 (S), 4.0 (B), 9.0 and 8.0 (L)"
    monkeypatch.setattr(verdicts.ladder, "measurements", lambda: dict.fromkeys("SB"))
    assert not [*verdicts._sizes()]


# the paper's own tables -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claim", "said"),
    [  # counted by hand in the paper
        ("5.2a", "so in 6 of 6 scores"),
        ("5.2b", "so in 6 of 6 scores"),
        ("5.2d", "so in 3 of 4 scores, not in SD3.5 HPSv2.1 (29.23 against 29.9)"),
        ("5.2e", "so in 4 of 4 scores"),
        ("5.2f", "so in 4 of 4 scores"),
        ("5.2g", "rank 1 of 6 by Aesthetic, 4 of 6 by HPSv2.1"),
        ("5.2h", "rank 2 of 6 by Aesthetic, 1 of 6 by HPSv2.1"),
        ("Ea", "so in 4 of 4 scores"),
        ("Eb", "so in 3 of 4 scores, not in Flux BLIPScore (86.23 against 87.76)"),
        ("Ha", "so in 3 of 4 scores, not in recall (0.67 against 0.76)"),
        ("Hb", "so in 3 of 4 scores, not in recall (0.55 against 0.63)"),
        ("4.1a", ""),
    ],
)
def test_what_the_papers_own_tables_say(claim: str, said: str) -> None:
    assert paper.recomputed(claim) == said


def test_the_papers_scale() -> None:
    shown = {cells[0]: cells[1:] for cells in rows(at_scale.paper_scale().split("\n\n")[0])}
    n, m, images = 24, 6, 500 * 28  # images times steps; Table 1 has each row without and with DG
    evaluations = images * (n + (2 * n - m) + 2 * n + (3 * n - m))
    assert shown["`dgkit reproduce table1 --model sd3`"][:2] == ["2,000", f"{evaluations:,}"]
    assert len(shown) == sum(len({row.model for row in protocol.rows(name)}) for name in protocol.TABLES)
    assert shown["`dgkit reproduce fig8 --model sd3`"][0] == "13,500"  # two of the 28 rows share their 500 images
    assert all(float(cells[2].replace(",", "")) > 0 and cells[4] for cells in shown.values())


@pytest.mark.parametrize(("hours", "said"), [(0.123, "0.12"), (3.46, "3.5"), (12.4, "12"), (1234.5, "1,234")])
def test_hours_have_two_digits_or_none_after_the_point(hours: float, said: str) -> None:
    assert at_scale._hours(hours) == said


def test_costs_are_those_of_table_4() -> None:
    shown = {cells[0].strip("`"): cells[1:] for cells in rows(at_scale.costs())}
    for line in paper.table(4).to_dict("records"):
        n, m = line["blocks"], line["depth"]
        ratios = [(2 * n - m) / (2 * n), (3 * n - m) / (3 * n), (3 * n - m) / (2 * n)]
        cells = shown[NAMES[line["model"]]]
        assert cells[:2] == [str(n), str(m)]
        assert np.allclose([float(cell) for cell in cells[2:]], ratios, atol=0.00501)
    assert shown["dit-xl-2"][:2] == ["28", "7"]  # appendix H


# across models --------------------------------------------------------------------------------------------------------


def test_a_chapters_claim_on_every_model(reference: Any) -> None:
    assert across.across_models("06_imagenet") == across.NO_RUN == across.readings_across_models()
    for model, change in (("tiny-dit", Interval(-0.7, -0.8, -0.6)), ("tiny-flux", Interval(-0.9, -1.2, 0.1))):
        reference("06_imagenet", model, {"contrast": {"cond+dg - cond": {"frechet": change}}})
    text = across.across_models("06_imagenet")
    assert text.splitlines()[0].split("|")[2:4] == [" `tiny-dit` ", " `tiny-flux` "]
    cells = {row[0]: row[1:] for row in rows(text)}
    assert cells["DG lowers the conditional Frechet distance, in every seed block"] == [
        r"holds: -0.70 \[-0.80, -0.60\]", r"undecided: -0.90 \[-1.20, +0.10\]"
    ]  # fmt: skip
    assert cells["DG raises the conditional Inception Score"][0] == "not measured"


def test_readings_on_every_model(reference: Any) -> None:
    half = Interval(0.5, 0.4, 0.6)
    settings = {name: {"distance": half, "sharpness_ratio": half} for name in ("near", "far")}
    reference("07_ambiguities", "tiny-sd3", {"settings": settings})
    assert rows(across.readings_across_models()) == [[name, r"0.50 \[0.40, 0.60\]"] for name in ("near", "far")]


# beside the paper -----------------------------------------------------------------------------------------------------

GUIDANCE = {
    "settings": {
        "none": {"agreement": Interval(0.5, 0.4, 0.6), "frechet": 3.0},
        "dg": {"agreement": Interval(0.7, 0.6, 0.8), "frechet": 4.0},
    },
    "contrast": {
        "dg - none": {
            "agreement": Interval(0.2, 0.1, 0.3),
            "frechet": Interval(1.0, 0.5, 1.5),
            "high_frequency_change": Interval(0.001, -0.001, 0.003),
        },
        "cfg+dg - cfg": {},
    },
}


def test_table_3_beside_ours(reference: Any) -> None:
    reference("04_detail_guidance", "tiny-flux", GUIDANCE)
    shown = rows(beside.beside_paper("3"))
    assert shown[0] == ["Flux", "Cond", "CLIPScore", "22.09", "25.69", "+3.60", "yes"]
    assert shown[4:7] == [
        ["`tiny-flux`", "Cond", "agreement", r"0.50 \[0.40, 0.60\]", r"0.70 \[0.60, 0.80\]",
         r"+0.20 \[+0.10, +0.30\]", "yes"],
        ["`tiny-flux`", "Cond", "Frechet distance", "3.00", "4.00", r"+1.00 \[+0.50, +1.50\]", "no"],
        ["`tiny-flux`", "Cond", "high-frequency share", "", "", r"+0.0010 \[-0.0010, +0.0030\]", "undecided"],
    ]  # fmt: skip
    assert [cells[6] for cells in shown[7:]] == ["yes", "no", "yes", "yes"]  # BLIPScore falls beside CFG


def test_a_difference_within_rounding_is_not_better(reference: Any) -> None:
    shown = {tuple(cells[:3]): cells[3:] for cells in rows(beside.beside_paper("1"))}
    assert shown["SD3.5", "CFG", "CLIPScore"] == ["27.67", "27.68", "+0.01", "undecided"]
    assert shown["SD3.5", "CFG", "HPSv2.1"][2:] == ["+0.80", "yes"]  # of 29.9 and 30.7
    assert shown["SD3", "CFG", "CLIPScore"][3] == "no"


def table_6(value: Interval) -> dict[str, dict[str, Interval]]:
    """The same value for all rows and scores."""
    scores = ("frechet", "is", "precision", "recall")
    return {row: dict.fromkeys(scores, value) for row in ("uncond", "uncond+dg", "cond", "cond+dg")}


def test_table_6_takes_the_paired_change_where_there_is_one(reference: Any) -> None:
    """Levels that overlap say nothing, and their paired change may; and the other way round."""
    wide, apart = Interval(2, 1, 3), Interval(9, 8, 10)
    settings = table_6(wide)
    settings["cond+dg"] |= {"is": apart, "precision": apart}
    lower = Interval(-0.2, -0.3, -0.1)
    changes = {"frechet": lower, "recall": lower, "is": Interval(7, -1, 15)}
    reference("06_imagenet", "tiny-dit", {"settings": settings, "contrast": {"cond+dg - cond": changes}})
    ours = [cells for cells in rows(beside.beside_paper("6")) if cells[0] == "`tiny-dit`" and cells[1] == "Cond"]
    assert [cells[6] for cells in ours] == ["yes", "undecided", "yes", "no"]


def test_table_2_beside_ours(reference: Any) -> None:
    reference("05_ablations", "tiny-sd3", {"methods": {"apg": {"frechet_change": Interval(-0.5, -0.75, -0.25)}}})
    shown = rows(beside.beside_paper("2"))
    assert shown[0] == ["APG", "-0.78", "-0.04", r"-0.50 \[-0.75, -0.25\]"]  # 29.46 and 5.89 against 30.24 and 5.93
    assert shown[3] == ["CFG + DG", "+0.72", "+0.20", "not measured"]


def test_table_6_beside_ours(reference: Any) -> None:
    settings = table_6(Interval(2, 1, 3))
    settings["cond+dg"]["frechet"] = Interval(0.5, 0.4, 0.6)
    contrast = {"cond+dg - cond": {"frechet": Interval(-1.5, -2.4, -0.6)}}
    reference("06_imagenet", "tiny-dit", {"settings": settings, "contrast": contrast})
    ours = [cells for cells in rows(beside.beside_paper("6")) if cells[0] == "`tiny-dit`"]
    assert [cells[6] for cells in ours] == ["undecided"] * 4 + ["yes"] + ["undecided"] * 3
    assert ours[4][3:6] == [r"2.00 \[1.00, 3.00\]", r"0.50 \[0.40, 0.60\]", r"-1.50 \[-2.40, -0.60\]"]
    theirs = [cells for cells in rows(beside.beside_paper("6")) if cells[0] == "DiT-XL/2"]
    assert theirs[0][2:] == ["FID", "16.95", "9.68", "-7.27", "yes"] and theirs[3][6] == "no"


# figures and tables ---------------------------------------------------------------------------------------------------


def test_the_map_has_every_figure_and_table_of_the_paper_once() -> None:
    assert list(paper.exhibits()["exhibit"]) == [
        *(f"Figure {n}" for n in range(1, 24)), *(f"Table {n}" for n in range(1, 7))
    ]  # fmt: skip
    assert list(exhibits.OURS) == list(paper.exhibits()["exhibit"])
    assert len(rows(exhibits.exhibits())) == 29
    assert all(ours.notebook or ours.note for ours in exhibits.OURS.values())


@pytest.mark.parametrize("notebook", sorted({ours.notebook for ours in exhibits.OURS.values() if ours.notebook}))
def test_the_map_links_to_figures_that_are_in_the_notebook(notebook: str) -> None:
    cells = json.loads((CHECKOUT / "notebooks" / f"{notebook}.ipynb").read_text())["cells"]  # type: ignore[operator]
    names = {cell["metadata"].get("mystnb", {}).get("figure", {}).get("name") for cell in cells}
    linked = {name for ours in exhibits.OURS.values() if ours.notebook == notebook for name in ours.figures}
    assert linked and linked <= names


def test_an_exhibit_without_entry_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(exhibits.OURS, "Figure 9")
    with pytest.raises(DgkitError, match="Figure 9"):
        exhibits.exhibits()


# runs -----------------------------------------------------------------------------------------------------------------


def test_pages_show_the_run_of_this_build_else_the_accepted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "ACCEPTED", tmp_path / "accepted")
    monkeypatch.setattr(runs.results, "ACCEPTED", tmp_path / "accepted")
    monkeypatch.setenv("DGKIT_RESULTS_DIR", str(tmp_path / "new"))
    assert runs.pages() == {}
    name, model = "03_intervention", notebooks.default_model("intervention")

    def write(folder: str, command: str | None, seed: int, model: str = model) -> None:
        with monkeypatch.context() as patch:
            patch.setenv("DGKIT_RESULTS_DIR", str(tmp_path / folder))
            patch.delenv("DGKIT_COMMAND", raising=False)
            if command:
                patch.setenv("DGKIT_COMMAND", command)
            Result(name, model=model, seed=seed).save()

    write("accepted", "dgkit run intervention", 1)
    write("new", None, 2)  # by the tests of the notebooks: not what the pages show
    write("new", "dgkit run intervention", 3, "another-model")
    assert {key: record.provenance["seed"] for key, record in runs.pages().items()} == {name: 1}
    write("new", "dgkit run intervention", 4)
    assert runs.pages()[name].provenance["seed"] == 4
    (cells,) = rows(runs.runs("pages"))
    assert cells[0] == "{doc}`3 </notebooks/03_intervention>`" and cells[1] == f"`{model}`"
    assert cells[5] == "`dgkit run intervention`: seed 4"


def test_runs_show_what_is_in_the_file(reference: Any) -> None:
    reference("03_intervention", "tiny-sd3", {"x": 1.0})
    (record,) = runs.references()
    (cells,) = rows(runs.runs("references"))
    commit = record.provenance["commit"]
    assert cells[2].endswith(" s") and (commit is None or commit[:10] in cells[4])
    versions = rows(runs.versions().split("\n\n")[0])[1]
    assert record.provenance["versions"]["torch"] in versions


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"commit": "0123456789abcdef", "dirty": False}, "`0123456789`"),
        ({"commit": "0123456789abcdef", "dirty": True}, "`0123456789` with changes"),
        ({"commit": None, "dirty": None}, "unknown"),
    ],
)
def test_commit(facts: dict[str, Any], said: str) -> None:
    assert runs.commit(facts) == said


def test_hardware_names_no_host() -> None:
    import platform

    shown = {cells[0]: cells[1] for cells in rows(runs.hardware())}
    assert list(shown) == ["system", "processor", "cores", "memory", "GPU"] and all(shown.values())
    assert platform.node() not in runs.hardware() or not platform.node()


# pages ----------------------------------------------------------------------------------------------------------------


def test_everything_that_can_be_measured_is_on_a_page_and_every_section_of_the_paper() -> None:
    assert {name for name, *_ in USED} == set(measured.PARTS)
    assert [argument[0] for name, *argument in USED if name == "verdicts"] == list(dict.fromkeys(CLAIMS["section"]))
    assert {argument[0] for name, *argument in USED if name == "beside-paper"} == {"1", "2", "3", "6"}


@pytest.mark.parametrize(
    ("call", "allowed"),
    [
        (("nothing",), "chapters"),
        (("verdicts",), "1 argument"),
        (("chapters", "4.1"), "0 arguments"),
        (("verdicts", "9.9"), "4.1"),
        (("beside-paper", "4"), "1, 2, 3 or 6"),
        (("runs", "all"), "pages or references"),
        (("across-models", "07_ambiguities"), "01_layer_properties"),
    ],
)
def test_what_cannot_be_made_is_one_clear_error(call: tuple[str, ...], allowed: str) -> None:
    with pytest.raises(DgkitError, match=re.escape(allowed)):
        measured.measured(*call)


def test_the_chapters_claims_say_where_a_model_was_not_run(reference: Any) -> None:
    reference("06_imagenet", "tiny-dit", {"contrast": {"cond+dg - cond": {"frechet": Interval(-2, -3, -1)}}})
    shown = rows(across.chapters().partition("\n\n")[0])
    assert len(shown) == len(parts())
    assert shown[0][2:] == ["not run"] * 3 and shown[5][3:] == ["needs classes", "needs classes"]
    assert shown[5][2].count("{bdg-ref-success}`✓ <claim-hb>`") == 1 and shown[5][2].count("{bdg-ref-light}") == 5


@pytest.mark.parametrize("text", ["a_b*c", "[x](y)", "`z` $a$ | <b> {c} #d ~e~ \\f", "CFG-Zero* +0.1 [0.0, 0.2]"])
def test_plain_text_is_no_markup(text: str) -> None:
    (inline,) = MarkdownIt().parseInline(plain(text))
    assert {token.type for token in inline.children or []} <= {"text", "text_special"}
    assert "".join(token.content for token in inline.children or []) == text


def test_tables_and_commands() -> None:
    assert table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    assert on_models("dgkit run x", ["sd3", "flux-dev"]) == "`dgkit run x --model sd3` or `flux-dev`"
    assert on_models("dgkit reproduce fig5b", ["sd3", "flux-dev"]) == (
        "`dgkit reproduce fig5b --model sd3` or `flux-dev --weights flux-dev-de-distill`"
    )


def test_no_page_has_a_command_that_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the pages print, given numbers for DIM and W, gets as far as generating images."""

    def generating(*arguments: Any) -> None:
        raise DgkitError("got this far")

    monkeypatch.setattr(reproduce, "_generate", generating)
    monkeypatch.setattr(reproduce, "job_of", lambda row, seed, weights: None)
    shown = [exhibits.exhibits(), at_scale.paper_scale(), *(verdicts.section(s) for s in CLAIMS["section"].unique())]
    spans = {
        (first, *others)
        for page in shown
        for first, rest in re.findall(r"`(dgkit reproduce [^`]*)`((?: or `[^`]*`)*)", page)
        for others in [re.findall("`([^`]*)`", rest)]
    }
    commands = set()
    for first, *others in spans:
        start = first.partition(" --model ")[0]
        commands |= {first, *(f"{start} --model {other}" for other in others)}
    assert {command.split()[2] for command in commands} == set(protocol.TABLES)
    assert any("flux-dev --weights" in command for command in commands) and any("--dims" in c for c in commands)
    for command in sorted(commands):
        _, verb, name, _, model, *rest = command.replace("DIM", "3").replace("W", "1").split()
        options = {key.strip("-"): value for key, value in zip(rest[::2], rest[1::2], strict=True)}
        given = {"dims": [3] if "dims" in options else None, "scale": float(options["scale"]) if "scale" in options
                 else None, "weights": options.get("weights")}  # fmt: skip
        assert reproduce.wanted(name, model, **given) == [(name, model)]
        with pytest.raises(DgkitError, match="got this far"):
            reproduce.reproduce(name, model, output=tmp_path, **given)


# the directive --------------------------------------------------------------------------------------------------------


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Builds a page of one directive, again in the same folder; returns the page and the warnings."""
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace

    monkeypatch.syspath_prepend(str(BOOK / "_ext"))
    source = tmp_path / "source"
    source.mkdir()
    # a dict of its own: Sphinx writes the suffixes of extensions into its default, for every later build in the process
    settings = ['extensions = ["myst_parser", "measured"]', 'source_suffix = {".md": "markdown"}']
    (source / "conf.py").write_text("\n".join(settings))

    def run(directive: str) -> tuple[str, str]:
        page = source / "index.md"
        text = f"# Page\n\n```{{measured}} {directive}\n```\n"
        if not page.is_file() or page.read_text() != text:
            page.write_text(text)
        warnings = StringIO()
        folders = [str(path) for path in (source, source, tmp_path / "html", tmp_path / "trees")]
        with docutils_namespace():  # directives are registered for the whole process
            Sphinx(*folders, "html", status=None, warning=warnings).build()
        return (tmp_path / "html" / "index.html").read_text(), warnings.getvalue()

    yield run
    sys.modules.pop("measured", None)


def test_the_directive_is_made_again_when_only_the_data_changed(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ["0.123"]
    monkeypatch.setitem(measured.PARTS, "chapters", lambda: f"| a |\n| --- |\n| **{data[0]}** |")
    first, warnings = build("chapters")
    assert "<strong>0.123</strong>" in first and "<table" in first and not warnings
    data[0] = "0.456"
    second, _ = build("chapters")
    assert "<strong>0.456</strong>" in second and "0.123" not in second


def test_the_directive_warns_of_what_it_cannot_make(build: Any) -> None:
    _, warnings = build("nothing")
    assert "use one of chapters" in warnings


def test_a_dataclass_has_a_signature_that_sphinx_can_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BOOK / "_ext"))
    import readable_api

    found = str(inspect.signature(Job))
    assert "<factory>" in found
    shown, returns = readable_api.hide_factories(None, "class", "Job", Job, None, found, None)
    assert returns is None and shown.count("= ...") == found.count("= <factory>") > 0 and "<" not in shown
    assert readable_api.hide_factories(None, "module", "dgkit", None, None, None, None) == (None, None)
