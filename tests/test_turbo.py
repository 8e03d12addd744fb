"""What distils: batches of jumps, their loss, and any model of the family."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import randomize
from pipelines import load_tokenizers, reference_pipeline, save_tokenizers
from safetensors.torch import load_file
from small import TRANSFORMER
from torch import Tensor, nn

import minidiff
from minidiff.cli import train as command
from minidiff.data import rng
from minidiff.distillation import JumpScheduler, paths, told
from minidiff.dit import MMDiT
from minidiff.flow_matching import guide, shift_sigma
from minidiff.judging.diversity import SEEDS, feature_spread
from minidiff.learning import parallel
from minidiff.learning.run import read_log
from minidiff.recipes import turbo
from minidiff.recipes.features import Features
from minidiff.recipes.finetune import FinetuneOptions, LoraConfig
from minidiff.recipes.jumps import (
    SIZES,
    JumpBatches,
    Teacher,
    caption_row,
    check_rows,
    draw_paths,
    jump_loss,
)
from minidiff.recipes.matching_stage import Pair, matching_loss
from minidiff.training import TrainingConfig


@pytest.fixture(scope="module")
def features() -> Features:
    latents, place = torch.randn(6, 16, 8, 8), torch.tensor([1, 2, 1, 2, 1, 2])
    return Features(latents, place, torch.randn(3, 5, 48), torch.randn(3, 40))


@pytest.fixture(scope="module")
def batches(features: Features) -> JumpBatches:
    """Jumps along eleven paths; what a path is at place k/8 is its number and k."""
    drawn = torch.arange(11.0)[:, None] + torch.arange(8, -1, -1) / 100
    drawn = drawn[..., None, None, None].expand(11, 9, 16, 8, 8)
    return JumpBatches(drawn, features, lambda i: i % 11, seed=1)


def test_a_sample_has_a_jump_of_its_own(batches: JumpBatches) -> None:
    batch = batches(torch.arange(400))
    assert batch["size"].tolist() == [1 / 8, 1 / 4, 1 / 2, 1] * 100
    begin = batch["place"] / batch["size"]  # whole jumps from the end
    assert torch.equal(begin, begin.round()) and begin.min() == 1
    assert (batch["place"] <= 1).all()
    eighths = batch["place"][::SIZES]
    assert set(eighths.tolist()) == {k / 8 for k in range(1, 9)}
    part = batches(torch.arange(8, 16))
    assert all(torch.equal(batch[k][8:16], x) for k, x in part.items())


def test_a_jump_leads_along_its_path(batches: JumpBatches, features: Features) -> None:
    batch, path = batches(torch.arange(64)), torch.arange(64) % 11
    there = batch["place"] - batch["size"]
    for name, place in (("x", batch["place"]), ("end", there)):
        wanted = path + 8 * place / 100
        torch.testing.assert_close(batch[name][:, 0, 0, 0], wanted, rtol=1e-6, atol=0)
    row = features.place[path % 6]
    assert torch.equal(batch["context"], features.context[row])
    assert torch.equal(batch["pooled"], features.pooled[row])


def test_the_loss_asks_for_the_mean_velocity(batches: JumpBatches) -> None:
    batch, shift = batches(torch.arange(8)), 3.0
    at = batch["place"], batch["size"]
    ends = (shift_sigma(x, shift) for x in (at[0] - at[1], at[0]))
    length = torch.sub(*ends)[:, None, None, None]
    mean = (batch["end"] - batch["x"]) / length

    def student(x: Tensor, time: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        assert torch.equal(x, batch["x"]) and torch.equal(time, told(*at, shift))
        assert torch.equal(context, batch["context"])
        return mean + pooled.mean()

    off = batch["pooled"].mean().square()
    torch.testing.assert_close(jump_loss(student, batch, shift), off)


def test_a_caption_is_drawn_for_as_often_as_it_counts(features: Features) -> None:
    often = replace(features, repeats=torch.tensor([2, 0, 0, 1, 0, 0]))
    assert caption_row(often, torch.arange(7)).tolist() == [1, 1, 2, 1, 1, 2, 1]
    assert torch.equal(caption_row(features, torch.arange(6)), features.place)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_drawings_are_the_guided_teachers(
    features: Features, shift: float, tmp_path: Path
) -> None:
    model = randomize(MMDiT(TRANSFORMER), 0)
    empty = features.context[0], features.pooled[0]
    row = features.place[:3]
    text = features.context[row], features.pooled[row]
    config = TrainingConfig(steps=8, batch_size=4)  # 3 drawings

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        none = [e.expand_as(y) for e, y in zip(empty, text, strict=True)]
        time = sigma.expand(3)
        return guide(model(x, time, *none), model(x, time, *text), 2.5)

    def draw(model: MMDiT, scale: float) -> Tensor:
        teacher = Teacher(model, empty, scale, shift, "weights")
        return draw_paths(teacher, features, config, 5, "cpu", tmp_path)

    with torch.no_grad():
        wanted = paths(guided, rng.normal(5, torch.arange(3), (16, 8, 8)), shift)
    drawn = draw(model, 2.5)
    torch.testing.assert_close(drawn, wanted.half(), rtol=2e-3, atol=1e-3)
    other = randomize(MMDiT(TRANSFORMER), 1)
    assert torch.equal(draw(other, 2.5), drawn)  # they are kept: it is not asked
    assert not torch.equal(draw(other, 3.0), drawn)


def test_each_of_two_processes_draws_its_share(
    features: Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, config = [], TrainingConfig(steps=36, batch_size=2)  # 6 drawings in 3 parts
    none = torch.zeros(5, 48), torch.zeros(40)

    def draw(cache: Path | None) -> Tensor:
        teacher = Teacher(lambda x, *_: asked.append(1) or x, none, 2.0, 1.0, "weights")
        return draw_paths(teacher, features, config, 5, "cpu", cache)

    whole, calls, before = draw(None), len(asked), []
    monkeypatch.setattr(parallel, "size", lambda: 2)
    monkeypatch.setattr(
        parallel, "wait", lambda: before.append((len(asked), *tmp_path.iterdir()))
    )
    for rank, parts in ((1, 1), (0, 2)):
        asked.clear()
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        assert torch.equal(draw(tmp_path), whole)
        shutil.rmtree(tmp_path)
        assert before[-1][0] == parts * calls / 3 and len(before[-1]) == 1 + parts


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
    how = {"model": "tiny", "data": pictures, "device": "cpu", "stage": "turbo"}
    command.train(pictures / "out", **how)
    assert seen[0].config().batch_size == 4 and seen[0].lora is None
    with pytest.raises(ValueError, match="but --stage turbo"):
        command.train(pictures / "out", **how | {"stage": "vae"})


# Matching


class Scaled(nn.Module):
    """A network of one weight: its velocity is that times x."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))

    def forward(self, x: Tensor, time: Tensor, *text: Tensor) -> Tensor:
        return self.weight * x


@pytest.mark.parametrize("jumps", [1, 2])
def test_each_network_learns_by_its_own_loss(jumps: int) -> None:
    """And the loss is a mean over samples."""
    numbers, text = torch.arange(8), (torch.zeros(8, 3, 4), torch.zeros(8, 5))
    whole = {"context": text[0], "pooled": text[1], "jumps": torch.ones(jumps)}
    for i, name in enumerate(("begin", "noise", "noise1", "noise2")):
        whole[name] = rng.normal(i, numbers, (4, 2, 2)).double()
    for i, name in enumerate(("sigma", "sigma1", "sigma2")):
        whole[name] = rng.uniform(i, numbers, 1)[:, 0].double()
    known = Scaled(0.2).requires_grad_(False)
    teacher = Teacher(known, (text[0][0], text[1][0]), 2.0, 1.0, "weights")

    def gradients(rows: slice, matches: float) -> tuple[Tensor, Tensor]:
        pair = Pair(Scaled(0.5), Scaled(0.3))
        batch = {k: v[rows] if len(v) == 8 else v for k, v in whole.items()}
        batch["matches"] = torch.tensor(matches)
        matching_loss(pair, batch, teacher).backward()
        return pair.student.weight.grad, pair.fake.weight.grad

    still, alone = gradients(slice(None), 0.0)
    student, fake = gradients(slice(None), 1.0)
    assert still == 0 and fake == alone and abs(fake) > 0.1
    assert student > 0  # the teacher's estimate lies further out: subtract less
    parts = [gradients(rows, 1.0) for rows in (slice(0, 4), slice(4, 8))]
    for i, one in enumerate((student, fake)):
        torch.testing.assert_close(sum(p[i] for p in parts) / 2, one)
