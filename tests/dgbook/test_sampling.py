"""What the chapters sample, and on which block and channels they look."""

import ast
import inspect
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import papermill
import pytest

import dgkit
from dgbook import notebooks
from dgbook.chapters import ablations, guidance, imagenet, intervention, layers, readings, sampling, study, timesteps
from dgbook.claims import results
from dgkit import zoo
from dgkit.errors import DgkitError
from dgkit.paths import DATA
from dgkit.sampling import generate
from tests import tiny_models
from tests.dgbook.chapter_examples import BLOCKS, CHANNELS

CHAPTERS = (layers, timesteps, intervention, guidance, ablations, imagenet, readings)


def test_samples_cycle_through_the_classes_with_distinct_seeds(pipe):
    run = sampling.samples(pipe, 23, seed=1, steps=4, guidance_scale=2.0)
    assert run.conditions == [*range(10), *range(10), 0, 1, 2]
    assert len(set(run.seeds)) == 23 and (run.steps, run.guidance_scale) == (4, 2.0)
    assert not set(run.seeds) & set(sampling.samples(pipe, 23, seed=2, steps=4).seeds)
    assert run.seeds[:5] == sampling.samples(pipe, 5, seed=1, steps=4).seeds


def test_samples_of_a_text_pipeline_are_the_shipped_prompts():
    prompts = (DATA / "prompts" / "offline.txt").read_text().strip().split("\n")
    run = sampling.samples(tiny_models.pipeline("sd3"), len(prompts) + 1, seed=0, steps=1)
    assert run.conditions == [*prompts, prompts[0]] and all(prompt.strip() for prompt in run.conditions)


def test_samples_without_labels_use_the_class_table():
    assert sampling.samples(tiny_models.pipeline("dit"), 1001, seed=0, steps=1).conditions == [*range(1000), 0]


@pytest.mark.parametrize("count", [0, -1, 2.0, True, "3", None])
def test_a_bad_number_of_samples_is_refused(pipe, count):
    with pytest.raises(DgkitError, match="num_samples"):
        sampling.samples(pipe, count, seed=0, steps=1)


def test_a_run_generates_its_own_images(pipe, run):
    assert run.first(2) == sampling.Samples(run.conditions[:2], run.seeds[:2], 2, 1.0)
    assert np.array_equal(run.images(pipe), generate(pipe, run.conditions, run.seeds, num_inference_steps=2))
    guided = generate(pipe, run.conditions, run.seeds, num_inference_steps=2, guidance_scale=5.0)
    assert np.array_equal(replace(run, guidance_scale=5.0).images(pipe), guided)
    assert not np.array_equal(run.images(pipe), guided)


def test_condition_names(pipe):
    assert sampling.condition_names(pipe, [2, 0, 1000]) == ["pullover", "T-shirt", "1000"]
    assert sampling.condition_names(tiny_models.pipeline("sd3"), ["a cat"]) == ["a cat"]
    synonyms = SimpleNamespace(labels={"ankle boot": 9, "boot": 9})
    assert sampling.condition_names(synonyms, [9]) == ["ankle boot"]


def test_each_condition_as_often_as_asked_in_turn(pipe):
    run = sampling.samples(pipe, 6, seed=1, steps=4, each=3)
    assert run.conditions == [0, 1, 0, 1, 0, 1] and len(set(run.seeds)) == 6
    # ten classes, four times each: the same as without `each`
    assert sampling.samples(pipe, 40, seed=1, steps=4, each=4) == sampling.samples(pipe, 40, seed=1, steps=4)


@pytest.mark.parametrize("each", [0, -2, 2.0, True, None])
def test_a_bad_number_of_images_per_condition_is_refused(pipe, each):
    with pytest.raises(DgkitError, match="images_per_condition=.* is not allowed: give an integer, 1 or above"):
        sampling.samples(pipe, 8, seed=0, steps=1, each=each)


def test_images_per_condition_divide_the_number_of_samples(pipe):
    with pytest.raises(DgkitError, match="images_per_condition=3 is not allowed: give a divisor of num_samples=8"):
        sampling.samples(pipe, 8, seed=0, steps=1, each=3)


def preset(monkeypatch, block, dims, scale=None, guidance_scale=1.0):
    w_cfg = None if scale is None else scale / 2
    row = zoo.Model(None, "DiTPipeline", "DiTTransformer2DModel", BLOCKS, CHANNELS, "", 0.0,
                    zoo.Preset(block, dims, scale, w_cfg, guidance_scale, 1, "this test"))  # fmt: skip
    monkeypatch.setattr(zoo, "MODELS", {"random": row})


def planted(pipe, block, dim):
    """Make one channel of one block's output large by hand, before anything is recorded."""

    def hook(module, args, output):
        output = output.clone()
        output[..., dim] += 500.0
        return output

    return pipe.transformer.transformer_blocks[block].register_forward_hook(hook)


def test_subject_as_given(monkeypatch, pipe, run):
    preset(monkeypatch, 2, (9,))
    trace = sampling.observe(pipe, run)
    assert sampling.subject(trace, 1, [4, 2]) == (1, [4, 2])
    assert sampling.subject(trace, None, [4]) == (2, [4])
    assert sampling.subject(trace, 0, None) == (0, [9])


def test_subject_of_the_preset(monkeypatch, pipe, run):
    preset(monkeypatch, 2, (9, 11))
    assert sampling.subject(sampling.observe(pipe, run), None, None) == (2, [9, 11])


def test_subject_detected(monkeypatch, pipe, run):
    handle = planted(pipe, 0, 5)
    trace = sampling.observe(pipe, run)
    handle.remove()
    assert sampling.subject(trace, None, None) == (0, [5])  # a quarter of the way into three blocks
    preset(monkeypatch, 1, None)  # a preset that states the block alone: the planted channel flows on through it
    assert sampling.subject(trace, None, None) == (1, [5])


def test_subject_is_the_largest_channel_when_none_is_massive(pipe, run):
    trace = sampling.observe(pipe, run, keep=[1])
    assert dgkit.detect_massive(trace).in_block(1) == []
    largest = trace.tensors(1).abs().mean((0, 1)).argmax().item()
    assert sampling.subject(trace, 1, None) == (1, [largest])


@pytest.mark.parametrize(("block", "dims"), [(3, [0]), (-1, [0]), (0, [16]), (0, [])])
def test_a_bad_subject_is_refused(pipe, run, block, dims):
    with pytest.raises(DgkitError):
        sampling.subject(sampling.observe(pipe, run.first(1)), block, dims)


# The study ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(monkeypatch, pipe):
    """Opens a study of the fixture's model."""
    monkeypatch.setattr(study, "load", lambda model, device: pipe)
    sampled = {"model": "random", "seed": 5, "device": "cpu", "num_samples": 3, "num_inference_steps": 2}
    return lambda **parameters: study.open_study(**sampled, **parameters)


@pytest.mark.parametrize(
    ("given", "stated", "expected"),
    [(2.5, 3.0, (2.5, 2.5)), (0.0, 3.0, (0.0, 0.0)), (None, 3.0, (3.0, 1.5)), (None, None, (1.0, 1.0))],
)
def test_scales_of_dg(monkeypatch, opened, given, stated, expected):
    preset(monkeypatch, None, None, stated)
    found = opened(scale=given)
    assert (found.w, found.w_cfg) == expected


def test_scale_of_cfg_is_as_given_else_the_presets_else_4(monkeypatch, opened):
    assert opened(guidance_scale=2.5).guidance_scale == 2.5
    assert opened().guidance_scale == 4.0
    preset(monkeypatch, None, None, guidance_scale=1.75)
    assert opened().guidance_scale == 1.75
    assert opened(guidance_scale=1.0).guidance_scale == 1.0


def test_a_study_samples_as_its_notebook_says(opened, pipe, run):
    found = opened(guidance_scale=2.5, batch_size=7)
    assert found.run == replace(run, batch_size=7) and found.names == ["T-shirt", "trouser", "pullover"]
    assert found.judge is None  # a random model shows no clothes
    assert opened(guidance_scale=2.5, cfg=True).run == replace(run, guidance_scale=2.5)
    assert opened(images_per_condition=3).run.conditions == [0, 0, 0]


@pytest.mark.parametrize(("observed", "images"), [(2, 2), (8, 3), (None, 3)])
def test_a_study_looks_at_its_first_images(opened, pipe, run, observed, images):
    found = opened(observed=observed)
    assert np.array_equal(found.trace.mean_abs(), sampling.observe(pipe, run.first(images)).mean_abs())
    assert (found.block, found.dims) == sampling.subject(found.trace, None, None)
    assert (opened(block=2, dims=[4]).block, opened(block=2, dims=[4]).dims) == (2, [4])


def test_a_result_keeps_what_was_sampled_and_the_chapters_own_parameters(opened):
    found = opened().begin("demo", threshold=3.0)
    assert found.result.name == "demo" and found.result.parameters == {
        "model": "random", "seed": 5, "device": "cpu", "num_samples": 3, "num_inference_steps": 2, "threshold": 3.0
    }  # fmt: skip


@pytest.mark.parametrize("file", notebooks.NOTEBOOKS.values())
def test_every_chapter_keeps_the_parameters_of_its_accepted_result(monkeypatch, file):
    """And takes all parameters of its notebook, whatever its cells pass on."""
    name = Path(file).stem
    module = next(module for module in CHAPTERS if inspect.getsource(module).count(f'"{name}"'))
    known = {key: value for key, value in papermill.inspect_notebook(notebooks.FOLDER / file).items()}
    parameters = {key: ast.literal_eval(found["default"]) for key, found in known.items()}
    monkeypatch.setattr(study, "observe", lambda pipe, run, **options: sampling.observe(pipe, run.first(1), **options))
    small = {"num_samples": parameters.get("images_per_condition", 1), "num_inference_steps": 1}
    found = module.open_study(**parameters | small).result.parameters
    accepted = results.read(results.ACCEPTED / parameters["model"] / f"{name}.json").parameters
    assert found == accepted | small
