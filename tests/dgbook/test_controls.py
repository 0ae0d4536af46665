"""The tests of chapters 3 and 4 on models made for it: what they have to find, and what they have to deny."""

from typing import Any, Literal

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

import dgkit
from dgbook.chapters import guidance, settings, study
from dgbook.chapters.intervention import image_measures, intervene
from dgbook.claims import controls, verdicts
from dgbook.claims.results import Record

IMAGES, STEPS, DIM = 6, 5, 5
BLOCKS = {"tiny-dit": 5, "tiny-sd3": 5, "tiny-flux": 1}

FOUND_BY_DETAIL = {"3a", "3b", "3c", "3f", "4a", "4b", "4k"}
"""What must hold where the channel carries detail and nothing else, with as few images as here."""

DENIED_BY_LAYOUT = {"4a", "4b"}
"""What must be found not to hold where it carries the layout."""

NOT_FOUND_BY_LAYOUT = {"3a", "3e", "4e", "4f", "4h", "4k", "4l"}
"""What must not be found to hold there."""


def planted(name: str, carries: Literal["detail", "layout"], monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """A study of a planted model; `options` of `open_study`."""
    load = dgkit.load

    def load_planted(model: str, device: str) -> Any:
        pipe = load(model, device=device)
        controls.plant(pipe, carries, BLOCKS[name], DIM)
        return pipe

    with monkeypatch.context() as patch:
        patch.setattr(study, "load", load_planted)
        return study.open_study(
            model=name, seed=3, device="cpu", num_samples=IMAGES, num_inference_steps=STEPS, block=BLOCKS[name],
            dims=[DIM], observed=4, **options,
        )  # fmt: skip


def battery(name: str, carries: Literal["detail", "layout"], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The word for each part of chapters 3 and 4."""
    disrupted = planted(name, carries, monkeypatch, cfg=True)
    assert DIM in dgkit.detect_massive(disrupted.trace).in_block(BLOCKS[name])
    images = intervene(disrupted, draws=19, drawn_samples=2)
    guided = planted(name, carries, monkeypatch, scale=1.0)
    compared = guidance.guidance_settings(1.0, 1.0, guided.guidance_scale, guided.block, guided.dims)
    outcomes = settings.sample_all(guided.pipe, guided.run, compared)
    by_chapter = {
        "03_intervention": image_measures(images, "original", disrupted.judge),
        "04_detail_guidance": image_measures({k: o.images for k, o in outcomes.items()}, "none", guided.judge),
    }
    return words({chapter: Record(chapter, {}, {}, {}, arrays) for chapter, arrays in by_chapter.items()})  # type: ignore[arg-type]


def words(records: dict[str, Record]) -> dict[str, str]:
    return {a.part.id: a.word for verdict in verdicts.judge(records).values() for a in verdict.answers}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_channel_that_carries_detail_and_nothing_else_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = battery(name, "detail", monkeypatch)
    assert {part: found[part] for part in sorted(FOUND_BY_DETAIL)} == dict.fromkeys(sorted(FOUND_BY_DETAIL), "holds")
    assert "does not hold" not in {word for part, word in found.items() if part.startswith("3")}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_channel_that_carries_layout_is_denied(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = battery(name, "layout", monkeypatch)
    denied = dict.fromkeys(sorted(DENIED_BY_LAYOUT), "does not hold")
    assert {part: found[part] for part in sorted(DENIED_BY_LAYOUT)} == denied
    assert "holds" not in {found[part] for part in NOT_FOUND_BY_LAYOUT}


def test_the_plant_changes_no_image_while_the_channel_is_there() -> None:
    """Of layout, whose model lacks nothing by itself: the same images as the shipped model's, up to rounding."""
    images = []
    for plant in (False, True):
        pipe = dgkit.load("tiny-dit")
        if plant:
            controls.plant(pipe, "layout", 5, DIM)
        noise = torch.Generator().manual_seed(0)
        images.append(pipe([1, 2], num_inference_steps=4, generator=noise, output_type="np").images)
    assert np.abs(images[0] - images[1]).max() < 2e-3


def test_low_pass_and_the_clean_latents_by_hand() -> None:
    """The frequencies of a cosine; and that an unchanged clean image gives back the prediction, in every class."""
    grid = torch.arange(16) + 0.5
    slow, fast = (torch.cos(2 * torch.pi * f * grid).expand(1, 1, 16, 16) for f in (1 / 8, 3 / 8))
    assert torch.allclose(controls._low_pass(slow + fast), slow, atol=1e-5)
    for name in BLOCKS:
        pipe, generator = dgkit.load(name), torch.Generator().manual_seed(1)
        noisy, prediction = torch.randn(2, 2, 8, 16, 16, generator=generator)
        timestep = torch.tensor([500.0, 500.0])
        if isinstance(pipe, FluxPipeline):
            noisy, prediction = (FluxPipeline._pack_latents(x, *x.shape) for x in (noisy, prediction))
            timestep = timestep / 1000
        same = controls._through_clean(pipe, lambda clean: clean, noisy, prediction, timestep)
        assert torch.allclose(same, prediction, atol=1e-4)
