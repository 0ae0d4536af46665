"""The cards (`README.md`) of the shipped models, written from the contents of `training.json` and `quality.json`."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from training import flow, text, tiles

PSNR_BAR, AGREEMENT_BAR, RATIO_BAR = 28.0, 0.85, 8.0
TILE_PSNR_BAR = 30.0

Rows = list[tuple[str, ...]]


def write_dit_card(folder: Path, training: dict[str, Any], quality: dict[str, Any]) -> None:
    """Write the card of `tiny-dit`."""
    peak = max(quality["massive"][-1]["ratio"])
    guidance = f"guidance scale {quality['guidance_scale']:g}, {quality['steps']} steps"
    measured: Rows = [
        ("", "measured", "bar", ""),
        (
            f"PSNR of the autoencoder, mean over {quality['psnr_images']:,} test images",
            f"{quality['psnr_db']:.2f} dB",
            f"{PSNR_BAR:g} dB",
            verdict(quality["psnr_db"] >= PSNR_BAR),
        ),
        (
            f"samples that the classifier assigns to their class, {guidance}",
            f"{quality['agreement']:.1%}",
            f"{AGREEMENT_BAR:.0%}",
            verdict(quality["agreement"] >= AGREEMENT_BAR),
        ),
        ("the same without classifier-free guidance", f"{quality['agreement_without_cfg']:.1%}", "", ""),
        (
            "largest channel over its block's median, last snapshot",
            f"{peak:.1f}",
            f"{RATIO_BAR:g}",
            verdict(peak >= RATIO_BAR),
        ),
    ]
    card = f"""# tiny-dit

A small latent, class-conditional diffusion transformer in the classes of the real one: `DiTTransformer2DModel`,
`AutoencoderKL` and `DDIMScheduler` in a `DiTPipeline`. 28 x 28 images of ten classes of clothing. Nothing in it
is planted: whatever its activations do came from training alone.

```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("data/models/tiny-dit")
image = pipe(
    pipe.get_label_ids(["sneaker"]),
    generator=torch.Generator().manual_seed(0),
    guidance_scale={quality["guidance_scale"]:g},
    num_inference_steps={quality["steps"]},
).images[0]
```

![ten samples of each class](samples.png)

{guidance.capitalize()}, seeds 0 to 99, none left out.

## Data and recipe

Data: {training["data"]}; its training split only. Grey pixels are repeated to three channels.
The whole recipe is `tiny-dit.toml` beside this card; `python -m training train tiny-dit` repeats it. Weights: \
{quality["bytes"] / 1e6:.1f} MB of safetensors in bfloat16.

{table(networks(training))}

## Measured quality

{table(measured)}

{quality["samples"]:,} samples of balanced classes, sample i from the noise of seed i, judged by `fashion-classifier`,
which never saw a sample. With guidance, by class: {by_class(quality["agreement_of_class"])}.

## Massive activations over training

{massive_in_words(quality["massive"], "100 noised test images, ten timesteps")}

{table(massive_rows(quality["massive"]))}

## Detail Guidance

Over a grid of w at the preset's block and dims: {quality["guidance_samples"]} samples from seeds of their own, Frechet
distance of `fashion-classifier`'s features to the training set (not an FID), agreement with the class, and sharpness
(variance of the Laplacian) relative to real images. The preset's w, without and with classifier-free guidance,
are those of the grid whose sharpness comes closest to real images'.

{table(guidance_rows(quality["guidance"]))}

## Limits

* Only the noise half of the output is trained. The learned-sigma half stays exactly zero, as initialised, so samplers
  that use it (DDPM with learned variance) do not work; DDIM does not use it.
* Ten labels, 0 to 9, and the null label 1000; the other rows of the label tables are zero and mean nothing.
* 28 x 28 grey images: what holds here need not hold for large models.

Licence: MIT, as the data.
"""
    (folder / "README.md").write_text(card)


def write_classifier_card(folder: Path, training: dict[str, Any], quality: dict[str, Any]) -> None:
    """Write the card of `fashion-classifier`."""
    card = f"""# fashion-classifier

A small convolutional network that judges samples of `tiny-dit`: ten logits say which class an image shows; its 64
penultimate features take the place that Inception's features have on ImageNet. Distances between them are not FID.

```python
from dgbook.measures.classifier import load_classifier

model = load_classifier()
logits, features = model(images), model.features(images)  # images: uint8 (N, 28, 28, 3)
```

Accuracy on the {quality["test_images"]:,} images of the real test set: {quality["accuracy"]:.2%}.
By class: {by_class(quality["accuracy_of_class"])}.

Data: {training["data"]}; its training split only, never a generated image.
The whole recipe is `fashion-classifier.toml` beside this card; `python -m training train \
fashion-classifier` repeats it. Weights: {quality["bytes"] / 1e3:.0f} kB of safetensors in float16, loaded as float32.

{table(networks(training))}

Licence: MIT, as the data.
"""
    (folder / "README.md").write_text(card)


def write_matcher_card(folder: Path, training: dict[str, Any], quality: dict[str, Any]) -> None:
    """Write the card of `tile-matcher`."""
    choices, colours = quality["choices"], quality["colours"]
    measured: Rows = [
        ("real tiles", "nearest to their own caption", "nearest to their own colour"),
        *(
            (words, interval(quality[split]), interval(quality[f"{split}_colours"]))
            for split, words in (("held_out", "held out"), ("training", "of its own training"))
        ),
        ("chance", f"{1 / choices:.1%}", f"{1 / colours:.1%}"),
    ]
    card = f"""# tile-matcher

A small dual encoder after CLIP (Radford et al. 2021) that judges samples of `tiny-sd3` and `tiny-flux`: images and
captions become points on one sphere, and an image shows a caption if this is the nearest of several. Its penultimate
image features take the place that Inception's features have on ImageNet. Distances between them are not FID.

```python
from dgbook.measures.matcher import load_matcher, matching_score

matcher = load_matcher()
right = matching_score(matcher, images, captions)  # images: uint8 (N, 32, 32, 3); bool (N,)
similarity, features = matcher.similarity(images, captions), matcher.features(images)
```

## Measured on real tiles

{table(measured)}

Shares with Wilson's 95 % intervals. Nearest to its own caption: of {choices} distinct captions of the same split, the
other {choices - 1} drawn at random for each tile. Nearest to its own colour: tiles whose caption names one colour,
between this caption and the same with each other colour ({colours} in all). The first row is what new tiles reach; the
second is higher by what the matcher knows by heart, and samples that resemble training tiles share in that.

## Data and recipe

Data: {training["data"]}; the tiles that the generators were trained on too, never a generated image, and it
shares no weight with them. The whole recipe is `tile-matcher.toml` beside this card; `python -m training \
train tile-matcher` repeats it.
Weights: {quality["bytes"] / 1e3:.0f} kB of safetensors in float16, loaded as float32.

{table(networks(training))}

## Limits

* Captions are bags of words made from file names: it knows no order and no grammar, ignores words that it does not
  know, and inherits every name that says little about the picture.
* Random captions mostly differ in kind (a ring, a wall, a dragon), so finding one's own among them says that the kind
  is right more than that each word is. The colours are the harder question.
* It errs on real tiles too: read a sample's score beside that of real tiles, not as a probability of being right.
* Held-out tiles come in groups of variants, so they are fewer independent cases than their number, and the intervals
  are somewhat too narrow.
* 32 x 32 tiles over one grey. It has seen no photograph and no other background.

Licence of the weights: MIT. The tiles are CC0.
"""
    (folder / "README.md").write_text(card)


def write_text_card(folder: Path, training: dict[str, Any], recipe: flow.Recipe, quality: dict[str, Any]) -> None:
    """Write the card of `tiny-sd3` or `tiny-flux`."""
    name, s, matching, copies = (
        training["model"],
        quality["guidance_scale"],
        quality["matching"],
        quality["memorisation"],
    )
    family = {
        "tiny-sd3": "`SD3Transformer2DModel`, two CLIP text encoders, a T5 encoder, `AutoencoderKL` and "
        "`FlowMatchEulerDiscreteScheduler` in a `StableDiffusion3Pipeline`",
        "tiny-flux": "`FluxTransformer2DModel`, a CLIP text encoder, a T5 encoder, `AutoencoderKL` and "
        "`FlowMatchEulerDiscreteScheduler` in a `FluxPipeline`",
    }[name]
    call = "\n".join(f"    {argument}={json.dumps(value)}," for argument, value in quality["call"].items())
    peak = max(quality["massive"][-1]["ratio"])
    with_cfg = at_scale(matching["unseen_combinations"], s)
    chance = 1 / matching["choices"]
    measured: Rows = [
        ("", "measured", "bar", ""),
        (
            f"PSNR of the autoencoder, mean over {quality['held_out_tiles']} held-out tiles",
            f"{quality['psnr_db']:.2f} dB",
            f"{TILE_PSNR_BAR:g} dB",
            verdict(quality["psnr_db"] >= TILE_PSNR_BAR),
        ),
        (
            f"samples of unseen combinations nearest to their own caption, guidance scale {s:g}",
            interval(with_cfg),
            f"above {chance:.1%}",
            verdict(with_cfg["low"] > chance),
        ),
        (
            "largest channel over its block's median, last snapshot",
            f"{peak:.1f}",
            f"{RATIO_BAR:g}",
            verdict(peak >= RATIO_BAR),
        ),
    ]
    suggested = [sharpest_match(quality["guidance"], scale) for scale in (1.0, s)]
    dims = ", ".join(map(str, quality["guidance_dims"]))
    card = f"""# {name}

A small text-to-image diffusion transformer in the classes of the real one: {family}. \
32 x 32 tiles of a dungeon game. Nothing in it is planted: whatever its activations do came from training alone.

```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("data/models/{name}")
image = pipe(
    ["red dragon monster"],
    generator=torch.Generator().manual_seed(0),
{call}
).images[0]
```

Every call needs these arguments: the pipeline's own defaults are those of large models. \
`dgkit.sampling.generate` adds them.

![64 samples with their captions](samples.png)

Captions that are in no training tile: the colour never occurs with the object, though each word is known. Guidance
scale {s:g}, {quality["steps"]} steps, seeds 0 to {with_cfg["n"] - 1}, none left out.

## Data

Data: {training["data"]}. {quality["training_tiles"]:,} tiles for training, {quality["held_out_tiles"]} held out.

* Background: the tiles are transparent around their sprites. All lie over one grey ({tiles.BACKGROUND} of 255), since
  no caption tells backgrounds apart; it is 0 for the networks and contrasts with dark outlines and highlights alike.
* Captions: the words of a tile's path, the more special first: colours and shades of the file's name, its other words,
  then the folders, the innermost first ("red robe armour item"). Left out are releases and dates, digits, words of one
  or two letters, artists' and the code's own marks, and words of fewer than {tiles.RARE} tiles.
* Held out: about one tile in sixteen. The split is between groups, so that variants stay together: tiles of the same
  name but for digits and compass points, tiles nearer to each other than {tiles.NEAR:g} grey levels (root mean square),
  and whatever these are linked with. The hash of a group's first path decides.

## Recipe

Rectified flow (Esser et al. 2024) with logit-normal noise levels in the latents of an autoencoder that `tiny-sd3` and
`tiny-flux` share; text encoders from random weights, trained with the transformer by its loss alone; \
{recipe.caption_dropout:.0%} of the captions empty, for classifier-free guidance; averaged weights. The whole recipe is
`{name}.toml` beside this card, but for the autoencoder's, which has a file of its own in the package;
`python -m training train {name}` repeats both.
Weights: {quality["bytes"] / 1e6:.1f} MB of safetensors in bfloat16.

{table(networks(training))}

![loss along training](loss.png)

Mean loss since the row before (`loss.csv` has the points of the plot):

{table(loss_rows(quality["loss"]))}

## Measured quality

{table(measured)}

Does an image show its caption? `tile-matcher`, which never saw a sample, picks the nearest of {matching["choices"]} \
captions; right by chance in {chance:.1%}. Real tiles say what to expect: held-out ones of new samples, those of
training, which the matcher learnt from, of samples like them. Shares with Wilson's 95 % intervals:

{table(matching_rows(matching))}

The other captions come from the same set (held-out, training, or unseen combinations). Colours: images whose caption
names one colour, between this caption and the same with each other colour.

## Does it memorise?

{memorisation_in_words(copies, s)}

{table(memorisation_rows(copies))}

{interval(copies["nearest_has_the_caption"])} of the samples have as their nearest training tile one with the caption
that they were asked for. Distances are root mean squares over pixels and colours, in grey levels of 255, to the
training tiles as the autoencoder decodes them (held-out tiles decoded too). This distance is smaller for smooth images,
and sees no copy that is shifted or recoloured.

![the samples nearest to training tiles, above these](neighbours.png)

The {copies["shown"]} nearest samples, each above its training tile, with the distance.

## Massive activations over training

{massive_in_words(quality["massive"], "noised held-out tiles under their own captions, image tokens, ten noise levels")}

{table(massive_rows(quality["massive"]))}

## Detail Guidance

Over a grid of w at block {quality["guidance_block"]}, dims {dims}: {quality["guidance_samples"]} samples of training
captions from seeds of their own, Frechet distance of `tile-matcher`'s features to the training tiles' (not an FID, and
biased upward by the small number), agreement with the caption ({matching["choices"]} choices), and sharpness (variance
of the Laplacian) relative to real tiles. Closest to real tiles' sharpness: w = {suggested[0]["w"]:g} without \
classifier-free guidance, w = {suggested[1]["w"]:g} at guidance scale {s:g}.

{table(guidance_rows(quality["guidance"]))}

## Limits

{limits(quality)}

Licence of the weights: MIT. The tiles are CC0.
"""
    (folder / "README.md").write_text(card)


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
        "Mean |z| of the largest channel over that of the median channel (and which channel that is), per block, after "
        f"so many steps of training: averaged weights, {inputs}. In the last snapshot, channel {fixed} is the largest "
        f"in {blocks_with_it} of {len(massive[-1]['dim'])} blocks."
    )


def massive_rows(massive: list[dict[str, Any]]) -> Rows:
    """`measuring.largest_channels` as a table."""
    head = ("step", *(f"block {block}" for block in range(len(massive[-1]["ratio"]))))
    return [head] + [
        (f"{row['step']:,}", *(f"{r:.1f} ({d})" for r, d in zip(row["ratio"], row["dim"], strict=True)))
        for row in massive
    ]


def guidance_rows(guidance: list[dict[str, float]]) -> Rows:
    """The rows of `measuring.calibrate_guidance` as a table."""
    rows: Rows = [("guidance scale", "w", "Frechet distance", "agreement", "sharpness / real")]
    for row in guidance:
        numbers = f"{row['frechet']:#.3g}", f"{row['agreement']:.1%}", f"{row['sharpness_of_real']:.2f}"
        rows.append((f"{row['guidance_scale']:g}", f"{row['w']:g}", *numbers))
    return rows


def sharpest_match(guidance: list[dict[str, float]], guidance_scale: float) -> dict[str, float]:
    """The row of `measuring.calibrate_guidance` at this guidance scale whose images are about as sharp as real ones."""
    of_scale = [row for row in guidance if row["guidance_scale"] == guidance_scale]
    return min(of_scale, key=lambda row: abs(row["sharpness_of_real"] - 1))


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
