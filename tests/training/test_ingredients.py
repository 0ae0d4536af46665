"""The four trainings that tell pixels from latents and noise from velocity."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from training import ingredients
from training.ingredients import SPACES, Ingredients

SCHEDULER = DDIMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, clip_sample=False)


def kind(space: str, objective: str) -> Ingredients:
    return Ingredients(space, objective, None, SCHEDULER)  # type: ignore[arg-type]


def test_the_spaces_have_as_many_tokens_and_numbers_per_token() -> None:
    sizes = {
        ((space["sample_size"] // space["patch_size"]) ** 2, space["in_channels"] * space["patch_size"] ** 2)
        for space in SPACES.values()
    }
    assert sizes == {(49, 16)}


def test_noised_is_the_formula_of_each_objective() -> None:
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(3, 1, 28, 28, generator=generator), torch.randn(3, 1, 28, 28, generator=generator)
    level = torch.tensor([0.0, 0.25, 1.0])
    noisy, timestep, target = kind("pixel", "velocity").noised(x, noise, level)
    for i, s in enumerate(level.tolist()):
        torch.testing.assert_close(noisy[i], (1 - s) * x[i] + s * noise[i])
    assert timestep.tolist() == [0, 250, 1000] and torch.equal(target, noise - x)
    noisy, timestep, target = kind("pixel", "noise").noised(x, noise, level)
    kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    assert timestep.tolist() == [0, 250, 999] and torch.equal(target, noise)
    for i, t in enumerate(timestep.tolist()):
        expected = kept[t] ** 0.5 * x[i].double() + (1 - kept[t]) ** 0.5 * noise[i].double()
        torch.testing.assert_close(noisy[i].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", ingredients.OBJECTIVES)
def test_a_model_that_knows_the_image_samples_it(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingredients, "SAMPLING_STEPS", 5)
    wanted = torch.linspace(-0.8, 2, 28 * 28).reshape(1, 1, 28, 28)
    kept = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))

    def predict(x: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor) -> Any:
        if objective == "velocity":
            return SimpleNamespace(sample=(x - wanted) / (timestep / 1000).view(-1, 1, 1, 1))
        a = kept[timestep.long()].view(-1, 1, 1, 1)
        return SimpleNamespace(sample=((x - a**0.5 * wanted) / (1 - a) ** 0.5).float())

    predict.device = torch.device("cpu")  # type: ignore[attr-defined]
    images = kind("pixel", objective).sample(predict, torch.tensor([3, 4]))  # type: ignore[arg-type]
    grey = (wanted * ingredients.PIXEL_STD + ingredients.PIXEL_MEAN).clamp(0, 1).squeeze() * 255
    assert images.shape == (2, 28, 28, 3)
    assert np.abs(images[0, ..., 0] - grey.numpy()).max() <= (1 if objective == "velocity" else 3)
