"""One plain sentence per notebook, made from its measured numbers, whichever way they went."""

from collections.abc import Callable, Mapping
from typing import Any

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
        return (
            f"No channel of {v['model']} is massive: the largest, channel {v['largest.dim']} of block "
            f"{v['largest.block']}, reaches {v['largest.ratio']:.1f} times its block's median, below the threshold of {v['threshold']:g}."
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
        f"which {direction} from noise to image (ratio {v['trend']:.2f}; the paper: grows, by timestep); the residual gate's "
        f"largest channel is z's largest in {v['gates.same_largest']} of {v['gates.count']} gates, with a median rank "
        f"correlation of {v['gates.rank_correlation']:.2f}."
    )


def intervention(v: Values) -> str:
    """Section 4.2: does disrupting massive activations cost detail rather than content, and more than the controls?"""
    detail = _side(v["contrast.high_error"], 0.0, "more", "less")
    ratio = v["massive.high_error"].value / max(v["massive.low_error"].value, 1e-12)
    sharp = _side(v["massive.sharpness_ratio"], 1.0, "sharper", "smoother")
    text = (
        f"Zeroing channel{'s' * (len(v['dims']) > 1)} {_listed(v['dims'])} after block {v['block']} of {v['model']} "
        f"leaves a relative error of {v['massive.low_error']:.3f} at low and {v['massive.high_error']:.3f} at high spatial "
        f"frequencies ({ratio:.0f} times as much), {detail} than zeroing as many random channels does "
        f"(high: {v['random.high_error']:.3f}), and makes the images {sharp} (sharpness ratio "
        f"{v['massive.sharpness_ratio']:.2f})"
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
        f"With w = {v['w']:g} at block {v['block']} of {v['model']}, DG alone gives {alone} high-frequency energy "
        f"(share {v['DG.high_frequency_change']:+.4f}) than no guidance, and CFG + DG {beside} than CFG "
        f"({v['contrast.cfg.high_frequency_change']:+.4f})"
    )
    if "DG.class_agreement" in v:
        text += (
            f"; the classifier agrees with the class in {v['none.class_agreement'].value:.0%} without guidance, "
            f"{v['DG.class_agreement'].value:.0%} with DG, {v['CFG.class_agreement'].value:.0%} with CFG and "
            f"{v['CFG+DG.class_agreement'].value:.0%} with both"
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
    )


def _trend(rank_correlation: float) -> str:
    verb = "rises" if rank_correlation > 0.5 else "falls" if rank_correlation < -0.5 else "has no clear trend"
    return f"{verb} (rank correlation {rank_correlation:+.2f})"


def imagenet(v: Values) -> str:
    """Appendix H: does DG improve class-conditional and unconditional generation?"""
    rows = []
    for kind in ("uncond", "cond"):
        change = v[f"{kind}.frechet_change"]
        rows.append(f"{_side(change, 0.0, 'raises', 'lowers')} the Frechet distance by {change:+.3g} ({kind}itional)")
    return (
        f"On {v['model']} ({v['count']} images per seed block, Fashion-MNIST in place of ImageNet, another network's "
        f"features, so no FID) DG at w = {v['w']:g} " + " and ".join(rows) + "; the paper reports lower FID for both."
    )


FINDINGS: dict[str, Callable[[Values], str]] = {
    "01_layer_properties": layer_properties,
    "02_timestep_vs_text": timestep_vs_text,
    "03_intervention": intervention,
    "04_detail_guidance": detail_guidance,
    "05_ablations": ablations,
    "06_imagenet": imagenet,
}
