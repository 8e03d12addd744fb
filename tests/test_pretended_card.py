"""The paths of a GPU, taken on a card that is not there."""

from copy import deepcopy

import parallel_worker
import pytest
import torch
from helpers import randomize, relative_error
from pretended_card import OnCard, PretendedCard, bare

import minidiff
from minidiff import lora
from minidiff.drawing.guidance import SkipLayer
from minidiff.drawing.image_to_image import image_to_image
from minidiff.training import TrainingConfig, fit

CALL = {"num_inference_steps": 2, "output_type": "pt"}
STREAMED = {"t5": "streamed", "clip": "streamed", "modulation": "streamed"}
SETTINGS = {
    "as in the chapters": {},
    "fast": {"fast": True},
    "streamed": {"fast": True, "vae_slicing": True, **STREAMED},
}
PROMPT = "a red dress on a blue background"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Skip Layer Guidance was published for"),
]


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch):
    monkeypatch.setattr("minidiff.engine.kernels.TRITON", False)


def load(device, dtype=torch.float32, **settings):
    pipe = minidiff.load("tiny", device, dtype, **settings)
    pipe.progress = False
    return pipe


def on_card(draw, **settings):
    """What ``draw(pipe)`` gives on the card, brought back."""
    with PretendedCard():
        pipe = load("cuda", **settings)
        PretendedCard.waits.clear()
        out = draw(pipe)
    assert isinstance(out, OnCard)
    return bare(out).float()


def picture():
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def repaint(pipe):
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 20:, :40] = 1
    return image_to_image(pipe, PROMPT, picture(), 0.9, mask_image=mask, **CALL)


def skipping(pipe):
    guidance = SkipLayer(pipe.guidance(), [1], stop=1.0)
    return pipe(PROMPT, guidance=guidance, **CALL)


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
    "DPM++ 2M": lambda pipe: pipe(PROMPT, sampler="dpmpp_2m", **CALL),
    "Heun": lambda pipe: pipe(PROMPT, sampler="heun", height=80, width=48, **CALL),
    "inpainting": repaint,
    "skipped layer": skipping,
    "LoRA": with_lora,
}


@pytest.mark.parametrize(
    ("how", "name"),
    [
        ("as in the chapters", "Heun"),
        ("fast", "inpainting"),
        ("fast", "DPM++ 2M"),
        ("streamed", "skipped layer"),
        ("streamed", "LoRA"),
    ],
)
def test_draws_what_a_cpu_draws(how, name):
    expected = DRAWINGS[name](load("cpu"))
    found = on_card(DRAWINGS[name], **SETTINGS[how])
    assert relative_error(found, expected) < 1e-5


def test_draws_nearly_the_same_in_bfloat16():
    expected = DRAWINGS["prompts"](load("cpu", torch.bfloat16)).float()
    found = on_card(DRAWINGS["prompts"], dtype=torch.bfloat16, fast=True)
    assert relative_error(found, expected) < 0.02


def waits(draw, steps, monkeypatch, **settings):
    monkeypatch.setitem(CALL, "num_inference_steps", steps)
    on_card(draw, **settings)
    return PretendedCard.waits.copy()


@pytest.mark.parametrize(
    ("how", "name"), [("as in the chapters", "inpainting"), ("streamed", "prompts")]
)
def test_no_step_waits_for_the_card(how, name, monkeypatch):
    few, many = (waits(DRAWINGS[name], n, monkeypatch, **SETTINGS[how]) for n in (3, 5))
    assert few == many


def test_a_step_that_waits_would_show(monkeypatch):
    def look(pipe, step, timestep, tensors):
        tensors["latents"].sum().item()

    def draw(pipe):
        return pipe(PROMPT, callback_on_step_end=look, **CALL)

    few, many = (waits(draw, n, monkeypatch) for n in (3, 5))
    assert (many - few).total() == 2


def test_draws_with_products_in_8_bits():
    def draw(pipe):
        assert pipe.transformer.fp8
        return pipe(PROMPT, **CALL)

    how = {"dtype": torch.bfloat16, "fast": True, "fp8": True}
    assert relative_error(on_card(draw, **how), draw(load("cpu", **how)).float()) < 0.02


@pytest.mark.parametrize("stage", ["t5", "vae"])
def test_learns_what_a_cpu_learns(stage):
    task = getattr(parallel_worker, stage)()
    randomize(task.model.double())
    config = TrainingConfig(3, 8, 1e-2, 1, ema_decay=0.5, muon=stage == "vae")
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
        for elsewhere in (lambda: x + torch.ones(2), lambda: torch.stack([x, x.cpu()])):
            with pytest.raises(RuntimeError, match="two devices"):
                elsewhere()
