"""One plain sentence per notebook, made from its measured numbers, and the verdict on the paper's claim."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from dgbook.chapters import readings
from dgbook.chapters.regimes import ALMOST_NONE
from dgbook.claims.results import Record, references
from dgbook.measures.stats import Interval

Values = Mapping[str, Any]


def _listed(dims: Any) -> str:
    words = [str(int(d)) for d in dims]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _word(interval: Interval, above: str, below: str, neither: str) -> str:
    """Which side of 0 the whole interval lies on."""
    return above if interval.low > 0 else below if interval.high < 0 else neither


def _side(interval: Interval, neutral: float, above: str, below: str) -> str:
    """`above` or `below` when the whole interval lies on that side of `neutral`, else that it does not say."""
    if interval.low > neutral:
        return above
    if interval.high < neutral:
        return below
    return f"neither {above} nor {below} beyond chance"


def layer_properties(v: Values) -> str:
    """Section 4.1: do massive activations occur in all layers, at fixed dims, over all tokens?"""
    where = f"{v['blocks_with_massive']} of {v['blocks']} blocks"
    if v["blocks_with_massive"] == 0:
        against = "above" if v["largest.ratio"] > v["threshold"] else "not above"
        return (
            f"No channel of {v['model']} is massive: the largest, channel {v['largest.dim']} of block "
            f"{v['largest.block']}, reaches {v['largest.ratio']:.1f} times its block's median, {against} the threshold "
            f"of {v['threshold']:g}, with massive values in {v['largest.token_share']:.0%} of the image tokens."
        )
    fixed = (
        f"at fixed dims ({_listed(v['fixed_dims'])} in more than half of the blocks)"
        if len(v["fixed_dims"])
        else "at no dim that is massive in more than half of the blocks"
    )
    return (
        f"In {v['model']} massive activations occur in {where}, {fixed}; the largest is channel {v['largest.dim']} of "
        f"block {v['largest.block']} with {v['largest.ratio']:.1f} times the median, and it is massive in "
        f"{v['largest.token_share']:.0%} of the image tokens."
    )


def timestep_vs_text(v: Values) -> str:
    """Section 4.1 and appendix C: does alpha predict the dims, and is it the timestep that sets the magnitude?"""
    direction = _side(v["trend"], 1.0, "grows", "shrinks")
    other, name = _condition_share(v)
    leads = "timestep" if v["share.timestep"].low > other.high else name
    if v["share.timestep"].low <= other.high and other.low <= v["share.timestep"].high:
        leads = "neither clearly"
    return (
        f"At block {v['block']} of {v['model']}, the timestep explains {v['share.timestep']:.2f} and the {name} "
        f"{other:.2f} of the variance of channel {v['dim']}'s magnitude (the larger share: {leads}), "
        f"which {direction} from noise to image (ratio {v['trend']:.2f}; the paper: grows, by timestep); the residual "
        f"gate's largest channel is z's largest in {v['gates.same_largest']} of {v['gates.count']} gates, with a "
        f"median rank correlation of {v['gates.rank_correlation']:.2f}."
    )


def _condition_share(v: Values) -> tuple[Interval, str]:
    """The condition's share and its name; together with the noise where each condition had one image."""
    if "share.condition" in v:
        return v["share.condition"], "condition"
    return v["share.condition_and_noise"], "condition and noise together"


def intervention(v: Values) -> str:
    """Section 4.2: does disrupting massive activations cost detail rather than content, and more than the controls?"""
    detail = _side(v["contrast.random.high_error"], 0.0, "more", "less")
    matched = _side(v["contrast.matched.high_error"], 0.0, "more", "less")
    ratio = v["massive.high_error"].value / max(v["massive.low_error"].value, 1e-12)
    sharp = _side(v["massive.sharpness_ratio"], 1.0, "sharper", "smoother")
    text = (
        f"Zeroing channel{'s' * (len(v['dims']) > 1)} {_listed(v['dims'])} after block {v['block']} of {v['model']} "
        f"leaves a relative error of {v['massive.low_error']:.3f} at low and {v['massive.high_error']:.3f} at high "
        f"spatial frequencies ({ratio:.1f} times as much), {detail} than zeroing as many random channels does "
        f"(high: {v['random.high_error']:.3f}) and {matched} than zeroing {len(v['matched_dims'])} other "
        f"channels of the same magnitude does ({v['matched.high_error']:.3f}), and makes the images {sharp} (sharpness "
        f"ratio {v['massive.sharpness_ratio']:.2f})"
    )
    if "massive.agreement" in v:
        text += (
            f"; the judge finds what was asked for in {v['massive.agreement'].value:.0%} of them, against "
            f"{v['original.agreement'].value:.0%} of the originals"
        )
    return text + f".{_controls_of_zeroing(v)}"


def _controls_of_zeroing(v: Values) -> str:
    """Each draw, the LayerNorms, and a part of the tokens: what the paper's one random control leaves open."""
    if "draws.below" not in v:
        return ""
    text = f" It does more than {v['draws.below']} of {len(v['draws.high_error'])} random draws."
    if "norm kept.high_error" in v:
        way = _word(v["contrast.norm kept.high_error"], "less", "more", "no less and no more beyond chance")
        text += (
            f" With the statistics of the later LayerNorms as they were, so that no other channel is scaled up, "
            f"zeroing does {way} (high: {v['norm kept.high_error']:.3f})."
        )
    way = _word(v["half.contrast"], "more", "less", "no more and no less beyond chance")
    return text + (
        f" Zeroing them in the left half of the tokens alone changes the left half of the image {way} than the right "
        f"(high: {v['half.edited.high_error']:.3f} and {v['half.other.high_error']:.3f})."
    )


def detail_guidance(v: Values) -> str:
    """Section 4.3: does DG add detail, alone and beside CFG, and at which cost?"""
    alone = _side(v["DG.high_frequency_change"], 0.0, "more", "less")
    beside = _side(v["contrast.cfg.high_frequency_change"], 0.0, "more", "less")
    text = (
        f"With w = {v['w']:g} alone and {v['w_cfg']:g} beside CFG, at block {v['block']} of {v['model']}, DG alone "
        f"gives {alone} high-frequency energy (share {v['DG.high_frequency_change']:+.4f}) than no guidance, and "
        f"CFG + DG {beside} than CFG ({v['contrast.cfg.high_frequency_change']:+.4f})"
    )
    if "DG.agreement" in v:
        text += (
            f"; the judge finds what was asked for in {v['none.agreement'].value:.0%} without guidance, "
            f"{v['DG.agreement'].value:.0%} with DG, {v['CFG.agreement'].value:.0%} with CFG and "
            f"{v['CFG+DG.agreement'].value:.0%} with both, and DG changes the Frechet distance to real images by "
            f"{v['contrast.none.frechet']:+.2f} alone ({v['none.frechet']:.2f} without guidance) and by "
            f"{v['contrast.cfg.frechet']:+.2f} beside CFG ({v['CFG.frechet']:.2f} with CFG)"
        )
    return text + (
        f"; replaying the shared blocks costs {v['DG.cost']:.2f} (DG) and {v['CFG+DG.cost']:.2f} (CFG + DG) of the "
        f"block evaluations of full passes.{_controls_of_guidance(v)}"
    )


def _controls_of_guidance(v: Values) -> str:
    """Other worse models in the place of DG's, at the same w."""
    names = {"blurred": "blurred attention", "autoguidance": "noise on all weights (autoguidance)"}
    if "blurred.frechet" not in v:
        return ""
    changes = [
        f"{name} {v[f'{key}.frechet'] - v['none.frechet']:+.2f} (DG minus it {v[f'contrast.{key}.frechet']:+.2f})"
        for key, name in names.items()
        if f"{key}.frechet" in v
    ]
    return f" Other worse models in DG's place, at the same w, change the Frechet distance by: {', '.join(changes)}."


def ablations(v: Values) -> str:
    """Section 5.3: which depth, w and lambda?"""
    middle = "an intermediate" if 0 < v["block.strongest"] < v["blocks"] - 1 else "an outer"
    return (
        f"On {v['model']} DG changes sharpness most when the edit is at block {v['block.strongest']} (m = "
        f"{v['block.strongest'] + 1} of {v['blocks']}, {middle} block; the paper: intermediate ones), by a ratio of "
        f"{v['block.strongest_ratio']:.2f}, against {v['block.last_ratio']:.2f} at the last block; sharpness "
        f"{_trend(v['w.rank_correlation'])} with w and {_trend(v['lambda.rank_correlation'])} with lambda."
        f"{_methods(v)}{_reuse(v)}{_regimes(v)}"
    )


def _methods(v: Values) -> str:
    """The comparison at equal cost, where there were enough images for a Frechet distance."""
    changes = {key.removesuffix(".frechet_change"): v[key] for key in v if key.endswith(".frechet_change")}
    if not changes:
        return ""
    better = sorted((name for name in changes if changes[name].high < 0), key=lambda name: changes[name].value)
    named = ", ".join(f"{name} ({changes[name]:+.2f})" for name in better) or "none"
    return (
        f" At the cost of CFG in {v['CFG.steps']} steps (Frechet distance {v['CFG.frechet']:.2f}) the methods with "
        f"a lower one are: {named}; CFG + DG at w = {v['CFG + DG.scale']:g} changes it by {changes['CFG + DG']:+.2f}."
    )


def _trend(rank_correlation: float) -> str:
    verb = "rises" if rank_correlation > 0.5 else "falls" if rank_correlation < -0.5 else "has no clear trend"
    return f"{verb} (rank correlation {rank_correlation:+.2f})"


def _reuse(v: Values) -> str:
    if "every step.reuse_cost" not in v:
        return ""
    return (
        f" Computing DG's direction in every 2nd step takes CFG + DG from {v['every step.reuse_cost']:.2f} to "
        f"{v['every 2nd step.reuse_cost']:.2f} times the cost of CFG and moves the images by "
        f"{v['every 2nd step.reuse_distance'].value:.2f} of what DG itself moves them."
    )


def _regimes(v: Values) -> str:
    """Whether both the paper's regime (detail only) and the later paper's (content lost) are visible."""
    if "regimes.largest.collapse_at" not in v:
        return ""

    def of(channels: str) -> str:
        at = v[f"regimes.{channels}.collapse_at"]
        detail, lost = (v[f"regimes.{channels}.{regime}"] for regime in ("detail only", "content lost"))
        first = f" (first at k = {at})" if at else ""
        return f"detail only in {detail} and the content in {lost} of {v['regimes.settings']} settings{first}"

    return f" Zeroing the k largest channels of one block costs {of('largest')}; k random channels cost {of('random')}."


def imagenet(v: Values) -> str:
    """Appendix H: does DG improve class-conditional and unconditional generation?"""
    rows = []
    for kind in ("uncond", "cond"):
        change = v[f"{kind}.frechet_change"]  # its ends are the extreme seed blocks, too few for a confidence interval
        way = "rises" if change.low > 0 else "falls" if change.high < 0 else "does not move the same way"
        rows.append(f"the {kind}itional Frechet distance {way} in every seed block ({change:+.3g})")
    return (
        f"On {v['model']} ({v['count']} images per seed block, Fashion-MNIST in place of ImageNet, another network's "
        f"features, so no FID) with DG at w = {v['w']:g} {' and '.join(rows)}"
        f"{_efficientnet(v)}; the paper reports lower FID for both."
    )


def _efficientnet(v: Values) -> str:
    if "efficientnet_count" not in v:
        return ""
    pairs = [
        f"from {v[f'{kind}.frechet_efficientnet']:.3g} to {v[f'{kind}+DG.frechet_efficientnet']:.3g} ({kind}itional)"
        for kind in ("uncond", "cond")
    ]
    return f", and with EfficientNet-Lite0's features of {v['efficientnet_count']} images it goes {' and '.join(pairs)}"


def ambiguities(v: Values) -> str:
    """How far each other reading of the paper takes the images from this book's reading."""
    named = {key.removesuffix(".distance"): v[key] for key in v if key.endswith(".distance")}
    others = sorted((n for n in named if n not in (readings.CFG, readings.OURS)), key=lambda n: -named[n].value)
    listed = ", ".join(f"{name} {named[name]:.2f}" for name in others)
    return (
        f"On {v['model']}, beside CFG, the images of the other readings differ from those of this book's reading by "
        f"these shares of what DG itself changes: {listed}."
    )


FINDINGS: dict[str, Callable[[Values], str]] = {
    "01_layer_properties": layer_properties,
    "02_timestep_vs_text": timestep_vs_text,
    "03_intervention": intervention,
    "04_detail_guidance": detail_guidance,
    "05_ablations": ablations,
    "06_imagenet": imagenet,
    "07_ambiguities": ambiguities,
}


@dataclass(frozen=True)
class Part:
    """One part of what the paper claims in a section, and when a model's numbers bear it out.

    Attributes:
        text: the claim.
        key: the value it rests on; a model without it was not measured.
        holds: wants the whole interval on the claimed side where there is an interval.
        numbers: what was measured.
        claims: the ids in `dgbook.claims.paper.claims` that it tests; none for what the paper does not claim.
        possible: whether it would hold at some ends of its intervals, where these are in an array.
    """

    text: str
    key: str
    holds: Callable[[Values], bool]
    numbers: Callable[[Values], str]
    claims: tuple[str, ...] = ()
    possible: Callable[[Values], bool] | None = None

    def outcome(self, values: Values) -> tuple[bool | None, str]:
        """Whether the part holds, None if it was not measured, and the numbers it rests on."""
        return (self.holds(values), self.numbers(values)) if self.key in values else (None, "")

    def word(self, values: Values) -> str:
        """The outcome in words.

        Returns:
            "holds"; "undecided" if it does not, but would with all intervals that it rests on at some of their ends;
            "does not hold"; "not measured".
        """
        if self.key not in values:
            return "not measured"
        used = _Used(values)
        if self.holds(used):
            return "holds"
        if self.possible is not None:
            return "undecided" if self.possible(values) else "does not hold"
        intervals = {key: values[key] for key in used.keys_read if isinstance(values[key], Interval)}
        ends = product(*([Interval(end, end, end) for end in (i.low, i.high)] for i in intervals.values()))
        possible = any(self.holds({**values, **dict(zip(intervals, chosen, strict=True))}) for chosen in ends)
        return "undecided" if possible else "does not hold"


class _Used(dict[str, Any]):
    """Values that remember which were asked for."""

    def __init__(self, values: Values) -> None:
        super().__init__(values)
        self.keys_read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.keys_read.add(key)
        return super().__getitem__(key)


def verdict(name: str, values: Values) -> tuple[str, list[str]]:
    """The verdict on one chapter's claim, and a line for each of its parts.

    Returns:
        "reproduced" when every measured part holds, "not reproduced" when none does, else how many of them do; "not
        measured" where no part was.
    """
    outcomes = [(part.word(values), part.outcome(values)[1]) for part in CLAIMS[name]]
    measured = [word == "holds" for word, _ in outcomes if word != "not measured"]
    held = sum(measured)
    word = "reproduced" if held == len(measured) else f"{held} of {len(measured)} parts reproduced"
    lines = [
        f"{part.text}: **{found}**{f' ({numbers})' if numbers else ''}"
        for part, (found, numbers) in zip(CLAIMS[name], outcomes, strict=True)
    ]
    return "not measured" if not measured else word if held else "not reproduced", lines


def outcomes(name: str, runs: Mapping[str, Record] | None = None) -> pd.DataFrame:
    """What holds of one chapter's claim in the reference run of each model: a row per part, a column per model.

    Args:
        name: a key of `CLAIMS`.
        runs: the runs by model; all reference runs by default.
    """
    columns = {}
    for model, record in (references(name) if runs is None else runs).items():
        values = record.decoded()
        parts = [(part.word(values), part.outcome(values)[1]) for part in CLAIMS[name]]
        cells = [f"{word}: {numbers}" if numbers else word for word, numbers in parts]
        columns[model] = [*cells, verdict(name, values)[0]]
    return pd.DataFrame(columns, index=[*(part.text for part in CLAIMS[name]), "verdict"])


def _kept(text: str, key: str, *claims: str) -> Part:
    return Part(text, key, lambda v: v[key].low > -0.05, lambda v: f"agreement {v[key]:+.2f}", claims)


def _least_at_last(v: Values) -> bool:
    return bool(np.abs(np.log(v["block.sharpness_ratio"][:, 1])).argmin() == v["blocks"] - 1)


def _sharpest(v: Values) -> Any:
    """(block, sharpness over that without guidance, low, high) of the block where DG makes images sharpest."""
    return max(v["block.sharpness_ratio"], key=lambda row: row[1])


def _others(v: Values) -> list[str]:
    """The methods at equal cost, but CFG + DG and no guidance at all."""
    names = [key.removesuffix(".frechet_change") for key in v if key.endswith(".frechet_change")]
    return [name for name in names if name not in ("CFG + DG", "none")]


def _best_other(v: Values) -> str:
    best = min(_others(v), key=lambda name: v[f"{name}.frechet_change"].value)
    return f"{best} {v[f'{best}.frechet_change']:+.2f}"


def _raised(kind: str, score: str, text: str, claim: str) -> Part:
    """DG raises a score of Table 6 beyond the spread of the seed blocks, which are the ends of its intervals."""
    plain, guided = f"{kind}.{score}", f"{kind}+DG.{score}"
    return Part(
        text,
        guided,
        lambda v: v[guided].low > v[plain].high,
        lambda v: f"{v[guided]:.2f} against {v[plain]:.2f}",
        (claim,),
    )


CLAIMS: dict[str, list[Part]] = {
    "01_layer_properties": [
        Part(
            "massive channels in every block",
            "blocks_with_massive",
            lambda v: v["blocks_with_massive"] == v["blocks"],
            lambda v: f"{v['blocks_with_massive']} of {v['blocks']} blocks, ratio up to {v['largest.ratio']:.1f}",
            ("4.1a", "B"),
        ),
        Part(
            "massive channels at fixed dims (massive in more than half of the blocks)",
            "fixed_dims",
            lambda v: len(v["fixed_dims"]) > 0,
            lambda v: f"dims {_listed(v['fixed_dims'])}" if len(v["fixed_dims"]) else "none",
            ("4.1d",),
        ),
        Part(
            "the largest channel is massive in at least 90 % of the image tokens",
            "largest.token_share",
            lambda v: v["largest.token_share"] >= 0.9,
            lambda v: f"in {v['largest.token_share']:.0%}",
            ("4.1e",),
        ),
    ],
    "02_timestep_vs_text": [
        Part(
            "the timestep explains more of the magnitude than the condition",
            "share.condition",
            lambda v: v["share.timestep"].low > v["share.condition"].high,
            lambda v: f"{v['share.timestep']:.2f} against {v['share.condition']:.2f}",
            ("4.1h",),
        ),
        Part(
            "the condition has minimal impact (less than a tenth of the variance)",
            "share.condition",
            lambda v: v["share.condition"].high < 0.1,
            lambda v: f"{v['share.condition']:.2f}",
            ("4.1g", "Cc"),
        ),
        Part(
            "the magnitude grows towards the image",
            "trend",
            lambda v: v["trend"].low > 1,
            lambda v: f"times {v['trend']:.2f}",
            ("4.1i", "Cb"),
        ),
        Part(
            "most residual gates peak at z's largest channel",
            "gates.same_largest",
            lambda v: 2 * v["gates.same_largest"] > v["gates.count"],
            lambda v: f"{v['gates.same_largest']} of {v['gates.count']} gates",
            ("4.1f", "Ca"),
        ),
    ],
    "03_intervention": [
        Part(
            "low spatial frequencies stay almost as they were (relative error below 0.05)",
            "massive.low_error",
            lambda v: v["massive.low_error"].high < ALMOST_NONE,
            lambda v: f"error {v['massive.low_error']:.3f}",
            ("4.2a",),
        ),
        Part(
            "high spatial frequencies change more than with as many random channels",
            "contrast.random.high_error",
            lambda v: v["contrast.random.high_error"].low > 0,
            lambda v: f"{v['contrast.random.high_error']:+.2f}",
            ("Dc",),
        ),
        Part(
            "as many random channels leave the images almost as they were (relative error below 0.05)",
            "random.high_error",
            lambda v: v["random.high_error"].high < ALMOST_NONE,
            lambda v: f"error {v['random.high_error']:.2f}",
            ("Db",),
        ),
        Part(
            "images become smoother",
            "massive.sharpness_ratio",
            lambda v: v["massive.sharpness_ratio"].high < 1,
            lambda v: f"sharpness times {v['massive.sharpness_ratio']:.2f}",
            ("4.2c", "4.3a", "Da"),
        ),
        _kept("fewer than 5 % of the images lose what was asked for", "contrast.original.agreement", "4.2a", "4.2b"),
        Part(
            "high spatial frequencies change more than with other channels of the same magnitude "
            "(a control that the paper lacks)",
            "contrast.matched.high_error",
            lambda v: v["contrast.matched.high_error"].low > 0,
            lambda v: f"{v['contrast.matched.high_error']:+.2f}",
            ("Dc",),
        ),
    ],
    "04_detail_guidance": [
        Part(
            "DG alone adds high-frequency energy",
            "DG.high_frequency_change",
            lambda v: v["DG.high_frequency_change"].low > 0,
            lambda v: f"share {v['DG.high_frequency_change']:+.4f}",
            ("4.3b", "5.2b"),
        ),
        Part(
            "DG beside CFG adds high-frequency energy",
            "contrast.cfg.high_frequency_change",
            lambda v: v["contrast.cfg.high_frequency_change"].low > 0,
            lambda v: f"share {v['contrast.cfg.high_frequency_change']:+.4f}",
            ("4.3d", "5.2f"),
        ),
        _kept("fewer than 5 % of the images lose what was asked for by DG alone", "contrast.none.agreement"),
        _kept("fewer than 5 % of the images lose what was asked for by DG beside CFG", "contrast.cfg.agreement"),
        Part(
            "DG alone brings the images closer to real ones (Frechet distance)",
            "contrast.none.frechet",
            lambda v: v["contrast.none.frechet"].high < 0,
            lambda v: f"{v['contrast.none.frechet']:+.2f}, from {v['none.frechet']:.2f}",
            ("5.2b",),
        ),
        Part(
            "DG beside CFG brings the images closer to real ones (Frechet distance)",
            "contrast.cfg.frechet",
            lambda v: v["contrast.cfg.frechet"].high < 0,
            lambda v: f"{v['contrast.cfg.frechet']:+.2f}, from {v['CFG.frechet']:.2f}",
            ("4.3d", "5.2f"),
        ),
        Part(
            "DG alone finds what was asked for in more of the images",
            "contrast.none.agreement",
            lambda v: v["contrast.none.agreement"].low > 0,
            lambda v: f"agreement {v['contrast.none.agreement']:+.2f}",
            ("5.2a",),
        ),
        Part(
            "DG alone leaves low spatial frequencies almost as they were (relative error below 0.05)",
            "DG.low_error",
            lambda v: v["DG.low_error"].high < ALMOST_NONE,
            lambda v: f"error {v['DG.low_error']:.3f}",
            ("5.2c",),
        ),
        Part(
            "DG alone adds more high-frequency energy than CFG alone",
            "CFG.high_frequency_change",
            lambda v: v["DG.high_frequency_change"].low > v["CFG.high_frequency_change"].high,
            lambda v: f"share {v['DG.high_frequency_change']:+.4f} against {v['CFG.high_frequency_change']:+.4f}",
            ("5.2d",),
        ),
        Part(
            "CFG finds what was asked for in more of the images than DG does",
            "CFG.agreement",
            lambda v: v["CFG.agreement"].low > v["DG.agreement"].high,
            lambda v: f"{v['CFG.agreement']:.0%} against {v['DG.agreement']:.0%}",
            ("5.2e",),
        ),
    ],
    "05_ablations": [
        Part(
            "DG makes images sharpest at an intermediate block",
            "block.sharpness_ratio",
            lambda v: 0 < _sharpest(v)[0] < v["blocks"] - 1 and _sharpest(v)[2] > 1,
            lambda v: f"block {_sharpest(v)[0]:.0f} of 0 to {v['blocks'] - 1}, sharpness times {_sharpest(v)[1]:.2f}",
            ("5.3a",),
        ),
        Part(
            "DG acts least at the last block",
            "block.last_ratio",
            _least_at_last,
            lambda v: f"sharpness times {v['block.last_ratio']:.2f} there",
            ("5.3b",),
        ),
        Part(
            "fewer than 5 % of the images lose what was asked for, at every w of the sweep",
            "w.agreement_change",
            lambda v: bool((v["w.agreement_change"][:, 2] > -0.05).all()),  # columns: w, value, low, high
            lambda v: "agreement " + ", ".join(f"{row[1]:+.2f} (w = {row[0]:g})" for row in v["w.agreement_change"]),
            ("5.3c",),
            possible=lambda v: bool((v["w.agreement_change"][:, 3] > -0.05).all()),
        ),
        Part(
            "at the cost of CFG, CFG + DG comes closer to real images than CFG (Frechet distance)",
            "CFG + DG.frechet_change",
            lambda v: v["CFG + DG.frechet_change"].high < 0,
            lambda v: f"{v['CFG + DG.frechet_change']:+.2f}, from {v['CFG.frechet']:.2f}",
            ("5.2h",),
        ),
        Part(
            "at the cost of CFG, CFG + DG comes closer to real images than every other method",
            "CFG + DG.frechet_change",
            lambda v: v["CFG + DG.frechet_change"].high < min([v[f"{name}.frechet_change"].low for name in _others(v)]),
            lambda v: f"{v['CFG + DG.frechet_change']:+.2f}; {_best_other(v)}",
            ("5.2h",),
        ),
    ],
    "06_imagenet": [
        Part(
            "DG lowers the unconditional Frechet distance, in every seed block",
            "uncond.frechet_change",
            lambda v: v["uncond.frechet_change"].high < 0,
            lambda v: f"{v['uncond.frechet_change']:+.2f}",
            ("Ha",),
        ),
        Part(
            "DG lowers the conditional Frechet distance, in every seed block",
            "cond.frechet_change",
            lambda v: v["cond.frechet_change"].high < 0,
            lambda v: f"{v['cond.frechet_change']:+.2f}",
            ("Hb",),
        ),
        _raised("uncond", "is", "DG raises the unconditional Inception Score", "Ha"),
        _raised("cond", "is", "DG raises the conditional Inception Score", "Hb"),
        _raised("uncond", "precision", "DG raises the unconditional precision", "Ha"),
        _raised("cond", "precision", "DG raises the conditional precision", "Hb"),
    ],
}
