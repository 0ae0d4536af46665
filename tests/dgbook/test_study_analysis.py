"""Win rates of a user study: intervals against written-out sums and simulated studies, and files that are refused."""

import csv
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm, t

from dgbook import cli
from dgbook.measures.stats import wilson
from dgbook.paper_scale.study.analysis import COLUMNS, analyse, two_way_share
from dgbook.paper_scale.study.page import QUESTIONS, Key
from dgkit.errors import DgkitError


def table(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cells, annotators and pairs of a full table (annotators, pairs)."""
    rows, columns = np.indices(values.shape)
    return values.ravel(), rows.ravel(), columns.ravel()


def written_out(values: Sequence[float], rows: Sequence[int], columns: Sequence[int]) -> tuple[float, float]:
    """The interval from its definition: products over all pairs of answers that share a row, a column or both; then the
    two shares p for which |share - p| is t standard errors, with the standard error that p itself implies."""
    n, share = len(values), float(np.mean(values))
    total = dict.fromkeys(("row", "column", "cell"), 0.0)
    for k in range(n):
        for m in range(n):
            product = (values[k] - share) * (values[m] - share) / n**2
            total["row"] += product * (rows[k] == rows[m])
            total["column"] += product * (columns[k] == columns[m])
            total["cell"] += product * (k == m)
    groups = {"row": len(set(rows)), "column": len(set(columns))}
    by = {name: total[name] * size / (size - 1) for name, size in groups.items()}
    variance = max(by["row"] + by["column"] - total["cell"], *by.values(), total["cell"])
    freedom = variance**2 / sum(by[name] ** 2 / (size - 1) for name, size in groups.items())
    quantile = t.ppf(0.975, max(freedom, min(groups.values()) - 1))
    inflation = variance / (share * (1 - share))

    def excess(p: float) -> float:
        return abs(share - p) - quantile * np.sqrt(inflation * p * (1 - p))

    return brentq(excess, 1e-12, share), brentq(excess, share, 1 - 1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_the_interval_is_its_definition_also_with_missing_cells(seed: int) -> None:
    generator = np.random.default_rng(seed)
    taste, quality = generator.normal(0, 1, (5, 1)), generator.normal(0, 1, (1, 8))
    values, rows, columns = table((taste + quality + generator.normal(0.5, 1, (5, 8)) > 0).astype(float))
    there = generator.random(40) < (1.0, 0.7)[seed % 2]
    interval = two_way_share(values[there], rows[there], columns[there])
    expected = written_out(values[there], rows[there], columns[there])
    assert (interval.low, interval.high) == pytest.approx(expected, abs=1e-9)
    assert interval.value == values[there].mean()


def simulated(
    shape: tuple[int, int], taste: float, quality: float, centre: float, count: int
) -> tuple[np.ndarray, float]:
    """Studies (count, annotators, pairs) of 0 and 1, and the win rate in the population they are drawn from.

    A probit model: `taste` and `quality` are the standard deviations of annotators and pairs, 1 that of an answer.
    """
    generator = np.random.default_rng(0)
    rows, columns = shape
    spread = np.sqrt(1 + taste**2 + quality**2)
    latent = spread * norm.ppf(centre) + generator.normal(size=(count, rows, columns))
    latent += taste * generator.normal(size=(count, rows, 1)) + quality * generator.normal(size=(count, 1, columns))
    return (latent > 0).astype(float), centre


def pigeonhole(values: np.ndarray) -> tuple[float, float]:
    """Owen's bootstrap: annotators and pairs drawn anew, 300 times."""
    generator = np.random.default_rng(1)
    rows, columns = (generator.multinomial(n, np.full(n, 1 / n), 300) for n in values.shape)
    means = np.einsum("bi,bi->b", rows @ values, columns) / values.size
    low, high = np.quantile(means, [0.025, 0.975])
    return low, high


# the paper's size, and smaller ones; alike and unlike annotators; fair and one-sided
@pytest.mark.parametrize(("shape", "taste", "quality", "centre"), [
    ((20, 100), 0.3, 0.3, 0.5),
    ((20, 100), 0.3, 1.0, 0.7),
    ((20, 100), 1.0, 0.3, 0.7),
    ((20, 100), 0.0, 0.0, 0.6),
    ((10, 30), 0.5, 0.5, 0.8),
    ((5, 20), 1.0, 1.0, 0.5),
    ((3, 40), 1.0, 0.3, 0.6),
])  # fmt: skip
def test_intervals_cover_the_win_rate(shape: tuple[int, int], taste: float, quality: float, centre: float) -> None:
    studies, truth = simulated(shape, taste, quality, centre, 400)
    intervals = [two_way_share(*table(study)) for study in studies]
    covered = np.mean([interval.low <= truth <= interval.high for interval in intervals])
    # 0.95 less about four standard errors of 400 trials; without clusters it may cover more
    assert 0.91 <= covered <= 0.995


def test_few_annotators_defeat_what_the_interval_replaces() -> None:
    """Taking answers as independent, and the bootstrap of both margins, miss the truth far more than 5 times in 100."""
    studies, truth = simulated((3, 40), 1.0, 0.3, 0.6, 300)
    ours = np.mean([(i := two_way_share(*table(study))).low <= truth <= i.high for study in studies])
    naive = np.mean([(i := wilson(study.sum(), study.size)).low <= truth <= i.high for study in studies])
    resampled = np.mean([low <= truth <= high for low, high in map(pigeonhole, studies)])
    assert ours > 0.9 and resampled < 0.85 and naive < 0.6


def test_agreeing_annotators_make_the_bootstrap_too_wide() -> None:
    studies, _ = simulated((10, 30), 0.0, 0.0, 0.6, 100)
    ours = np.mean([(i := two_way_share(*table(study))).high - i.low for study in studies])
    resampled = np.mean([high - low for low, high in map(pigeonhole, studies)])
    assert resampled > 1.2 * ours


def test_unanimity_is_no_certainty() -> None:
    assert two_way_share(*table(np.ones((4, 9)))) == wilson(4, 4)
    assert two_way_share(*table(np.zeros((9, 4)))) == wilson(0, 4)
    assert two_way_share(*table(np.ones((1, 9)))) == wilson(9, 9)
    assert two_way_share([1], ["x"], ["y"]) == wilson(1, 1)


def test_equal_margins_are_no_certainty_either() -> None:
    """In a checkerboard rows and columns do not vary at all: the interval is that of independent answers."""
    board = np.indices((6, 8)).sum(0) % 2
    interval, expected = two_way_share(*table(board)), wilson(24, 48)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=0.01)


def test_one_annotator_is_a_sample_of_pairs() -> None:
    """Then the answers are independent: Wilson's interval with t for the normal quantile and n - 1 for n."""
    values = np.array([[1, 1, 0, 1, 0, 1, 1, 0, 1, 1]])
    interval = two_way_share(*table(values))
    p, n, q = 0.7, 9, t.ppf(0.975, 9)
    for bound in (interval.low, interval.high):
        assert (p - bound) ** 2 == pytest.approx(q**2 * bound * (1 - bound) / n)


@pytest.mark.parametrize("arguments", [([], [], []), ([1, 0], ["a"], ["b", "c"])])
def test_bad_tables(arguments: tuple[list[int], list[str], list[str]]) -> None:
    with pytest.raises(DgkitError, match="give as many of each, at least 1"):
        two_way_share(*arguments)


# ---------------------------------------------------------------------------------------------------------------- files

PAIRS = {f"p{k}": {"name": f"n{k}", "a": f"i{k}a", "b": f"i{k}b"} for k in range(4)}
KEY = Key("s1", "old", "new", 0, tuple(QUESTIONS), PAIRS)


def row(annotator: str, pair: str, question: str, winner: str, left: str = "a") -> list[str]:
    images = PAIRS[pair]
    right = "b" if left == "a" else "a"
    return ["s1", annotator, pair, question, images[left], images[right], images[winner]]


def write(path: Path, rows: Sequence[Sequence[str]], header: Sequence[str] = COLUMNS) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "study.key.json"
    values = {"study": "s1", "a": "old", "b": "new", "seed": 0, "questions": list(QUESTIONS), "pairs": PAIRS}
    path.write_text(json.dumps(values))
    return path


def full(annotator: str, winner: str = "b") -> list[list[str]]:
    return [row(annotator, pair, question, winner) for pair in PAIRS for question in QUESTIONS]


def test_win_rates_are_counted_by_question(tmp_path: Path, key: Path) -> None:
    ann = [
        *(row("ann", pair, "prompt_alignment", winner, left) for pair, winner, left in
          [("p0", "a", "a"), ("p1", "a", "b"), ("p2", "b", "b"), ("p3", "b", "a")]),
        *(row("ann", pair, "detail_preservation", "b") for pair in PAIRS),
        *(row("ann", pair, "color_consistency", winner) for pair, winner in zip(PAIRS, "abbb", strict=True)),
    ]  # fmt: skip
    ben = full("ben", "a")[:6]  # two pairs only
    outcome = analyse([write(tmp_path / "1.csv", ann), write(tmp_path / "2.csv", ben)])
    assert {question: win.value for question, win in outcome.wins.items()} == pytest.approx(
        {"prompt_alignment": 4 / 6, "detail_preservation": 2 / 6, "color_consistency": 3 / 6}
    )
    assert outcome.left == pytest.approx(
        {"prompt_alignment": 4 / 6, "detail_preservation": 2 / 6, "color_consistency": 3 / 6}
    )
    assert outcome.answers == {"ann": 12, "ben": 6} and set(outcome.counts.values()) == {6}
    assert "ben: 6 of 12 answers" in str(outcome) and "ann:" not in str(outcome)
    line = outcome.table().loc["Prompt alignment"]
    assert line["A wins"].startswith("0.667 [") and line["B wins"].startswith("0.333 [")


def test_the_command_prints_a_table_and_writes_json(
    tmp_path: Path, key: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(write(tmp_path / f"{who}.csv", full(who))) for who in ("x", "y")]
    assert cli.main(["study", "analyse", *paths]) == 0
    printed = capsys.readouterr().out
    assert "A: old" in printed and "Detail preservation" in printed and "1.000 [" in printed
    written = json.loads((tmp_path / "study.results.json").read_text())
    assert written["questions"]["detail_preservation"]["a_wins"]["value"] == 0
    assert written["annotators"] == {"x": 12, "y": 12} and written["expected_per_annotator"] == 12
    other = tmp_path / "elsewhere" / "my.json"
    other.parent.mkdir()
    key.rename(other)
    assert cli.main(["study", "analyse", *paths]) == 2
    assert "has 0 key files (*.key.json): name the study's with --key" in capsys.readouterr().err
    assert cli.main(["study", "analyse", *paths, "--key", str(other)]) == 0
    assert json.loads((other.parent / "my.results.json").read_text()) == written


def test_one_annotator_is_said(tmp_path: Path, key: Path) -> None:
    assert "say nothing of other annotators" in str(analyse([write(tmp_path / "1.csv", full("ann"))]))


def test_answers_saved_twice_count_once_and_contradictions_are_refused(tmp_path: Path, key: Path) -> None:
    early, late = write(tmp_path / "1.csv", full("ann")[:5]), write(tmp_path / "2.csv", full("ann"))
    assert analyse([early, late, late]).answers == {"ann": 12}
    changed = write(tmp_path / "3.csv", full("ann", "a"))
    with pytest.raises(DgkitError, match=r"3.csv, line 2: annotator 'ann' .* otherwise in .*2.csv, line 2"):
        analyse([late, changed])


def test_files_of_one_name_are_all_listed(tmp_path: Path, key: Path) -> None:
    paths = []
    for who in ("ann", "ben"):
        (tmp_path / who).mkdir()
        paths.append(write(tmp_path / who / "answers.csv", full(who)))
    expected = {hashlib.sha256(path.read_text().encode()).hexdigest(): "answers.csv" for path in paths}
    assert len(expected) == 2 and analyse(paths, key).as_dict()["files"] == expected


def test_a_spreadsheets_mark_is_no_error(tmp_path: Path, key: Path) -> None:
    path = write(tmp_path / "1.csv", full("ann"))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert analyse([path]).answers == {"ann": 12}


GOOD = row("ann", "p0", "color_consistency", "a")
MALFORMED = {
    "its first line must name study,annotator": lambda path: path.write_text("a;b;c\n1;2;3\n"),
    "its first line must name": lambda path: path.write_text(""),
    "has no rows": lambda path: write(path, []),
    "line 3 does not have 7 values": lambda path: write(path, [GOOD, GOOD[:-1]]),
    "line 2 does not have 7 values": lambda path: write(path, [[*GOOD, "more"]]),
    "line 2 has no annotator": lambda path: write(path, [["s1", "", *GOOD[2:]]]),
    "line 2 is of study 's9', the key of 's1'": lambda path: write(path, [["s9", *GOOD[1:]]]),
    "question 'taste' is not one of prompt_alignment": lambda path: write(path, [[*GOOD[:3], "taste", *GOOD[4:]]]),
    "pair 'p9' is not in the study": lambda path: write(path, [[*GOOD[:2], "p9", *GOOD[3:]]]),
    "not the images of pair p0": lambda path: write(path, [[*GOOD[:6], "i1a"]]),
    "are not the images of pair p0": lambda path: write(path, [[*GOOD[:4], "i0a", "i0a", "i0a"]]),
    "is not text in UTF-8": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "cannot be read: .*No such file": lambda path: None,
    "hold none to prompt_alignment": lambda path: write(path, [GOOD]),
}  # fmt: skip


@pytest.mark.parametrize("message", MALFORMED)
def test_malformed_answers_are_one_clear_error(tmp_path: Path, key: Path, message: str) -> None:
    MALFORMED[message](tmp_path / "answers.csv")
    with pytest.raises(DgkitError, match=message):
        analyse([tmp_path / "answers.csv"])


@pytest.mark.parametrize("change", [
    {"pairs": {}}, {"pairs": {"p0": {"a": "x"}}}, {"pairs": 3}, {"questions": []}, {"questions": ["taste"]},
    {"questions": 1}, {"more": 1},
])  # fmt: skip
def test_a_broken_key_is_one_clear_error(tmp_path: Path, key: Path, change: dict[str, object]) -> None:
    answers = write(tmp_path / "1.csv", full("ann"))
    key.write_text(json.dumps(json.loads(key.read_text()) | change))
    with pytest.raises(DgkitError, match="is not the key file of a study"):
        analyse([answers])


@pytest.mark.parametrize("content", ["", "[]", "3", "no json"])
def test_what_is_no_key_at_all(tmp_path: Path, key: Path, content: str) -> None:
    key.write_text(content)
    with pytest.raises(DgkitError, match="is not the key file of a study"):
        analyse([write(tmp_path / "1.csv", full("ann"))])


def test_two_keys_must_be_told_apart(tmp_path: Path, key: Path) -> None:
    (tmp_path / "other.key.json").write_text(key.read_text())
    answers = write(tmp_path / "1.csv", full("ann"))
    with pytest.raises(DgkitError, match="has 2 key files"):
        analyse([answers])
    assert analyse([answers], key).key == KEY
    with pytest.raises(DgkitError, match="give at least one CSV file"):
        analyse([])
