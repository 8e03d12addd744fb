"""Every stage learns from real data; a run survives what befalls it."""

import errno
import json
import math
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import relative_error
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

import minidiff
from minidiff import training
from minidiff.data import captioned, rng
from minidiff.data import garments as data
from minidiff.dit import MMDiT, MMDiTConfig
from minidiff.files.weights import TINY, load_component
from minidiff.learning import trainer
from minidiff.learning.trainer import Run, TrainingError, check_other, read_log
from minidiff.recipes import finetune, stages, text_stages, transformer_stage
from minidiff.recipes.job import LENGTH, Job
from minidiff.recipes.judge_stage import judge_lesson
from minidiff.recipes.lesson import Lesson
from minidiff.recipes.order import place_in_pool
from minidiff.recipes.recipe import RECIPES, Recipe, find_recipe
from minidiff.recipes.start import copy_start
from minidiff.recipes.text_stages import clip_lesson, picture_pool, t5_lesson
from minidiff.recipes.train import TrainOptions, train_stages
from minidiff.recipes.transformer_stage import (
    PlainAttention,
    SceneEncoder,
    plain_attention,
    transformer_lesson,
)
from minidiff.recipes.vae_stage import compilable, measured
from minidiff.text_encoders import CLIPTextConfig, CLIPTextEncoder
from minidiff.tokenizer import T5Tokenizer
from minidiff.training import Task, TrainingConfig, drop_encoders, fit
from minidiff.vae import VAE, Posterior, VAEConfig

# Objectives


def test_spans_are_hidden_and_listed() -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9, 1, 0, 0]])
    hidden = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 0]]).bool()
    sentinels = torch.tensor([99, 98, 97])
    source, target = training.corrupt_spans(ids, hidden, sentinels, pad=0, eos=1)
    assert source.tolist() == [[5, 99, 8, 98, 1, 0, 0, 0]]
    assert target.tolist() == [[99, 6, 7, 98, 9, 1, 0, 0]]


def test_spans_never_hide_the_end() -> None:
    ids = torch.tensor([[5, 6, 7, 1, 0, 0]]).expand(1000, -1)
    hidden = training.choose_spans(torch.rand(1000, 4), ids, pad=0)
    assert hidden.any(1).all() and not hidden[:, 3:].any()


def test_t5_writes_each_word_before_it_sees_it() -> None:
    seen = []

    def model(source: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
        seen.append(answer)
        return torch.zeros(*answer.shape, 9)

    target = torch.tensor([[5, 6, 1, 0]])
    loss = training.t5_loss(model, {"source": target, "target": target})
    assert seen[0].tolist() == [[0, 5, 6, 1]]
    assert loss.item() == pytest.approx(math.log(9))


def test_every_caption_counts_alike_in_the_loss_of_t5() -> None:
    target = torch.tensor([[5, 6, 7, 1], [5, 1, 0, 0]])

    def model(source: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
        known = 100.0 * nn.functional.one_hot(target[1], 9)
        return torch.stack([torch.zeros(4, 9), known])

    loss = training.t5_loss(model, {"source": target, "target": target})
    assert loss.item() == pytest.approx(math.log(9) / 2)


def test_each_clip_has_its_own_scale_up_to_a_hundred() -> None:
    configs = CLIPTextConfig.tiny_l(), CLIPTextConfig.tiny_g()
    model = training.CLIPTraining(*map(CLIPTextEncoder, configs))
    ids = torch.randint(0, 600, (4, 32))
    batch = {"images": torch.rand(4, 3, 64, 64), "ids_l": ids, "ids_g": ids}
    batch["meaning"] = torch.arange(4)
    training.clip_loss(model, batch).backward()
    assert model.log_scale.grad.all()
    found = []
    with torch.no_grad():
        for value in (math.log(100), 9.0):
            model.log_scale.fill_(value)
            found.append(training.clip_loss(model, batch).item())
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_the_loss_of_the_autoencoder_is_its_formula() -> None:
    mean, logvar, noise, x = torch.randn(4, 2, 3, 6, 6)
    images, given = torch.rand(2, 3, 6, 6), []
    vae = SimpleNamespace(
        encode=lambda _: Posterior(mean, logvar),
        decode=lambda latents: given.append(latents) or x,
    )
    batch = {"images": images, "noise": noise}
    loss = training.vae_loss(vae, batch, kl_weight=0.1)
    deviation, e = (logvar / 2).exp(), x - images
    torch.testing.assert_close(given[0], mean + deviation * noise)
    edges = (e.diff(dim=2).abs().mean() + e.diff(dim=3).abs().mean()) / 2
    drawn = torch.distributions.Normal(mean, deviation)
    standard = torch.distributions.Normal(0.0, 1.0)
    kl = torch.distributions.kl_divergence(drawn, standard).mean()
    expected = e.abs().mean() + 2 * e.square().mean() + edges / 2 + 0.1 * kl
    torch.testing.assert_close(loss, expected)
    default = training.vae_loss(vae, batch) - loss
    torch.testing.assert_close(default, (5e-4 - 0.1) * kl, rtol=1e-4, atol=1e-6)


def test_the_optimiser_is_as_configured() -> None:
    task, config = regression(beta2=0.9, weight_decay=0.3, max_grad_norm=0.01)
    learner, seen = training.Learner(task, config, "cpu"), []
    (group,) = learner.optimizer.param_groups
    assert group["betas"] == (0.9, 0.9) and group["weight_decay"] == 0.3

    def look(*_: object) -> None:
        grads = [p.grad.flatten() for p in learner.model.parameters()]
        seen.append(torch.cat(grads).norm().item())

    learner.optimizer.register_step_pre_hook(look)
    learner.step(0)
    assert seen == [pytest.approx(0.01, rel=1e-3)]


def test_contrastive_loss_shares_between_equal_captions() -> None:
    features = torch.eye(3)[[0, 0, 1, 2]]  # two captions that say the same
    meaning, scale = torch.tensor([7, 7, 8, 9]), torch.tensor(50.0)
    loss = training.contrastive_loss(features, features, scale, meaning)
    # rows 0 and 1 cannot do better than half for each of their two positives
    assert loss.item() == pytest.approx(math.log(2) / 2, abs=1e-4)


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    config = TrainingConfig(100, 1, learning_rate=2.0, warmup_steps=10)
    rates = [training.learning_rate(step, config) for step in range(101)]
    assert rates[0] == 0.2 and rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0) and rates[100] == pytest.approx(0)


@pytest.mark.slow
def test_schedule_is_that_of_transformers() -> None:
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 3.0)
    theirs = get_cosine_schedule_with_warmup(optimizer, 10, 100)
    config = TrainingConfig(100, 1, 3.0, warmup_steps=10)
    for step in range(10, 100):  # in the warm-up theirs begins at 0, ours one step up
        while theirs.last_epoch < step:
            optimizer.step()
            theirs.step()
        ours = training.learning_rate(step, config)
        assert ours == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)


def test_the_best_validation_is_kept(tmp_path: Path) -> None:
    task, config = regression(validate_every=10)
    scores = iter([3.0, 1.0, 2.0, 4.0])
    seen = []

    def validate(model: nn.Module) -> dict:
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        return {"validation": next(scores)}

    with Run(tmp_path, {}) as run:
        fit(replace(task, validate=validate), config, run)
    best, facts = trainer.load_tensors(tmp_path / "best.safetensors")
    assert facts["score"] == 1.0
    assert_same(best, seen[1])


def test_a_validation_is_logged_at_its_step(tmp_path: Path) -> None:
    task, config = regression(log_every=25, save_every=40, validate_every=15)
    with Run(tmp_path, {}) as run:
        looked = replace(task, validate=lambda _: {"validation": math.nan})
        fit(looked, config, run)
    log = read_log(tmp_path / "log.jsonl")
    assert [r["step"] for r in log if "validation" in r] == [15, 30, 40]
    assert [r["step"] for r in log if "loss" in r] == [15, 25, 30, 40]
    assert not (tmp_path / "best.safetensors").exists()  # not a number is no score


# Stages


@pytest.fixture(scope="module")
def job(fashion: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job at the smallest size, with its tokenizers trained."""
    quick = TrainingConfig(
        12, 8, 2e-3, warmup_steps=3, ema_decay=0.5, log_every=1, save_every=100
    )
    recipe = Recipe(
        clip=replace(quick, steps=20, batch_size=32),
        t5=replace(quick, steps=20, batch_size=32),
        vae=replace(quick, steps=12, batch_size=4),
        judge=quick,
        transformer=quick,
        pictures=64,
        latents=32,
        held=8,
        captions=500,
    )
    job = Job(tmp_path_factory.mktemp("job"), recipe, str(fashion))
    torch.set_num_threads(1)
    text_stages.train_tokenizers(job)
    return job


@pytest.fixture(autouse=True)
def tables_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the tables of every caption's tokens once for all tests."""
    make = text_stages.token_tables

    def token_tables(job: Job) -> list:
        if job.model not in TABLES:
            TABLES[job.model] = make(job)
        return TABLES[job.model]

    monkeypatch.setattr(text_stages, "token_tables", token_tables)
    monkeypatch.setattr(transformer_stage, "token_tables", token_tables)


TABLES: dict[Path, list] = {}


def run_stages(job: Job, *names: str) -> None:
    """Run the stages of these names."""
    stages.run_stages(job, [s for s in stages.STAGES if s.name in names])


def only_prepares(name: str, prepare: Callable, monkeypatch) -> None:
    """Let a stage of this name prepare ``prepare`` and learn nothing."""
    changed = [
        replace(s, prepare=prepare) if s.name == name else s for s in stages.STAGES
    ]
    monkeypatch.setattr(stages, "STAGES", changed)
    monkeypatch.setattr(stages, "fit", lambda *_: None)


def train(stage: str, output: Path, data: Path | None = None, **how) -> None:
    """``minidiff train --stage``."""
    train_stages(TrainOptions(output, stage, data, **how))


def losses(job: Job, stage: str) -> list[float]:
    """The logged losses of a stage."""
    records = read_log(job.output / "runs" / stage / "log.jsonl")
    return [r["loss"] for r in records if "loss" in r]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["clip", "t5", "vae"])
def test_stage_learns(job: Job, tmp_path: Path, stage: str) -> None:
    if stage == "vae":
        few = replace(job.recipe, pictures=4)
        job = replace(job, recipe=few, output=tmp_path)
    run_stages(job, stage)
    values = losses(job, stage)
    assert sum(values[-3:]) < 0.9 * sum(values[:3]), values


def test_a_stage_is_done_with_its_settings_only(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = Lesson(None, lambda model: None)
    only_prepares("vae", lambda job: nothing, monkeypatch)
    job = replace(job, output=tmp_path)
    run_stages(job, "vae")
    run_stages(job, "vae")
    longer = replace(job.recipe, vae=replace(job.recipe.vae, steps=24))
    with pytest.raises(ValueError, match="holds a run with steps = 12, not 24"):
        run_stages(replace(job, recipe=longer), "vae")
    pictures, labels = data.fashion_mnist("train", job.data)
    monkeypatch.setattr(stages, "fashion_mnist", lambda *_: (pictures[1:], labels[1:]))
    with pytest.raises(ValueError, match="holds a run with data = "):
        run_stages(job, "vae")
    file = tmp_path / "runs" / "vae" / "run.json"
    older = {k: v for k, v in json.loads(file.read_text()).items() if k != "data"}
    file.write_text(json.dumps(older))
    run_stages(job, "vae")


@pytest.mark.slow
def test_the_transformer_belongs_to_its_encoders(job: Job, made: Path) -> None:
    name = stages.encoders_name(job)
    assert stages.encoders_name(job) == name
    settings = job.output / "runs" / "transformer" / "run.json"
    assert json.loads(settings.read_text())["encoders"] == name
    file = made / "text_encoder_2" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        with pytest.raises(ValueError, match=f"holds a run with encoders = {name}"):
            run_stages(job, "transformer")
    finally:
        file.write_bytes(whole)


@pytest.mark.slow
def test_a_compiled_decoder_learns_in_bfloat16() -> None:
    """Also the layers in front of an upsampling: ``vae_stage.compilable``."""
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        pytest.skip("no C++ compiler for torch.compile")
    vae = compilable(VAE(DECODED)).to(memory_format=torch.channels_last)
    latents = torch.randn(2, 4, 16, 16)

    def gradient(decode: Callable) -> torch.Tensor:
        vae.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = decode(latents).float().square().mean()
        loss.backward()
        return vae.decoder.conv_in.weight.grad.clone()

    plain, compiled = gradient(vae.decode), gradient(torch.compile(vae.decode))
    assert (compiled - plain).norm() < 0.5 * plain.norm()


DECODED = VAEConfig(
    latent_channels=4,
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_num_groups=8,
)


def test_transformer_learns(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer_stage, "save_grid", lambda *_, **__: None)
    run_stages(job, "clip", "t5", "vae", "transformer")
    values = losses(job, "transformer")
    assert sum(values[-3:]) < 0.9 * sum(values[:3]), values
    assert (job.model / "model_index.json").exists()
    size = sum(f.stat().st_size for f in job.model.rglob("*") if f.is_file())
    assert size <= 25e6


# Going on from a model


@pytest.fixture
def made(job: Job, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a whole model, little trained."""
    monkeypatch.setattr(transformer_stage, "save_grid", lambda *_, **__: None)
    run_stages(job, "clip", "t5", "vae", "transformer")
    return job.model


@pytest.fixture
def go_on(job: Job, made: Path, tmp_path: Path) -> Callable[..., Path]:
    """Trains a stage from ``made`` into a folder; the model that comes out."""
    quick = {"steps": 8, "batch_size": 4, "warmup_steps": 2, "learning_rate": 2e-3}
    quick |= {"log_every": 1, "save_every": 2, "validate_every": 0, "bfloat16": False}
    recipe = tmp_path / "recipe.json"
    small = {"latents": 32, "pictures": 4, "held": 8, "keep_latents": True}
    recipe.write_text(json.dumps({"transformer": quick, "vae": quick, **small}))

    def train(stage: str, output: Path, start: Path = made, **flags) -> Path:
        TABLES[output / "model"] = TABLES[job.model]
        train(stage, output, job.data, recipe=str(recipe), start=start, **flags)
        return output / "model"

    return train


def files(folder: Path) -> dict[str, bytes]:
    """The bytes of all files under ``folder``."""
    return {
        str(f.relative_to(folder)): f.read_bytes()
        for f in folder.rglob("*")
        if f.is_file()
    }


def killed_after_step(step: int, action: Callable[[], object]) -> None:
    """Run ``action`` in a child that dies when it has saved this step."""

    def fatal() -> None:
        save = trainer.save_tensors

        def die(path: Path, *arguments, **facts) -> None:
            save(path, *arguments, **facts)
            if path.name == f"step-{step}.safetensors":
                os.kill(os.getpid(), signal.SIGKILL)

        trainer.save_tensors = die
        action()

    assert in_child(fatal) == signal.SIGKILL


@pytest.mark.parametrize("stage", ["transformer", "vae"])
def test_a_stage_goes_on_from_a_model(
    go_on: Callable[..., Path], made: Path, tmp_path: Path, stage: str
) -> None:
    model = go_on(stage, tmp_path / "whole")
    old, new = files(made), files(model)
    changed = {name.split("/")[0] for name in old if old[name] != new[name]}
    assert old.keys() == new.keys() and changed == {stage}
    killed_after_step(4, lambda: go_on(stage, tmp_path / "killed"))
    again = tmp_path / "killed" / "runs" / stage
    assert (again / "step-4.safetensors").exists()
    assert not (again / "step-6.safetensors").exists()
    assert files(go_on(stage, tmp_path / "killed")) == new


def test_a_stage_goes_on_where_its_start_has_moved(
    go_on: Callable[..., Path], made: Path, tmp_path: Path
) -> None:
    go_on("vae", tmp_path / "out")
    moved = shutil.copytree(made, tmp_path / "moved")
    go_on("vae", tmp_path / "out", moved)


def test_a_read_only_start_is_copied_to_be_written(made: Path, tmp_path: Path) -> None:
    start, out = shutil.copytree(made, tmp_path / "start"), tmp_path / "out"
    out.mkdir()
    for path in (start, *start.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)
    try:
        copy_start(Job(out, RECIPES["trial"]), start)
        copied = (out / "model", *(out / "model").rglob("*"))
        assert all(path.stat().st_mode & 0o200 for path in copied)
    finally:
        for path in (start, *start.rglob("*")):
            path.chmod(path.stat().st_mode | 0o200)


def test_the_loss_begins_where_the_old_model_stands(
    go_on: Callable[..., Path],
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = load_component(MMDiT, MMDiTConfig, made / "transformer")
    seen = []

    def fit(task: Task, config: TrainingConfig, *rest) -> nn.Module:
        with torch.no_grad():
            seen.append(task.loss(old, task.batch(torch.arange(config.batch_size))))
        return training.fit(task, config, *rest)

    monkeypatch.setattr(stages, "fit", fit)
    go_on("transformer", tmp_path / "new")
    log = read_log(tmp_path / "new" / "runs" / "transformer" / "log.jsonl")
    assert log[0]["loss"] == pytest.approx(seen[0].item(), rel=1e-5)


def test_the_decoder_learns_alone(
    go_on: Callable[..., Path], made: Path, tmp_path: Path
) -> None:
    model = go_on("vae", tmp_path / "new")
    log = read_log(tmp_path / "new" / "runs" / "vae" / "log.jsonl")
    losses = [record["loss"] for record in log if "loss" in record]
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3]), losses
    name = "vae/diffusion_pytorch_model.safetensors"
    old, new = load_file(made / name), load_file(model / name)
    same = {key.split(".")[0] for key in old if torch.equal(old[key], new[key])}
    assert same == {"encoder"}
    settings = [
        (folder / "vae" / "config.json").read_text() for folder in (made, model)
    ]
    assert settings[0] == settings[1]  # the latents keep their scale
    assert all(torch.equal(old[k], new[k]) for k in old if k.startswith("encoder"))


def test_latents_move_less_when_they_are_held(
    go_on: Callable[..., Path], made: Path, tmp_path: Path
) -> None:
    file, images = tmp_path / "recipe.json", torch.rand(4, 3, 64, 64) * 2 - 1
    recipe = json.loads(file.read_text()) | {"keep_latents": False}
    recipe["vae"]["muon"] = True
    means, settings = [], []
    for hold in (None, 1e-6, 1e3):
        file.write_text(json.dumps(recipe | {"hold_latents": hold or 0.0}))
        model = go_on("vae", tmp_path / f"{hold}") if hold else made
        vae = load_component(VAE, VAEConfig, model / "vae")
        means.append(vae.encode(images).mean.detach())
        settings.append(vae.config)
    free, held = ((mean - means[0]).square().mean().sqrt() for mean in means[1:])
    assert 0 < held < free / 2
    assert settings[0] == settings[1] == settings[2]  # the latents keep their scale


@pytest.mark.parametrize("change", [{"keep_latents": True}, {"hold_latents": 0.1}])
def test_no_latents_to_hold(tmp_path: Path, change: dict) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(change))
    with pytest.raises(ValueError, match="holds a model's latents; expected --start"):
        train("vae", tmp_path / "out", recipe=str(file))
    assert not (tmp_path / "out").exists()


def test_latents_are_kept_or_held(go_on: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hold_latents": 0.1}))
    with pytest.raises(ValueError, match="has keep_latents and hold_latents; expected"):
        go_on("vae", tmp_path / "out")


def test_recomputed_blocks_of_the_transformer(
    go_on: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(transformer_stage, "recompute", asked.append)
    plain = go_on("transformer", tmp_path / "plain")
    assert not asked
    recomputed = go_on("transformer", tmp_path / "new", recompute=True)
    assert len(asked) == 1
    name = "transformer/diffusion_pytorch_model.safetensors"
    old, new = load_file(plain / name), load_file(recomputed / name)
    assert all(torch.allclose(old[k], new[k], atol=1e-3) for k in old)


@pytest.mark.parametrize(
    ("changes", "middle"),
    [({}, 0.5), ({"uniform_levels": True}, 0.5), ({"shift": 3.0}, 0.75)],
    ids=str,
)
def test_levels_are_distributed_as_the_recipe_says(
    job: Job,
    made: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict,
    middle: float,
) -> None:
    """Logit-normal or uniform; shifted, 1/2 becomes 3/4."""
    job = replace(job, recipe=replace(job.recipe, **changes))
    task = transformer_lesson(job).task
    sigma = task.batch(torch.arange(4000))["sigma"]
    assert sigma.median() == pytest.approx(middle, abs=0.03)
    outer = (sigma < 0.1).double().mean()
    # a tenth of uniform levels; of logit-normal ones Φ(logit 0.1) = 0.014, or 0.0004
    expected = 0.1 if changes.get("uniform_levels") else 0.014 if not changes else 0
    assert outer == pytest.approx(expected, abs=0.015 if expected == 0.1 else 0.006)


def test_prompts_are_dropped_as_often_as_the_recipe_says(
    job: Job, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in ten for the empty prompt; each encoder in one of twenty for zeros."""
    task = transformer_lesson(job).task
    batch = task.batch(torch.arange(4000))
    clip, t5 = batch["context"].chunk(2, dim=1)
    pooled, widths = batch["pooled"], (64, 96)
    l, g, _ = clip.split([*widths, clip.shape[2] - sum(widths)], -1)
    gone = [(x == 0).all((1, 2)) for x in (l, g, t5)]
    assert torch.equal(gone[0], (pooled[:, :64] == 0).all(1))
    assert torch.equal(gone[1], (pooled[:, 64:] == 0).all(1))
    for part in gone:
        assert part.double().mean() == pytest.approx(0.05, abs=0.015)
    both = (gone[0] & gone[1]).double().mean()
    assert 0 < both < 0.006  # each is dropped by itself: 0.05² of both at once
    whole = ~(gone[0] | gone[1] | gone[2])
    empty = minidiff.load(made).encode_prompt("", LENGTH)[1].float()
    near = (pooled[whole] - empty).norm(dim=1) < 1e-2 * empty.norm()
    assert near.double().mean() == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("encoder", [0, 1, 2])
def test_a_dropped_encoder_leaves_zeros_in_its_place(encoder: int) -> None:
    """And nothing else changes: CLIP-L 2 wide, CLIP-G 3, a context 6 wide."""
    context, pooled = torch.rand(2, 8, 6) + 1, torch.rand(2, 5) + 1
    context[:, :4, 5] = 0  # the padding of CLIP's half
    keep = torch.ones(2, 3, dtype=torch.bool)
    keep[1, encoder] = False
    found = drop_encoders(context, pooled, keep, (2, 3))
    places = [(slice(0, 4), slice(0, 2)), (slice(0, 4), slice(2, 5))]
    rows, columns = [*places, (slice(4, 8), slice(0, 6))][encoder]
    expected = context.clone(), pooled.clone()
    expected[0][1, rows, columns] = 0
    if encoder < 2:
        expected[1][1, columns] = 0
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("stage", ["clip", "t5", "transformer"])
def test_a_stage_says_what_it_lacks(tmp_path: Path, stage: str) -> None:
    with pytest.raises(ValueError, match=f"--stage {stage} needs .*tokenizer, which"):
        train(stage, tmp_path / "new", recipe="trial")
    assert not (tmp_path / "new").exists()


def test_a_start_in_float32_is_left_as_it_is(
    go_on: Callable[..., Path], made: Path, tmp_path: Path
) -> None:
    """Weights that need no conversion come as a map of the file itself."""
    copy = shutil.copytree(made, tmp_path / "start")
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    wide = {name: x.float() for name, x in load_file(file).items()}
    save_file(wide, file, {"format": "pt"})
    before = files(copy)
    go_on("transformer", tmp_path / "new", copy)
    assert files(copy) == before


def test_what_cannot_be_a_start(
    go_on: Callable[..., Path], made: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="--stage is 'clip'; expected all, vae, tr"):
        go_on("clip", tmp_path / "new")
    with pytest.raises(ValueError, match="expected tiny, or a model's folder"):
        go_on("vae", tmp_path / "new", tmp_path)
    copy = shutil.copytree(made, tmp_path / "copy")
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"expected {len(whole)}"):
        go_on("vae", tmp_path / "new", copy)
    assert not (tmp_path / "new").exists()
    weights.write_bytes(whole)
    go_on("vae", tmp_path / "new", copy)
    moved = load_file(weights)
    moved["decoder.conv_in.bias"] += 1
    save_file(moved, weights, {"format": "pt"})
    with pytest.raises(ValueError, match="holds a run with began = "):
        go_on("vae", tmp_path / "new", copy)
    shutil.rmtree(copy / "text_encoder_3")
    (copy / "text_encoder" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="text_encoder is not .*: expected another"):
        copy_start(Job(tmp_path / "new", RECIPES["trial"]), copy)


def test_a_start_lacks_nothing_and_draws_scenes(
    go_on: Callable[..., Path], made: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(made, tmp_path / "copy")
    index = json.loads((copy / "model_index.json").read_text())
    for name in ("text_encoder_3", "tokenizer_3"):
        index[name] = [None, None]
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="which lacks T5; expected all encoders"):
        go_on("vae", tmp_path / "new", copy)
    copy = shutil.copytree(made, tmp_path / "large")
    config = json.loads((copy / "transformer" / "config.json").read_text())
    (copy / "transformer" / "config.json").write_text(
        json.dumps(config | {"sample_size": 32})
    )
    with pytest.raises(ValueError, match="the model draws 128 × 128 pixels, scenes"):
        go_on("vae", tmp_path / "new", copy)
    assert not (tmp_path / "new").exists()


def test_a_start_of_links_is_copied_whole(
    go_on: Callable[..., Path], made: Path, tmp_path: Path
) -> None:
    """And no more than the model: it may hold the folder that is trained in."""
    start = shutil.copytree(made, tmp_path / "start")
    shutil.move(start / "text_encoder", tmp_path / "away")
    (start / "text_encoder").symlink_to(tmp_path / "away")
    (start / "tokenizer" / ".ipynb_checkpoints").mkdir()
    model = go_on("vae", start / "more", start)
    assert (model / "text_encoder" / "model.safetensors").is_file()
    assert not (model / "more").exists()


def test_results_of_others_are_not_replaced(fashion: Path, tmp_path: Path) -> None:
    for name in trainer.RESULTS:
        output = tmp_path / f"in {name}"
        output.mkdir()
        (output / name).write_text("kept")
        with pytest.raises(ValueError, match="holds another training or model"):
            train("vae", output, fashion, recipe="trial")
        with pytest.raises(ValueError, match="holds another training or model"):
            trainer.check_other(output, "run", "runs")
        assert (output / name).read_text() == "kept"


def test_processes_begin_at_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tmp_path)
    monkeypatch.setattr(trainer.parallel, "average", lambda x: x / 2)
    with pytest.raises(TrainingError, match="not every process sees step 40"):
        trained(tmp_path)


def test_a_deadline_is_one_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert trainer.is_late(0.0, cpu) and not trainer.is_late(math.inf, cpu)
    monkeypatch.setattr(trainer.parallel, "active", lambda: True)
    monkeypatch.setattr(trainer.parallel, "average", lambda x: (x + 1) / 2)
    assert trainer.is_late(math.inf, cpu)  # another process is late
    assert not trainer.is_late(None, cpu)


@pytest.mark.slow
def test_plain_fashion_mnist_trains_every_stage(fashion: Path, tmp_path: Path) -> None:
    quick = {"steps": 2, "batch_size": 4, "validate_every": 0, "bfloat16": False}
    recipe = {name: quick for name in ("clip", "t5", "vae", "transformer")}
    recipe["transformer"] = quick | {"validate_every": 1}
    recipe |= {"pictures": 16, "latents": 16, "held": 8, "captions": 200}
    file, output = tmp_path / "recipe.json", tmp_path / "model"
    file.write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match="scenes is 'striped'; expected composed"):
        train("all", output, fashion, recipe=str(file), scenes="striped")
    with pytest.raises(ValueError, match="expected all, .* with plain scenes"):
        train("judge", output, fashion, recipe=str(file), scenes="plain")
    train("all", output, fashion, recipe=str(file), scenes="plain")
    assert Image.open(output / "grid.png").size == (512, 64)
    grids = [path.name for path in sorted((output / "grids").iterdir())]
    assert grids == ["000001.png", "000002.png"]
    assert not (output / "judge").exists()
    pictures = minidiff.load(output / "model")("a dress", num_inference_steps=2)
    assert pictures[0].size == (64, 64)
    with pytest.raises(ValueError, match="holds a run with scenes = plain, not comp"):
        (output / "runs" / "vae.done").unlink()
        train("vae", output, fashion, recipe=str(file))


@pytest.fixture
def own_pictures(tmp_path: Path) -> Path:
    """Twenty pictures of a square each, 80 × 60 pixels, with captions in words."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(20):
        color, place = ("red", "blue")[i % 2], 10 + i
        picture = Image.new("RGB", (80, 60), "gray")
        picture.paste(color, (place, 20, place + 20, 40))
        picture.save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(f"A {color} square, {place} from the left.")
    return folder


def test_own_pictures_train_every_stage(
    own_pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    quick = {"steps": 2, "batch_size": 4, "validate_every": 0, "bfloat16": False}
    recipe = {name: quick for name in ("clip", "t5", "vae", "transformer")}
    file, output = tmp_path / "recipe.json", tmp_path / "model"
    file.write_text(json.dumps(recipe))
    how = {"recipe": str(file), "scenes": str(own_pictures)}
    with pytest.raises(ValueError, match="expected all, .* with your pictures"):
        train("judge", output, **how)
    (own_pictures / "00.txt").write_text("a red square " * 40)
    (own_pictures / "01.png").write_bytes(b"no picture")
    no_data = tmp_path / "no_data"  # Fashion-MNIST is not asked for
    train("all", output, no_data, **how)
    found = capfd.readouterr()
    assert "01.png is not a picture that can be read" in found.err
    assert "1 of 19 captions are cut: they have over 32 tokens" in found.out
    assert Image.open(output / "grid.png").size == (512, 64)
    minidiff.load(output / "model")("A red square", num_inference_steps=2)
    file.write_text(json.dumps(recipe | {"latents": 8}))
    with pytest.raises(ValueError, match="holds a run with latents = 11, not 8"):
        train("transformer", output, no_data, **how)
    for path in sorted(own_pictures.glob("1*.png")):
        path.unlink()
        path.with_suffix(".txt").unlink()
    captioned._read_once.cache_clear()
    with pytest.raises(ValueError, match="holds 9 pictures .* at least 16"):
        train("all", tmp_path / "new", **how)


def test_own_pictures_in_any_letters(own_pictures: Path, tmp_path: Path) -> None:
    """More letters than T5's vocabulary has pieces; tokenizers are of one folder."""
    texts = sorted(own_pictures.glob("*.txt"))
    for i, path in enumerate(texts):
        path.write_text("".join(chr(0x4E00 + 40 * i + j) for j in range(40)), "utf-8")
    how = {"recipe": "trial", "scenes": str(own_pictures)}
    train("tokenizers", tmp_path / "model", **how)
    t5 = T5Tokenizer.from_pretrained(tmp_path / "model" / "model" / "tokenizer_3")
    known = [len({*t5.encode(path.read_text("utf-8"))}) for path in texts]
    assert max(known) > 30 and min(known) <= 3
    again = own_pictures.parent / "pictures" / "."  # the same folder by another name
    train("tokenizers", tmp_path / "model", **how | {"scenes": f"{again}/"})
    texts[0].write_text("other")
    captioned._read_once.cache_clear()
    with pytest.raises(ValueError, match="tokenizers holds a run with data = "):
        train("tokenizers", tmp_path / "model", **how)
    for path in texts:
        path.write_text(" ")
    captioned._read_once.cache_clear()
    with pytest.raises(ValueError, match="all captions are empty"):
        train("tokenizers", tmp_path / "new", **how)


def test_the_seed_decides(fashion: Path, tmp_path: Path) -> None:
    quick = {"steps": 2, "batch_size": 4, "log_every": 1, "bfloat16": False}
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({"vae": quick, "pictures": 16, "held": 4}))
    how = {"data": fashion, "recipe": str(file)}
    for name, seed in (("a", 0), ("b", 0), ("c", 5)):
        train("vae", tmp_path / name, seed=seed, **how)
    logs = [read_log(tmp_path / n / "runs" / "vae" / "log.jsonl") for n in "abc"]
    first, same, other = ([r["loss"] for r in log if "loss" in r] for log in logs)
    assert first == same and not set(first) & set(other)
    with pytest.raises(ValueError, match="holds a run with seed = 5, not 0"):
        train("vae", tmp_path / "c", **how)
    with pytest.raises(ValueError, match="--seed is -1; expected a whole number"):
        train("vae", tmp_path / "d", seed=-1, **how)


def test_few_held_out_scenes_make_a_small_grid(fashion: Path, tmp_path: Path) -> None:
    quick = {"steps": 1, "batch_size": 4, "validate_every": 0, "bfloat16": False}
    file, output = tmp_path / "recipe.json", tmp_path / "model"
    recipe = {"transformer": quick, "pictures": 16, "latents": 16, "held": 3}
    file.write_text(json.dumps(recipe))
    how = {"recipe": str(file), "start": Path("tiny"), "scenes": "plain"}
    train("transformer", output, fashion, **how)
    assert Image.open(output / "grid.png").size == (192, 64)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_plain_attention_has_the_same_gradients(kind: torch.dtype) -> None:
    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
    model = MMDiT(replace(MMDiTConfig.tiny(), **sizes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.2)
    c = model.config
    x, sigma = torch.randn(2, c.in_channels, 8, 8), torch.tensor([0.2, 0.7])
    context = torch.randn(2, 5, c.joint_attention_dim)
    pooled = torch.randn(2, c.pooled_projection_dim)

    def gradient() -> torch.Tensor:
        model.zero_grad()
        with torch.autocast("cpu", kind, enabled=kind != torch.float32):
            model(x, sigma, context, pooled).float().square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    expected = gradient()
    assert plain_attention(model) is model
    assert type(model.joint_blocks[0].attention) is PlainAttention
    tolerance = 1e-5 if kind == torch.float32 else 2e-2
    assert relative_error(gradient(), expected) < tolerance


def test_own_pictures_are_split_once(own_pictures: Path) -> None:
    folder = str(own_pictures)
    seen, held = (captioned.Pictures(s, folder) for s in ("train", "test"))
    assert (len(seen), len(held), len(seen.all_captions())) == (12, 8, 20)
    batches = [p.batch(torch.arange(len(p))) for p in (seen, held)]
    texts = [text for batch in batches for text in batch.captions]
    assert sorted(texts) == sorted(seen.all_captions())
    images, captions = captioned.read_folder(own_pictures, 64)
    where = [captions.index(text) for text in texts]
    shown = torch.cat([batch.images for batch in batches])
    torch.testing.assert_close(shown, data.from_bytes(images[where]))
    other = captioned.Pictures("test", folder, seed=1)
    assert set(other.numbers.tolist()) != set(held.numbers.tolist())
    squeezed = captioned.Pictures("train", folder, crop=False)
    assert not torch.equal(squeezed.images, seen.images)


def test_a_file_changes_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text('{"transformer": {"steps": 7, "learning_rate": 1}, "shift": 3.0}')
    recipe = find_recipe(str(path))
    assert (recipe.transformer.steps, recipe.shift) == (7, 3.0)
    assert recipe.vae == RECIPES["shipped"].vae
    path.write_text('{"vae": {"step": 7}}')
    with pytest.raises(ValueError, match="vae sets 'step'; expected steps"):
        find_recipe(str(path))
    path.write_text('{"vae": {"steps": "many"}}')
    with pytest.raises(ValueError, match="steps is a str, expected int"):
        find_recipe(str(path))
    path.write_text('{"vae": {"steps": true}}')
    with pytest.raises(ValueError, match="steps is a bool, expected int"):
        find_recipe(str(path))
    with pytest.raises(ValueError, match="--recipe is 'fast'; expected gpu"):
        find_recipe("fast")


@pytest.mark.parametrize(
    "change, message",
    [
        ('{"pictures": 0}', "pictures is 0; expected above 0"),
        ('{"vae": {"save_every": 0}}', "save_every is 0; expected above 0"),
        ('{"vae": {"learning_rate": -1.0}}', "learning_rate is -1.0; expected above 0"),
        ('{"vae": {"learning_rate": 0.0}}', "learning_rate is 0.0; expected above 0"),
        (
            '{"vae": {"max_grad_norm": 0}}',
            "max_grad_norm is 0; expected above 0",
        ),
        ('{"shift": 0.0}', "shift is 0.0; expected above 0"),
        ('{"clip": {"muon": true}}', "clip: muon is for vae and transformer"),
        ('{"t5": {"ema_decay": 2.0}}', "ema_decay is 2.0; expected 0 to 1"),
        ('{"clip": {"learning_rate": NaN}}', "learning_rate is nan; expected above 0"),
        ('{"clip": {"beta2": 1.0}}', "beta2 is 1.0; expected 0 to 0.999999"),
        ('{"clip": {"beta2": 1}}', "beta2 is 1; expected 0 to 0.999999"),
    ],
)
def test_a_file_with_impossible_numbers(tmp_path: Path, change, message) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(change)
    with pytest.raises(ValueError, match=message):
        find_recipe(str(path))


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    cases = {("paint", None): "--stage is 'paint'", ("vae", 0): "steps is 0"}
    cases[("all", 5)] = "need a --stage"
    for (stage, steps), message in cases.items():
        with pytest.raises(ValueError, match=message):
            train(stage, tmp_path / "out", steps=steps)
    with pytest.raises(ValueError, match="cannot be cut into 3 equal parts"):
        trained(accumulation=3)
    assert not (tmp_path / "out").exists()


def test_a_later_stage_is_checked_before_the_first(tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    file.write_text('{"transformer": {"accumulation": 5}}')
    with pytest.raises(ValueError, match="32 samples cannot be cut into 5 equal"):
        train("all", tmp_path / "out", recipe=str(file))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("lacking", ["train", "test"])
def test_a_split_that_is_not_there(fashion: Path, tmp_path: Path, lacking: str) -> None:
    for file in fashion.rglob("*.parquet"):
        if not file.name.startswith(lacking):
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(FileNotFoundError, match=f"no {lacking}-00000-of-00001.parq"):
        train("all", tmp_path / "out", tmp_path, recipe="trial")


# A run and its folder


class Regression(nn.Module):
    """A small network with enough weights that saving them takes a while."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 256), nn.SiLU(), nn.Linear(256, 8))


def regression(**changes) -> tuple[Task, TrainingConfig]:
    """Learn y = x², with samples that are functions of their numbers."""

    def batch(indices: torch.Tensor) -> dict:
        x = rng.normal(5, indices, (8,))
        return {"x": x, "y": x**2}

    def loss(model: nn.Module, batch: dict) -> torch.Tensor:
        return (model.layers(batch["x"]) - batch["y"]).square().mean()

    torch.manual_seed(0)
    config = TrainingConfig(40, 16, warmup_steps=4, log_every=5, save_every=2)
    return Task(Regression(), loss, batch), replace(config, **changes)


def trained(folder: Path | None = None, **changes) -> dict[str, torch.Tensor]:
    """The averaged weights after a run in ``folder``."""
    task, config = regression(**changes)
    if folder is None:
        return fit(task, config).state_dict()
    with Run(folder, {"steps": config.steps}) as run:
        return fit(task, config, run).state_dict()


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def in_child(action, kill_after: float | None = None) -> int:
    """Run ``action`` in a forked process, kill it if asked; its exit status.

    It gets a lock of its own for its bars: tqdm's is shared with forked processes, and
    one that is killed while it holds it would leave all others waiting for ever.
    """
    if not hasattr(os, "fork"):
        pytest.skip("needs fork and kill of POSIX")
    child = os.fork()
    if child == 0:
        try:
            tqdm.set_lock(threading.RLock())
            action()
            os._exit(0)
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


@pytest.mark.slow
def test_a_run_killed_at_any_time_ends_with_the_same_weights(tmp_path: Path) -> None:
    """20 times while it runs; one that ends before its time is followed by another."""
    whole = trained(tmp_path / "whole")
    start = time.time()
    assert in_child(lambda: trained(tmp_path / "timed")) == 0
    duration = time.time() - start
    draw = torch.Generator().manual_seed(1)
    killed, ended, folder = 0, 0, tmp_path / "run 0"
    while killed < 20:
        moment = torch.rand((), generator=draw).item() * duration / 2
        status = in_child(partial(trained, folder), moment)
        assert status in (0, signal.SIGKILL)
        killed += status == signal.SIGKILL
        if status == 0:  # too late: the machine had been slower when it was timed
            assert_same(trained(folder), whole)
            ended, duration = ended + 1, 0.8 * duration
            folder = tmp_path / f"run {ended}"
    assert_same(trained(folder), whole)
    logs = [read_log(path / "log.jsonl") for path in (tmp_path / "whole", folder)]
    a, b = ([(r["step"], r["loss"]) for r in log] for log in logs)
    assert a == b


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["fsync", "replace", "unlink"])
def test_a_run_killed_while_it_saves(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = trained(), iter(range(1000))

    def die(*arguments, **named) -> None:
        if next(calls) == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **named)

    owner = Path if moment == "unlink" else os
    original = getattr(owner, moment)

    def action() -> None:
        setattr(owner, moment, die)
        trained(tmp_path)

    assert in_child(action) == signal.SIGKILL
    assert list(tmp_path.glob("step-*.safetensors"))
    assert_same(trained(tmp_path), whole)
    assert not list(tmp_path.glob(".minidiff-*"))


def test_a_run_killed_while_it_validates_does_so_again(tmp_path: Path) -> None:
    """Else neither the log nor the best weights would ever know of that step."""

    def learn(folder: Path, dies: bool) -> None:
        def validate(model: nn.Module) -> dict[str, float]:
            if dies and run.step == 20:
                os.kill(os.getpid(), signal.SIGKILL)
            return {"validation": (model.layers[0].weight ** 2).mean().item()}

        task, config = regression(validate_every=10, save_every=10)
        with Run(folder, {}) as run:
            fit(replace(task, validate=validate), config, run)

    learn(tmp_path / "whole", False)
    assert in_child(lambda: learn(tmp_path / "killed", True)) == signal.SIGKILL
    learn(tmp_path / "killed", False)
    kept, folders = ("step", "loss", "validation"), ("whole", "killed")
    logs = (read_log(tmp_path / name / "log.jsonl") for name in folders)
    whole, again = ([[r.get(key) for key in kept] for r in log] for log in logs)
    assert whole == again and sum(record[2] is not None for record in whole) == 4
    whole, again = (tmp_path / name / "best.safetensors" for name in folders)
    assert whole.read_bytes() == again.read_bytes()


def test_what_comes_out_is_the_average() -> None:
    task, config = regression()
    weight = fit(task, config).layers[0].weight
    assert not torch.equal(weight, task.model.layers[0].weight)
    task, config = regression(ema_decay=0.0)
    weight = fit(task, config).layers[0].weight
    assert torch.equal(weight, task.model.layers[0].weight)


def test_moments_come_back_in_the_memory_order_of_the_weights(tmp_path: Path) -> None:
    def action(deadline: float | None = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)

        def loss(model: nn.Module, batch: dict) -> torch.Tensor:
            return model(batch["x"]).square().mean()

        def batch(indices: torch.Tensor) -> dict:
            return {"x": rng.normal(3, indices, (4, 6, 6))}

        config = TrainingConfig(3, 4, warmup_steps=1)
        task = Task(model, loss, batch)
        with Run(tmp_path / str(deadline is None), {}) as run:
            return fit(task, config, run, deadline=deadline).state_dict()

    whole = action()
    for _ in range(2):
        with pytest.raises(TimeoutError):
            action(deadline=1.0)
    assert_same(action(deadline=1.0), whole)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    whole = trained(tmp_path)
    newest, before = Run(tmp_path, {}).checkpoints()
    assert (newest.stem, before.stem) == ("step-40", "step-38")
    newest.write_bytes(newest.read_bytes()[:1000])
    assert_same(trained(tmp_path), whole)


def test_a_copy_of_a_checkpoint_is_no_checkpoint(tmp_path: Path) -> None:
    whole = trained(tmp_path)
    newest = Run(tmp_path, {}).checkpoints()[0]
    copy = Path(shutil.copy(newest, tmp_path / "step-40 (copy).safetensors"))
    assert Run(tmp_path, {}).checkpoints()[0] == newest
    assert_same(trained(tmp_path), whole)
    assert copy.exists()


def test_a_file_system_without_locks_is_no_other_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(trainer.fcntl, "flock", flock)
    assert_same(trained(tmp_path), trained())
    assert "is not locked: " in capsys.readouterr().err


def test_damaged_checkpoints_alone_begin_the_run_anew(tmp_path: Path) -> None:
    whole = trained(tmp_path)
    for path in Run(tmp_path, {}).checkpoints():
        path.write_bytes(b"damaged")
    killed_after_step(6, lambda: trained(tmp_path))
    kept = [path.stem for path in Run(tmp_path, {}).checkpoints()]
    assert kept[:2] == ["step-6", "step-4"]
    assert_same(trained(tmp_path), whole)


def test_a_checkpoint_of_another_model_is_named(tmp_path: Path) -> None:
    trained(tmp_path)
    task, config = regression()
    task.model.layers[0] = nn.Linear(8, 99)
    with Run(tmp_path, {}) as run, pytest.raises(ValueError) as error:
        fit(task, config, run)
    message = str(error.value)
    assert "step-40.safetensors is of another model" in message
    assert "model/layers.0.bias is (256,), expected (99,)" in message


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    whole = trained()

    def action() -> None:
        import resource

        good = "cannot write .*; the last good checkpoint is .*step-"
        with pytest.raises(OSError, match=good):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            save = trainer.save_tensors
            count = iter(range(1000))

            def limited(path: Path, tensors: dict, **facts) -> None:
                if next(count) == 6:
                    limit = sum(x.nbytes for x in tensors.values()) // 2
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                save(path, tensors, **facts)

            trainer.save_tensors = limited
            trained(tmp_path)

    assert in_child(action) == 0
    kept = Run(tmp_path, {}).checkpoints()
    assert kept and not list(tmp_path.glob(".minidiff-*"))
    assert_same(trained(tmp_path), whole)


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path: Path) -> None:
    task, config = regression(log_every=1)
    batch = task.batch

    def broken(indices: torch.Tensor) -> dict:
        made = batch(indices)
        bad = torch.where(indices == 7 * 16, torch.nan, 0.0)
        return {"x": made["x"], "y": made["y"] + bad[:, None]}

    with Run(tmp_path, {}) as run, pytest.raises(TrainingError) as error:
        fit(replace(task, batch=broken), config, run)
    message = str(error.value)
    assert "step 8 (samples 112 to 127)" in message and "step-6" in message
    assert (tmp_path / "step-6.safetensors").exists()


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path) -> None:
    """A finite loss may have a gradient that is not: √x at 0."""
    task, config = regression(save_every=1)

    def loss(model: nn.Module, batch: dict) -> torch.Tensor:
        weight = model.layers[0].weight
        steep = (0 * weight).square().sum().sqrt()
        return task.loss(model, batch) + (steep if batch["last"] else 0)

    def batch(indices: torch.Tensor) -> dict:
        return task.batch(indices) | {"last": indices[0] == 7 * 16}

    broken = replace(task, loss=loss, batch=batch)
    settings = trainer.lasting(config)
    with Run(tmp_path, settings) as run, pytest.raises(TrainingError) as error:
        fit(broken, config, run)
    message = str(error.value)
    assert "not finite after step 8 (samples 112 to 127)" in message
    assert "step-7.safetensors" in message
    assert not (tmp_path / "step-8.safetensors").exists()


def test_the_bar_tells_loss_speed_and_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(trainer.sys.stderr, "isatty", lambda: True, raising=False)
    trained(tmp_path, steps=10)
    shown = capsys.readouterr().err.split("\r")[-1]
    assert shown.endswith("\n")
    assert re.search(r"10/10 \[\d\d:\d\d<\d\d:\d\d.*loss=\d\.\d+", shown), shown
    assert re.search(r"samples_per_s=\d+", shown)
    monkeypatch.setattr(trainer.parallel, "rank", lambda: 1)
    trained(steps=10)
    assert not capsys.readouterr().err  # the first of several processes shows it


def test_encoded_scenes_are_named_after_all_that_made_them() -> None:
    layers = [nn.Linear(2, 2) for _ in range(2)]
    tables, gray = [torch.arange(6)], torch.arange(4).byte()

    def name(n: int = 8, seed: int = 0, two_garments: float = 0.5) -> str:
        scenes = SimpleNamespace(content=(gray, "Scenes", seed, two_garments))
        models = SimpleNamespace(vae=layers[0], encoders=layers[1:], tables=tables)
        return SceneEncoder.file_name(models, scenes, n)

    names = [name(), name(n=9), name(seed=1), name(two_garments=0.4)]
    assert name() == names[0]
    for changed in (layers[0].weight.data[0], layers[1].bias.data, tables[0], gray):
        changed += 1
        names.append(name())
    assert len({*names}) == 8


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    with Run(tmp_path, {}), pytest.raises(ValueError, match="another process trains"):
        Run(tmp_path, {}).__enter__()


def test_a_second_run_of_a_stage_is_refused_before_it_works(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(job: Job) -> None:
        with pytest.raises(ValueError, match="another process trains in"):
            run_stages(replace(job, run=None), "vae")
        raise KeyboardInterrupt

    only_prepares("vae", work, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run_stages(replace(job, output=tmp_path), "vae")
    fewer = replace(job, output=tmp_path, recipe=replace(job.recipe, pictures=32))
    with pytest.raises(ValueError, match="holds a run with pictures = 64, not 32"):
        run_stages(fewer, "vae")


def test_a_batch_that_does_not_fit_is_one_line(tmp_path: Path) -> None:
    task, config = regression()

    def greedy(indices: torch.Tensor) -> dict:
        if indices[0] >= 7 * 16:
            torch.empty(2**60)
        return task.batch(indices)

    settings = trainer.lasting(config)
    with pytest.raises(TrainingError) as error, Run(tmp_path, settings) as run:
        fit(replace(task, batch=greedy), config, run)
    message = str(error.value)
    assert "does not hold a batch of 16" in message and "step-6" in message
    early = pytest.raises(TrainingError, match="model, or fewer pictures or lat")
    with early, Run(tmp_path, settings):
        raise torch.OutOfMemoryError
    with pytest.raises(ZeroDivisionError), Run(tmp_path, settings):
        raise ZeroDivisionError


def test_compilation_does_not_hide_a_lack_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(batch: dict) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "compile", lambda module, **_: full)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.compiled(nn.Identity())({})


def test_a_file_is_no_folder_to_train_in(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for name in ("file", "file/below"):
        with pytest.raises((ValueError, OSError), match="is a file|cannot be written"):
            train("vae", tmp_path / name, recipe="trial")
    assert (tmp_path / "file").read_text() == "kept"


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    trained(tmp_path)
    with pytest.raises(ValueError, match="steps = 40, not 41"):
        trained(tmp_path, steps=41)
    with pytest.raises(ValueError, match="saved by another optimiser .layers.0.weight"):
        trained(tmp_path, muon=True)


def test_a_file_decides_what_is_compiled_and_in_bfloat16(tmp_path: Path) -> None:
    """What it does not name follows the device."""
    path = tmp_path / "recipe.json"
    path.write_text('{"vae": {"compile": true}, "t5": {"bfloat16": false}}')
    recipes = [find_recipe(str(path), cuda) for cuda in (False, True)]
    compiled = [[getattr(r, n).compile for n in ("vae", "t5")] for r in recipes]
    short = [[getattr(r, n).bfloat16 for n in ("clip", "t5", "vae")] for r in recipes]
    assert compiled == [[True, False], [True, True]]
    assert short == [[True, False, True], [False, False, True]]


def test_another_kind_of_training_loses_nothing(tmp_path: Path) -> None:
    """Stages and fine-tuning both write a model: not into one folder."""
    model = shutil.copytree(TINY, tmp_path / "out" / "model")
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "a.txt").write_text("a")
    before = files(model)

    def tune() -> None:
        config = TrainingConfig(1, 1)
        finetune.finetune("tiny", tmp_path / "pictures", tmp_path / "out", config)

    def train() -> None:
        train("all", tmp_path / "out", recipe="trial")

    for action, own, other in ((tune, "run", "runs"), (train, "runs", "run")):
        with pytest.raises(ValueError, match="out holds another training or model"):
            action()
        (tmp_path / "out" / own).mkdir()
        check_other(tmp_path / "out", own, other)
        (tmp_path / "out" / own).rmdir()
        (tmp_path / "out" / other).mkdir()
        with pytest.raises(ValueError, match="out holds another training or model"):
            action()
        (tmp_path / "out" / other).rmdir()
    assert files(model) == before


def test_accumulated_batches_equal_one_batch() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        whole, parts = trained(), trained(accumulation=4)
    finally:
        torch.set_default_dtype(torch.float32)
    for name in whole:
        assert torch.allclose(whole[name], parts[name], rtol=0, atol=1e-9)


def test_recomputed_blocks_learn_the_same() -> None:
    def run(recomputed: bool) -> tuple[dict[str, torch.Tensor], int]:
        task, config = regression(steps=5)
        calls = []
        task.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
        if recomputed:
            trainer.recompute([task.model.layers])
        return fit(task, config).state_dict(), len(calls)

    (again, twice), (plain, once) = run(True), run(False)
    assert_same(again, plain)
    assert (once, twice) == (5, 10)


def test_tensorboard_gets_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    class Board:
        def add_scalar(self, name: str, value: float, step: int) -> None:
            seen.append((name, value, step))

    monkeypatch.setattr(trainer, "tensorboard", lambda folder: Board())
    with Run(tmp_path, {}) as run:
        run.log({"step": 3, "loss": 0.5, "by_level": [1.0]})
    assert seen == [("loss", 0.5, 3)]


def test_only_the_last_checkpoints_and_the_best_stay(tmp_path: Path) -> None:
    with Run(tmp_path, {}, keep=3) as run:
        for step, score in enumerate([3.0, 1.0, 2.0, 4.0]):
            weights = {"w": torch.tensor([score])}
            run.save(step, weights)
            run.save_best(score, weights)
    assert [p.stem for p in run.checkpoints()] == ["step-3", "step-2", "step-1"]
    best = trainer.load_tensors(tmp_path / "best.safetensors")
    assert best[0]["w"].item() == best[1]["score"] == 1.0
    (tmp_path / "best.safetensors").write_bytes(b"damaged")
    run.save_best(5.0, {"w": torch.tensor([5.0])})
    assert trainer.load_tensors(tmp_path / "best.safetensors")[1]["score"] == 5.0


# What the stages learn from


def test_pictures_meet_their_own_captions(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = clip_lesson(job).task.batch(torch.arange(16))
    place = place_in_pool(torch.arange(16), job.recipe.pictures)
    scene = job.scenes().batch(place)
    assert (batch["images"] - scene.images).abs().max() <= 1 / 127
    for table, name in zip(text_stages.token_tables(job), "lg", strict=False):
        assert torch.equal(batch[f"ids_{name}"], table[scene.caption_ids].long())


def test_t5_restores_words_and_says_the_same_anew(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers, ids = torch.arange(16), text_stages.token_tables(job)[2].long()
    batch = t5_lesson(job).task.batch(numbers)
    place = place_in_pool(numbers, job.recipe.pictures)
    pairs = job.scenes(job.recipe.two_garments).caption_pairs(place)
    t5 = T5Tokenizer.from_pretrained(job.model / "tokenizer_3")
    for i, source in enumerate(batch["source"]):
        target = batch["target"][i]
        if i % 2:
            assert t5.sentinel_id(0) in source and t5.sentinel_id(0) in target
        else:
            assert torch.equal(source, ids[pairs[i, 0]])
            assert torch.equal(target, ids[pairs[i, 1]])
    assert (pairs[::2, 0] != pairs[::2, 1]).any()


def test_a_sample_has_its_own_caption(
    job: Job, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = transformer_lesson(job).task
    numbers = torch.arange(4 * job.recipe.latents)
    place = place_in_pool(numbers, job.recipe.latents)
    scene = job.scenes(job.recipe.two_garments).batch(place)
    batch, pipe = task.batch(numbers), minidiff.load(made)
    with torch.no_grad():
        x0 = pipe.vae.scale(pipe.vae.encode(scene.images).mode())
    assert relative_error(batch["x0"], x0) < 2e-2  # encoded in bfloat16
    pooled = pipe.encode_prompt(scene.captions, LENGTH)[1]
    near = (batch["pooled"] - pooled).norm(dim=1) < 1e-2 * pooled.norm(dim=1)
    assert near.double().mean() > 0.7  # of others an encoder, or all, are dropped


@pytest.mark.parametrize("n", [1, 12, 1000, 2**14])
def test_each_sample_comes_once_an_epoch(n: int) -> None:
    for start in (0, n, 7 * n):
        places = place_in_pool(torch.arange(start, start + n), n)
        assert torch.equal(places.sort().values, torch.arange(n))


def test_learning_looks_at_training_garments(
    job: Job, fashion: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = (data.Scenes(s, fashion).gray for s in ("train", "test"))
    assert torch.equal(job.scenes().gray, train) and job.scenes().held_out is False
    assert torch.equal(job.scenes(split="test").gray, test)
    task = judge_lesson(job).task
    found = task.batch(torch.arange(4))["images"]
    scenes = data.Scenes("train", fashion, held_out=None)
    torch.testing.assert_close(found, scenes.batch(torch.arange(4)).images)


def test_pools_and_scales(job: Job) -> None:
    scenes = job.scenes()
    images = data.from_bytes(picture_pool(scenes, 8)[0])
    expected = scenes.batch(torch.arange(8)).images
    torch.testing.assert_close(images, expected, atol=1 / 255, rtol=0)
    vae = measured(VAE(DECODED), images)
    with torch.no_grad():
        latents = vae.scale(vae.encode(images).mode())
    assert abs(latents.mean()) < 1e-3 and abs(latents.std() - 1) < 1e-3


def test_flags_change_the_stage_named(fashion: Path, tmp_path: Path) -> None:
    quick = {"steps": 9, "batch_size": 4, "validate_every": 0, "bfloat16": False}
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({"vae": quick, "pictures": 16, "held": 4}))
    how = {"steps": 1, "batch_size": 2}
    train("vae", tmp_path / "out", fashion, recipe=str(file), **how)
    begun = json.loads((tmp_path / "out/runs/vae/run.json").read_text())
    assert how.items() <= begun.items()


def test_the_model_that_ships() -> None:
    files = [f for f in TINY.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 25e6
    weights = [f for f in files if f.suffix == ".safetensors"]
    dtypes = {x.dtype for file in weights for x in load_file(file).values()}
    assert len(weights) == 5 and dtypes == {torch.float16}


def test_captions_of_full_length_are_not_cut(capsys: pytest.CaptureFixture) -> None:
    class Words:
        def encode(self, text: str) -> list[str]:
            return text.split()

        def __call__(self, texts: list[str]) -> torch.Tensor:
            return torch.zeros(len(texts), LENGTH)

    full, long = "a " * LENGTH, "a " * (LENGTH + 1)
    text_stages.encode_all(Words(), [full])
    assert capsys.readouterr().out == ""
    text_stages.encode_all(Words(), [full, long])
    assert "1 of 2 captions are cut" in capsys.readouterr().out


def test_training_goes_on_where_compilation_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refuse(module: nn.Module, **_: object) -> Callable:
        def fail(batch: dict) -> None:
            raise RuntimeError("no compiler")

        return fail

    monkeypatch.setattr(torch, "compile", refuse)
    call = trainer.compiled(nn.Identity())
    assert call({"x": 1}) == call({"x": 1}) == {"x": 1}
    assert capsys.readouterr().err.count("going on without: no compiler") == 1


def test_a_tenth_of_a_folder_is_held_out(tmp_path: Path) -> None:
    for i in range(100):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.PNG")
        (tmp_path / f"{i}.txt").write_text(f"number {i}")
    sizes = [len(captioned.Pictures(s, str(tmp_path))) for s in ("train", "test")]
    assert sizes == [90, 10]
