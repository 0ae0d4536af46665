"""The cards (`README.md`) of the shipped models: templates filled from `training.json` and `quality.json`."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from training import text, tiles

PSNR_BAR, AGREEMENT_BAR, RATIO_BAR = 28.0, 0.85, 8.0
TILE_PSNR_BAR = 30.0

FAMILIES = {
    "tiny-sd3": "`SD3Transformer2DModel`, two CLIP text encoders, a T5 encoder, `AutoencoderKL` and "
    "`FlowMatchEulerDiscreteScheduler` in a `StableDiffusion3Pipeline`",
    "tiny-flux": "`FluxTransformer2DModel`, a CLIP text encoder, a T5 encoder, `AutoencoderKL` and "
    "`FlowMatchEulerDiscreteScheduler` in a `FluxPipeline`",
}

Rows = list[tuple[str, ...]]


def write(folder: Path, training: dict[str, Any], quality: dict[str, Any], **facts: Any) -> None:
    """Write the card of the model in `folder`.

    Args:
        folder: of the model; `README.md` is written there.
        training: the contents of its `training.json`.
        quality: the contents of its `quality.json`.
        facts: what else its template needs: the text-to-image models' "caption_dropout".
    """
    name = training["model"]
    template = TEMPLATES.get_template(f"{'text-to-image' if name in FAMILIES else name}.md")
    family = FAMILIES.get(name)
    (folder / "README.md").write_text(
        template.render(training=training, quality=quality, family=family, **facts), encoding="utf-8"
    )


def limits(quality: dict[str, Any]) -> str:
    """Known failures: first those that the numbers show, then what holds for any model of this size and data."""
    s, matching = quality["guidance_scale"], quality["matching"]
    real, guided = matching["held_out"], at_scale(matching["held_out_captions"], s)
    unguided, unseen = at_scale(matching["held_out_captions"], 1.0), at_scale(matching["unseen_colours"], s)
    sharp = {scale: at_scale(quality["guidance"], scale)["sharpness_of_real"] for scale in (1.0, s)}
    found = []
    if guided["high"] < real["low"]:
        found.append(
            f"Samples show their captions less often than real tiles do ({guided['share']:.0%} against "
            f"{real['share']:.0%} by the matcher, held-out captions, guidance scale {s:g})."
        )
    if guided["low"] > real["high"]:
        found.append(
            f"The matcher recognises guided samples more often than real tiles ({guided['share']:.0%} against "
            f"{real['share']:.0%}): they are more typical, like the training tiles that it learnt from, not better."
        )
    if unguided["high"] < guided["low"]:
        found.append(
            f"Without classifier-free guidance the text counts for less: {unguided['share']:.0%} instead of "
            f"{guided['share']:.0%}."
        )
    if unseen["high"] < matching["held_out_colours"]["low"]:
        found.append(
            f"New colours of known objects often fail: {unseen['share']:.0%} of the unseen combinations have "
            f"the colour asked for by the matcher, {matching['held_out_colours']['share']:.0%} of real held-out tiles."
        )
    found += [
        f"Samples are {'softer' if ratio < 1 else 'sharper'} than real tiles {words}: {ratio:.2f} of their sharpness."
        for (scale, ratio), words in zip(sharp.items(), ("without guidance", f"at guidance scale {s:g}"), strict=True)
        if not 0.9 < ratio < 1.1
    ]
    generic = (
        "It knows the words of the captions, in their order (colour, object, categories), and no sentences. Unknown "
        "words fall apart into letters that mean nothing.",
        f"Prompts are cut after {text.LENGTH} tokens.",
        "Captions are made from file names: some say little about the picture, some say it in the game's own terms.",
        "One sprite on grey, 32 x 32, from one game. What holds here need not hold for large models.",
        "One training from one seed: another would differ in its massive channels and its failures.",
    )
    return "\n".join(f"* {sentence}" for sentence in (*found, *generic))


def memorisation_in_words(copies: dict[str, Any], guidance_scale: float) -> str:
    """What `text_quality.compared` found, said plainly."""
    samples, fresh = copies["samples"], copies["held_out"]
    near, threshold = samples["near"], copies["threshold"]
    if near["low"] > fresh["near"]["high"]:
        verdict = (
            f"**It memorises.** {interval(near)} of the samples are within {threshold:g} grey levels of a training "
            f"tile, as near as the near-duplicates that the split keeps together; of held-out tiles "
            f"{interval(fresh['near'])}."
        )
    elif near["share"] > 0:
        verdict = (
            f"{interval(near)} of the samples are within {threshold:g} grey levels of a training tile, as near as the "
            f"near-duplicates that the split keeps together; of held-out tiles {interval(fresh['near'])}, so "
            f"copying is not shown."
        )
    else:
        verdict = (
            f"No copies were found: none of {near['n']} samples is within {threshold:g} grey levels of a training tile "
            f"(at most {near['high']:.1%} of all samples are, with 95 % confidence)."
        )
    a, b = samples["median"], fresh["median"]
    medians = f"(median {a['value']:.1f} [{a['low']:.1f}, {a['high']:.1f}] against {b['value']:.1f} \
[{b['low']:.1f}, {b['high']:.1f}])"
    if a["high"] < b["low"]:
        typical = f"Samples are typically nearer to a training tile than a held-out tile is {medians}."
    elif a["low"] > b["high"]:
        typical = f"Samples are typically farther from any training tile than a held-out tile is {medians}."
    else:
        typical = f"Samples are typically as far from the training tiles as held-out tiles are {medians}."
    return f"{verdict} {typical} {near['n']} random training captions, guidance scale {guidance_scale:g}."


def memorisation_rows(copies: dict[str, Any]) -> Rows:
    """The histogram of distances to the nearest training tile, in shares."""
    edges = copies["edges"]
    rows: Rows = [("distance to the nearest training tile", "samples", "held-out tiles")]
    for low, high, *counts in zip(
        edges, edges[1:], copies["samples"]["histogram"], copies["held_out"]["histogram"], strict=False
    ):
        if any(counts):
            totals = copies["samples"]["near"]["n"], copies["held_out"]["near"]["n"]
            shares = (f"{count / total:.1%}" for count, total in zip(counts, totals, strict=True))
            rows.append((f"{low} to {high}" if high <= 255 else f"{low} and more", *shares))
    return rows


def matching_rows(matching: dict[str, Any]) -> Rows:
    """What `tile-matcher` says of real tiles and of samples."""
    rows: Rows = [("images", "guidance scale", "captions", "colours")]
    for split, words in (("held_out", "real held-out tiles"), ("training", "real training tiles")):
        rows.append((words, "", interval(matching[split]), interval(matching[f"{split}_colours"])))
    for row in matching["held_out_captions"]:
        rows.append((f"{row['n']} samples, held-out tiles' captions", f"{row['guidance_scale']:g}", interval(row), ""))
    for row, colours in zip(matching["unseen_combinations"], matching["unseen_colours"], strict=True):
        name = f"{row['n']} samples, unseen combinations"
        rows.append((name, f"{row['guidance_scale']:g}", interval(row), interval(colours)))
    return rows


def loss_rows(losses: list[dict[str, float]]) -> Rows:
    """`measuring.mean_losses` as a table."""
    body = [(f"{row['step']:,}", f"{row['loss']:.4f}", f"{row['seconds'] / 60:.1f} min") for row in losses]
    return [("step", "mean loss", "time"), *body]


def massive_in_words(massive: list[dict[str, Any]], inputs: str) -> str:
    """What the table of `massive_rows` shows."""
    fixed, blocks_with_it = Counter(massive[-1]["dim"]).most_common(1)[0]
    return (
        "Mean |z| of the largest channel over that of the median channel (and which channel that is"
        f"{', and its share of the energy' if 'energy' in massive[-1] else ''}), per block, after so many steps of "
        f"training: averaged weights, {inputs}. In the last snapshot, channel {fixed} is the largest "
        f"in {blocks_with_it} of {len(massive[-1]['dim'])} blocks."
    )


def massive_rows(massive: list[dict[str, Any]]) -> Rows:
    """`measuring.largest_channels` as a table."""
    head = ("step", *(f"block {block}" for block in range(len(massive[-1]["ratio"]))))
    rows: Rows = [head]
    for row in massive:
        energy = [f", {share:.0%}" for share in row["energy"]] if "energy" in row else [""] * len(row["dim"])
        cells = zip(row["ratio"], row["dim"], energy, strict=True)
        rows.append((f"{row['step']:,}", *(f"{ratio:.1f} ({dim}{share})" for ratio, dim, share in cells)))
    return rows


def guidance_rows(guidance: list[dict[str, float]]) -> Rows:
    """The rows of `measuring.calibrate_guidance` as a table."""
    rows: Rows = [("guidance scale", "w", "Frechet distance", "agreement", "sharpness / real")]
    for row in guidance:
        numbers = f"{row['frechet']:#.3g}", f"{row['agreement']:.1%}", f"{row['sharpness_of_real']:.2f}"
        rows.append((f"{row['guidance_scale']:g}", f"{row['w']:g}", *numbers))
    return rows


def best_w(guidance: list[dict[str, float]], guidance_scale: float) -> float:
    """The positive w of `measuring.calibrate_guidance` with the lowest Frechet distance at this guidance scale."""
    of_scale = [row for row in guidance if row["guidance_scale"] == guidance_scale and row["w"] > 0]
    return min(of_scale, key=lambda row: row["frechet"])["w"]


def w_in_words(guidance: list[dict[str, float]], guidance_scale: float) -> str:
    """`best_w` of both settings, and whether no guidance at all has a lower distance."""
    words = []
    with_cfg = f"at guidance scale {guidance_scale:g}"
    for scale, where in ((1.0, "without classifier-free guidance"), (guidance_scale, with_cfg)):
        rows = [row for row in guidance if row["guidance_scale"] == scale]
        lowest = min(rows, key=lambda row: row["frechet"])["w"]
        words.append(
            f"w = {best_w(guidance, scale):g} {where}" + (", where w = 0 has a lower one" if lowest == 0 else "")
        )
    return f"The lowest distance above w = 0, which is the preset's w: {'; '.join(words)}."


def at_scale(rows: list[dict[str, float]], guidance_scale: float) -> dict[str, float]:
    """The first row of this guidance scale."""
    return next(row for row in rows if row["guidance_scale"] == guidance_scale)


def networks(training: dict[str, Any]) -> Rows:
    """What each network's training took."""
    rows: Rows = [
        ("network", "parameters", "steps", "batch", "time", "device", "mean loss of the last 100 steps", "torch")
    ]
    for name, n in training["networks"].items():
        place = f"CPU, {n['threads']} thread(s)" if n["device"] == "CPU" else n["device"]
        facts = (f"{n['parameters']:,}", f"{n['steps']:,}", f"{n['batch']}", f"{n['seconds'] / 60:.0f} min")
        rows.append((name, *facts, place, f"{n['mean_loss_of_last_100_steps']:.4f}", n["torch"]))
    return rows


def interval(row: dict[str, float]) -> str:
    """A share (`text_quality.share`) with its interval."""
    return f"{row['share']:.1%} [{row['low']:.1%}, {row['high']:.1%}]"


def table(rows: Rows) -> str:
    """A Markdown table; the first row is its head."""
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body])


def verdict(met: bool) -> str:
    """Whether a bar is met."""
    return "met" if met else "**not met**"


def by_class(shares: dict[str, float]) -> str:
    """Shares with their names, in one line."""
    return ", ".join(f"{name} {share:.1%}" for name, share in shares.items())


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "card_templates"),
    undefined=StrictUndefined,
    keep_trailing_newline=True,
    trim_blocks=True,
    autoescape=False,  # Markdown, from our own numbers
)
TEMPLATES.filters["as"] = format
TEMPLATES.globals |= {
    function.__name__: function
    for function in (
        at_scale, by_class, guidance_rows, interval, limits, loss_rows, massive_in_words, massive_rows, matching_rows,
        memorisation_in_words, memorisation_rows, networks, table, verdict, w_in_words,
    )
} | {
    "json": json.dumps,
    "psnr_bar": PSNR_BAR, "agreement_bar": AGREEMENT_BAR, "ratio_bar": RATIO_BAR, "tile_psnr_bar": TILE_PSNR_BAR,
    "background": tiles.BACKGROUND, "rare": tiles.RARE, "near": tiles.NEAR,
}  # fmt: skip
