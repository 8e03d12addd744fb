"""Skip Layer Guidance: diffusers' latents, and what it refuses or warns of."""

import inspect
import warnings

import pytest
import torch
from helpers import relative_error
from pipelines import pair

from minidiff.drawing import guidance
from minidiff.drawing.guidance import SkipLayer
from minidiff.flow_matching import ClassifierFree, NoGuidance

CALL = {"num_inference_steps": 10, "guidance_scale": 4.0, "output_type": "latent"}
CALL |= {"prompt": "a red dress", "negative_prompt": "a bag", "max_sequence_length": 20}
BOUND = 1e-5
SETTINGS = [([1, 2], 2.8, 0.01, 0.4), ([0], 1.5, 0.2, 0.6), ([3], 2.8, 0.01, 0.2)]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    pipe, reference = pair(tmp_path_factory.mktemp("model"))
    pipe.name = "sd3.5-medium"
    return pipe, reference


def theirs(reference, noise, layers, scale, start, stop):
    return reference(
        **CALL,
        latents=noise,
        skip_guidance_layers=layers,
        skip_layer_guidance_scale=scale,
        skip_layer_guidance_start=start,
        skip_layer_guidance_stop=stop,
    ).images


def ours(pipe, noise, *settings, **call):
    call = CALL | call
    guidance = SkipLayer(pipe.guidance(call.pop("guidance_scale")), *settings)
    return pipe(**call, latents=noise, guidance=guidance)


def latents_error(both, settings):
    pipe, reference = both
    noise = pipe.prepare_latents(1)
    expected = theirs(reference, noise, *settings)
    plain = pipe(**CALL, latents=noise)
    assert relative_error(plain, expected) > 1e-4
    return relative_error(ours(pipe, noise, *settings), expected)


@pytest.mark.parametrize("settings", SETTINGS)
def test_same_latents_as_diffusers(both, settings):
    assert latents_error(both, settings) <= BOUND


def mutant_window(sigmas, start, stop):
    steps = len(sigmas) - 1
    inside = [i for i in range(steps) if start * steps < i <= stop * steps]
    return set(sigmas[inside].tolist())


def mutant_guide(v_neg, v_pos, scale):
    return v_neg + (scale + 0.1) * (v_pos - v_neg)


@pytest.mark.parametrize(
    "name, mutant", [("levels_between", mutant_window), ("guide", mutant_guide)]
)
def test_parity_catches(both, monkeypatch, name, mutant):
    pipe, reference = both
    settings, noise = ([1, 2], 2.8, 0.01, 0.4), pipe.prepare_latents(1)
    expected = theirs(reference, noise, *settings)
    monkeypatch.setattr(guidance, name, mutant)
    assert relative_error(ours(pipe, noise, *settings), expected) > 1e-4


def test_published_window():
    for steps, inside in ((50, range(1, 10)), (40, range(1, 8)), (28, range(1, 6))):
        found = guidance.levels_between(torch.arange(steps + 1.0), 0.01, 0.2)
        assert found == set(inside)


def test_defaults_are_those_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    theirs = inspect.signature(diffusers.StableDiffusion3Pipeline.__call__).parameters
    ours = inspect.signature(SkipLayer).parameters
    assert ours["layers"].default == (7, 8, 9)  # as published for SD3.5 Medium
    for name in ("scale", "start", "stop"):
        found = theirs[f"skip_layer_guidance_{name}"].default
        assert ours[name].default == found


def test_the_usual_scales_stand_for_objects(both):
    pipe, _ = both
    noise = pipe.prepare_latents(1)
    for scale, same in ((4.0, ClassifierFree(4.0)), (1.0, NoGuidance())):
        call = CALL | {"negative_prompt": "", "latents": noise}
        expected = pipe(**call | {"guidance_scale": scale})
        given = call | {"guidance_scale": None, "guidance": same}
        assert torch.equal(pipe(**given), expected)
        assert pipe.guidance(scale).settings["guidance_scale"] == scale
    text = (x.repeat(2, *[1] * (x.ndim - 1)) for x in pipe.encode_prompt("a red dress"))
    with pytest.raises(ValueError, match=r"guidance_scale is 4\.0 and guidance Class"):
        pipe.denoise(noise, *text, 2, 4.0, guidance=ClassifierFree(3.0))


def test_the_last_rows_are_the_prompts(both):
    """A state of fewer rows than the text is asked with the prompts."""
    pipe, _ = both
    x, sigmas = pipe.prepare_latents(2), pipe.scheduler.sigmas(3)
    context, pooled = pipe.encode_prompt(["", "a coat", "a bag", "a red dress"])
    answers = pipe.velocity(context, pooled, sigmas)
    expected = answers(torch.cat([x, x]), sigmas[1])[2:]
    assert relative_error(answers(x, sigmas[1]), expected) <= BOUND


def test_it_warns_where_it_is_not_meant(both, monkeypatch):
    pipe, _ = both
    noise = pipe.prepare_latents(1)
    for _ in range(2):  # each time, not once a process
        with warnings.catch_warnings(record=True, action="default") as told:
            ours(pipe, noise, [1], guidance_scale=1.0, num_inference_steps=2)
        assert "does nothing without guidance" in str(told[0].message)
    with pytest.warns(UserWarning, match="does nothing in so few steps"):
        ours(pipe, noise, [1], num_inference_steps=4)
    monkeypatch.setattr(pipe, "name", "sd3.5-large")
    with pytest.warns(UserWarning, match="for sd3.5-medium; this is sd3.5-large"):
        ours(pipe, noise, [1], num_inference_steps=8)


@pytest.mark.parametrize(
    "settings, message",
    [
        ((), r"skip layers are \[7, 8, 9\]; expected some of 0 to 3"),
        (([],), r"skip layers are \[\]"),
        (([-1],), r"skip layers are \[-1\]"),
        (([1], 2.8, 0.5, 0.2), "the window is 0.5 to 0.2"),
        (([1], 2.8, 0.5, 1.2), "the window is 0.5 to 1.2"),
        (([1], float("nan")), "skip_layer_scale is nan; expected a finite number"),
    ],
)
def test_bad_settings(both, settings, message):
    with pytest.raises(ValueError, match=message):
        ours(both[0], None, *settings)
