"""One plain sentence per notebook, made from its measured numbers, and the verdict on the paper's claim."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dgkit.stats import Interval

Values = Mapping[str, Any]


def _listed(dims: Any) -> str:
    words = [str(int(d)) for d in dims]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


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
    leads = "timestep" if v["share.timestep"].low > v["share.condition"].high else "condition"
    if v["share.timestep"].low <= v["share.condition"].high and v["share.condition"].low <= v["share.timestep"].high:
        leads = "neither clearly"
    return (
        f"At block {v['block']} of {v['model']}, the timestep explains {v['share.timestep']:.2f} and the condition "
        f"{v['share.condition']:.2f} of the variance of channel {v['dim']}'s magnitude (the larger share: {leads}), "
        f"which {direction} from noise to image (ratio {v['trend']:.2f}; the paper: grows, by timestep); the residual "
        f"gate's largest channel is z's largest in {v['gates.same_largest']} of {v['gates.count']} gates, with a "
        f"median rank correlation of {v['gates.rank_correlation']:.2f}."
    )


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
    if "massive.class_agreement" in v:
        text += (
            f"; the classifier sees the class asked for in {v['massive.class_agreement'].value:.0%} of them, against "
            f"{v['original.class_agreement'].value:.0%} of the originals"
        )
    return text + "."


def detail_guidance(v: Values) -> str:
    """Section 4.3: does DG add detail, alone and beside CFG, and at which cost?"""
    alone = _side(v["DG.high_frequency_change"], 0.0, "more", "less")
    beside = _side(v["contrast.cfg.high_frequency_change"], 0.0, "more", "less")
    text = (
        f"With w = {v['w']:g} alone and {v['w_cfg']:g} beside CFG, at block {v['block']} of {v['model']}, DG alone "
        f"gives {alone} high-frequency energy (share {v['DG.high_frequency_change']:+.4f}) than no guidance, and "
        f"CFG + DG {beside} than CFG ({v['contrast.cfg.high_frequency_change']:+.4f})"
    )
    if "DG.class_agreement" in v:
        text += (
            f"; the classifier agrees with the class in {v['none.class_agreement'].value:.0%} without guidance, "
            f"{v['DG.class_agreement'].value:.0%} with DG, {v['CFG.class_agreement'].value:.0%} with CFG and "
            f"{v['CFG+DG.class_agreement'].value:.0%} with both, and DG changes the Frechet distance to real images by "
            f"{v['contrast.none.frechet']:+.2f} alone ({v['none.frechet']:.2f} without guidance) and by "
            f"{v['contrast.cfg.frechet']:+.2f} beside CFG ({v['CFG.frechet']:.2f} with CFG)"
        )
    return text + (
        f"; replaying the shared blocks costs {v['DG.cost']:.2f} (DG) and {v['CFG+DG.cost']:.2f} (CFG + DG) of the "
        f"block evaluations of full passes."
    )


def ablations(v: Values) -> str:
    """Section 5.3: which depth, w and lambda?"""
    middle = "an intermediate" if 0 < v["block.strongest"] < v["blocks"] - 1 else "an outer"
    return (
        f"On {v['model']} DG changes sharpness most when the edit is at block {v['block.strongest']} (m = "
        f"{v['block.strongest'] + 1} of {v['blocks']}, {middle} block; the paper: intermediate ones), by a ratio of "
        f"{v['block.strongest_ratio']:.2f}, against {v['block.last_ratio']:.2f} at the last block; sharpness "
        f"{_trend(v['w.rank_correlation'])} with w and {_trend(v['lambda.rank_correlation'])} with lambda."
        f"{_methods(v)}{_reuse(v)}"
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


FINDINGS: dict[str, Callable[[Values], str]] = {
    "01_layer_properties": layer_properties,
    "02_timestep_vs_text": timestep_vs_text,
    "03_intervention": intervention,
    "04_detail_guidance": detail_guidance,
    "05_ablations": ablations,
    "06_imagenet": imagenet,
}


@dataclass(frozen=True)
class Part:
    """One part of what the paper claims in a section, and when a model's numbers bear it out.

    `holds` wants the whole interval on the claimed side where there is an interval; None where it was not measured.
    """

    text: str
    holds: Callable[[Values], bool | None]


def verdict(name: str, values: Values) -> tuple[str, list[str]]:
    """The verdict on one chapter's claim, and a line for each of its parts.

    Returns:
        "reproduced" when every measured part holds, "not reproduced" when none does, else how many of them do.
    """
    outcomes = [(part.text, part.holds(values)) for part in CLAIMS[name]]
    measured = [holds for _, holds in outcomes if holds is not None]
    held = sum(measured)
    word = "reproduced" if held == len(measured) else f"{held} of {len(measured)} parts reproduced"
    words = {True: "holds", False: "does not hold", None: "not measured on this model"}
    return word if held else "not reproduced", [f"{text}: **{words[holds]}**" for text, holds in outcomes]


def _class_kept(key: str) -> Callable[[Values], bool | None]:
    return lambda v: v[key].low > -0.05 if key in v else None


CLAIMS: dict[str, list[Part]] = {
    "01_layer_properties": [
        Part("massive channels in every block", lambda v: v["blocks_with_massive"] == v["blocks"]),
        Part("at fixed dims (massive in more than half of the blocks)", lambda v: len(v["fixed_dims"]) > 0),
        Part("in at least 90 % of the image tokens", lambda v: v["largest.token_share"] >= 0.9),
    ],
    "02_timestep_vs_text": [
        Part(
            "the timestep explains more of the magnitude than the condition",
            lambda v: v["share.timestep"].low > v["share.condition"].high,
        ),
        Part("the magnitude grows towards the image", lambda v: v["trend"].low > 1),
        Part(
            "most residual gates peak at z's largest channel", lambda v: 2 * v["gates.same_largest"] > v["gates.count"]
        ),
    ],
    "03_intervention": [
        Part(
            "high spatial frequencies change more than low ones",
            lambda v: v["massive.high_error"].low > v["massive.low_error"].high,
        ),
        Part("more than with as many random channels", lambda v: v["contrast.random.high_error"].low > 0),
        Part("images become smoother", lambda v: v["massive.sharpness_ratio"].high < 1),
        Part(
            "fewer than 5 % of the images lose their class",
            lambda v: (
                v["massive.class_agreement"].low > v["original.class_agreement"].value - 0.05
                if "massive.class_agreement" in v
                else None
            ),
        ),
        Part(
            "more than with other channels of the same magnitude (a control that the paper lacks)",
            lambda v: v["contrast.matched.high_error"].low > 0,
        ),
    ],
    "04_detail_guidance": [
        Part("DG alone adds high-frequency energy", lambda v: v["DG.high_frequency_change"].low > 0),
        Part("DG beside CFG adds it too", lambda v: v["contrast.cfg.high_frequency_change"].low > 0),
        Part("fewer than 5 % of the images lose their class by DG alone", _class_kept("contrast.none.class_agreement")),
        Part("nor by DG beside CFG", _class_kept("contrast.cfg.class_agreement")),
        Part(
            "DG alone brings the images closer to real ones (Frechet distance)",
            lambda v: v["contrast.none.frechet"].high < 0 if "contrast.none.frechet" in v else None,
        ),
        Part(
            "and so does DG beside CFG",
            lambda v: v["contrast.cfg.frechet"].high < 0 if "contrast.cfg.frechet" in v else None,
        ),
    ],
    "05_ablations": [
        Part("DG acts most strongly at an intermediate block", lambda v: 0 < v["block.strongest"] < v["blocks"] - 1),
        Part(
            "and least at the last",
            lambda v: bool(np.abs(np.log(v["block.sharpness_ratio"][:, 1])).argmin() == v["blocks"] - 1),
        ),
    ],
    "06_imagenet": [
        Part(
            "DG lowers the unconditional Frechet distance, in every seed block",
            lambda v: v["uncond.frechet_change"].high < 0,
        ),
        Part("and the conditional one", lambda v: v["cond.frechet_change"].high < 0),
    ],
}
