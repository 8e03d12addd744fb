"""What distils: batches of jumps, their loss, and any model of the family."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import randomize
from pipelines import load_tokenizers, reference_pipeline, save_tokenizers
from safetensors.torch import load_file
from small import TRANSFORMER
from torch import Tensor

import minidiff
from minidiff.cli import train as command
from minidiff.distillation import JumpScheduler, euler_step, flow_map_loss, jump
from minidiff.dit import MMDiT
from minidiff.flow_matching import guide, interpolate, shift_sigma
from minidiff.judging.diversity import SEEDS, feature_spread
from minidiff.learning.run import read_log
from minidiff.lora import add_lora
from minidiff.recipes import turbo
from minidiff.recipes.features import Features
from minidiff.recipes.finetune import FinetuneOptions, LoraConfig
from minidiff.recipes.jumps import (
    SIZES,
    Distillation,
    JumpBatches,
    check_rows,
    without,
)
from minidiff.training import TrainingConfig


@pytest.fixture(scope="module")
def features() -> Features:
    latents, place = torch.randn(6, 16, 8, 8), torch.tensor([1, 2, 1, 2, 1, 2])
    return Features(latents, place, torch.randn(3, 5, 48), torch.randn(3, 40))


def batches(features: Features) -> JumpBatches:
    return JumpBatches(features, lambda i: i % 6, noise_seed=1, drop_seed=2, drop=0.0)


def test_a_sample_has_a_jump_of_its_own(features: Features) -> None:
    draw = batches(features)
    batch = draw(torch.arange(400))
    assert batch["size"].tolist() == [1 / 8, 1 / 4, 1 / 2, 1] * 100
    begin = batch["place"] / batch["size"]  # whole jumps from the end
    assert torch.equal(begin, begin.round()) and begin.min() == 1
    assert (batch["place"] <= 1).all()
    eighths = batch["place"][::SIZES]
    assert set(eighths.tolist()) == {k / 8 for k in range(1, 9)}
    part = draw(torch.arange(8, 16))
    assert all(torch.equal(batch[k][8:16], x) for k, x in part.items())


def transformer(seed: int) -> MMDiT:
    model = MMDiT(TRANSFORMER)
    randomize(model, seed)
    return model


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_each_size_learns_from_the_next_and_the_smallest_from_the_teacher(
    features: Features, shift: float
) -> None:
    teacher, student = transformer(0), transformer(1)
    empty = features.context[0], features.pooled[0]
    taught = Distillation(teacher, empty, 2.5, shift)
    batch = batches(features)(torch.arange(12))
    losses = []
    for i in range(12):
        one = {k: x[i : i + 1] for k, x in batch.items()}
        text = one["context"], one["pooled"]

        def guided(x: Tensor, sigma: Tensor, text=text) -> Tensor:
            none = teacher(x, sigma, *(e[None] for e in empty))
            return guide(none, teacher(x, sigma, *text), 2.5)

        ask = lambda x, time, text=text: student(x, time, *text)  # noqa: E731
        way: Callable[..., Tensor] = euler_step if i % SIZES == 0 else jump
        who = guided if i % SIZES == 0 else ask
        half = lambda *at, way=way, who=who: way(who, *at, shift=shift)  # noqa: E731
        at = one["place"], one["size"]
        x = interpolate(one["x0"], one["noise"], shift_sigma(at[0], shift))
        losses.append(flow_map_loss(ask, half, x, *at, shift=shift))
    by_size = torch.stack(losses).unflatten(0, (-1, SIZES))
    wanted = (by_size[:, 0].mean() + by_size[:, 1:].mean()) / 2
    torch.testing.assert_close(taught.loss(student, batch), wanted, rtol=1e-4, atol=0)


def test_corrections_rest_while_the_teacher_answers(features: Features) -> None:
    model = transformer(0)
    x, text = features.latents[:1], (features.context[:1], features.pooled[:1])
    ask = lambda: model(x, torch.ones(1), *text)  # noqa: E731
    before, updates = ask(), add_lora(model, 2)
    for update in updates.values():
        torch.nn.init.normal_(update.up.weight)
    learned = ask()
    with without(updates):
        assert torch.equal(ask(), before)
    assert torch.equal(ask(), learned) and not torch.equal(learned, before)


def test_batches_hold_each_size_as_often() -> None:
    check_rows(TrainingConfig(1, 16, accumulation=2))
    with pytest.raises(ValueError, match="a batch of 12 samples in 2 parts"):
        check_rows(TrainingConfig(1, 12, accumulation=2))


def test_spread_is_within_prompts_alone() -> None:
    centres = 100 * torch.randn(5, 1, 3)
    around = torch.tensor([[1.0, 0, 0], [-1, 0, 0]]).repeat(SEEDS // 2, 1)
    assert feature_spread(centres + around) == pytest.approx(1.0, abs=1e-4)
    assert feature_spread(centres + 0.5 * around) == pytest.approx(0.5, abs=1e-4)


# Any model of the family


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random pipeline of diffusers in the hub's layout."""
    folder = tmp_path_factory.mktemp("model")
    save_tokenizers(folder)
    reference_pipeline(load_tokenizers(folder)).save_pretrained(folder)
    return folder


def options(model: Path, pictures: Path, output: Path, **how) -> FinetuneOptions:
    sizes = {"steps": 12, "batch_size": 4, "learning_rate": 1e-2}
    return FinetuneOptions(str(model), pictures, output, **sizes, **how)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_any_model_is_distilled(
    model: Path, pictures: Path, tmp_path: Path, lora: LoraConfig | None
) -> None:
    folder = turbo.distil(options(model, pictures, tmp_path / "out", lora=lora))
    pipe, teacher = minidiff.load(folder), minidiff.load(model)
    assert pipe.scheduler == JumpScheduler(shift=3.0) and pipe.defaults == (4, 1.0)
    log = read_log(tmp_path / "out" / "run" / "log.jsonl")
    assert {"steps_4", "steps_2", "steps_1", "validation"} <= log[-1].keys()
    assert (tmp_path / "out" / "grids" / "000012.png").exists()
    ours, theirs = (p.transformer.state_dict() for p in (pipe, teacher))
    changed = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert changed and all(".attn" in name for name in changed) == (lora is not None)
    from diffusers import SD3Transformer2DModel

    SD3Transformer2DModel.from_pretrained(folder / "transformer")
    with pytest.raises(ValueError, match="goes without guidance: it is distilled"):
        turbo.distil(options(folder, pictures, tmp_path / "again"))


@pytest.mark.slow
def test_a_stopped_distillation_goes_on(
    model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = LoraConfig(rank=2)
    whole = turbo.distil(options(model, pictures, tmp_path / "a", lora=lora))
    fit, stopped = turbo.fit, options(model, pictures, tmp_path / "b", lora=lora)
    monkeypatch.setattr(turbo, "fit", lambda *a: fit(*a, deadline=1.0))
    for _ in range(2):
        with pytest.raises(TimeoutError):
            turbo.distil(stopped)
    monkeypatch.setattr(turbo, "fit", fit)
    again = turbo.distil(stopped)
    name = "transformer/diffusion_pytorch_model.safetensors"
    a, b = load_file(whole / name), load_file(again / name)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_options_of_distillation_arrive(pictures: Path, monkeypatch) -> None:
    seen: list[FinetuneOptions] = []
    monkeypatch.setattr(turbo, "distil", seen.append)
    how = {"from_model": "tiny", "data": pictures, "device": "cpu", "stage": "turbo"}
    command.train(pictures / "out", **how)
    assert seen[0].batch_size == 4 and seen[0].lora is None
    with pytest.raises(ValueError, match="but --stage turbo"):
        command.train(pictures / "out", **how | {"stage": "vae"})
