"""The paths of a GPU, taken on a card that is not there."""

from copy import deepcopy

import parallel_worker
import pytest
import torch
from helpers import randomize, relative_error
from pretended_card import OnCard, PretendedCard, bare

import minidiff
from minidiff.extras import lora
from minidiff.extras.guidance import skip_layer_guidance
from minidiff.extras.image_to_image import image_to_image
from minidiff.training import TrainingConfig, fit

CALL = {"num_inference_steps": 3, "output_type": "pt"}
STREAMED = {"t5": "streamed", "clip": "streamed", "modulation": "streamed"}
SETTINGS = {
    "as in the chapters": {},
    "fast": {"fast": True},
    "streamed": {"fast": True, "vae_slicing": True, **STREAMED},
}
PROMPT = "a red dress on a blue background"


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch):
    monkeypatch.setattr("minidiff.extras.kernels.triton", None)


def load(device, **settings):
    pipe = minidiff.load("tiny", device, torch.float32, **settings)
    pipe.progress = False
    return pipe


def on_card(draw, **settings):
    """What ``draw(pipe)`` gives on the card, brought back."""
    with PretendedCard():
        pipe = load("cuda", **settings)
        PretendedCard.waits.clear()
        out = draw(pipe)
    assert isinstance(out, OnCard)
    return bare(out)


def picture():
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def repaint(pipe):
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 20:, :40] = 1
    return image_to_image(pipe, PROMPT, picture(), 0.9, mask_image=mask, **CALL)


def skipping(pipe):
    with skip_layer_guidance(pipe, [1], stop=1.0):
        return pipe(PROMPT, **CALL)


def with_lora(pipe):
    updates = lora.add_lora(pipe.transformer, 2, names=("to_q", "ff.net.0.proj"))
    generator = torch.Generator().manual_seed(0)
    for update in updates.values():
        for weight in update.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.data.copy_(noise / 10)
    return pipe(PROMPT, **CALL)


DRAWINGS = {
    "prompts": lambda pipe: pipe([PROMPT, "a coat"], negative_prompt="a bag", **CALL),
    "without guidance": lambda pipe: pipe(PROMPT, guidance_scale=1.0, **CALL),
    "DPM++ 2M": lambda pipe: pipe(PROMPT, sampler="dpmpp_2m", **CALL),
    "Heun": lambda pipe: pipe(PROMPT, sampler="heun", height=80, width=48, **CALL),
    "inpainting": repaint,
    "skipped layer": skipping,
    "LoRA": with_lora,
}


@pytest.mark.filterwarnings("ignore:Skip Layer Guidance was published for")
@pytest.mark.parametrize("draw", DRAWINGS.values(), ids=DRAWINGS)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_draws_what_a_cpu_draws(settings, draw):
    expected = draw(load("cpu"))
    assert relative_error(on_card(draw, **settings), expected) < 1e-5


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_no_step_waits_for_the_card(settings):
    def count(steps):
        call = CALL | {"num_inference_steps": steps}
        on_card(lambda pipe: pipe(PROMPT, **call), **settings)
        return PretendedCard.waits.copy()

    assert count(2) == count(6)


def test_draws_with_products_in_8_bits():
    draw = DRAWINGS["prompts"]
    found = on_card(draw, fast=True, fp8=True)
    assert 1e-3 < relative_error(found, draw(load("cpu"))) < 0.1


@pytest.mark.parametrize("stage", ["clip", "t5", "vae", "judge", "muon"])
def test_learns_what_a_cpu_learns(stage):
    task = getattr(parallel_worker, stage)()
    randomize(task.model.double())
    muon = stage in ("vae", "muon")
    config = TrainingConfig(3, 8, 1e-2, 1, ema_decay=0.5, muon=muon)
    expected = fit(deepcopy(task), config).state_dict()
    with PretendedCard():
        found = fit(task, config, device="cuda").state_dict()
    assert all(isinstance(weight, OnCard) for weight in found.values())
    for name, weight in expected.items():
        assert relative_error(bare(found[name]), weight) < 1e-9, name


def test_two_devices_are_an_error():
    with PretendedCard():
        x = torch.ones(2, device="cuda")
        assert (x + 1).is_cuda and x.cpu().tolist() == [1, 1]
        with pytest.raises(RuntimeError, match="two devices"):
            x + torch.ones(2)
