"""Every stage learns from real data, and goes on from another model."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import relative_error
from PIL import Image
from regression import killed_after_step
from safetensors.torch import load_file, save_file
from torch import nn
from training_jobs import TABLES, files, losses, only_prepares, run_stages, train

import minidiff
from minidiff import training
from minidiff.data.fashion_mnist import garment_files, garments_by_class
from minidiff.data.scenes import World
from minidiff.dit import MMDiT, MMDiTConfig
from minidiff.files.pictures import from_bytes, to_bytes
from minidiff.files.weights import TINY, load_component
from minidiff.learning.run import read_log
from minidiff.recipes import text_stages, transformer_stage
from minidiff.recipes import train as stages
from minidiff.recipes.features import place_in_pool
from minidiff.recipes.job import LENGTH, Job, Lesson
from minidiff.recipes.judge_stage import SHARE, damaged, judge_lesson
from minidiff.recipes.recipe import RECIPES, Recipe
from minidiff.recipes.text_stages import clip_lesson, picture_pool, t5_lesson
from minidiff.recipes.train import copy_start
from minidiff.recipes.transformer_stage import (
    transformer_lesson,
)
from minidiff.recipes.vae_stage import measured
from minidiff.tokenizer import T5Tokenizer
from minidiff.training import Task, TrainingConfig
from minidiff.vae import VAE, VAEConfig

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("short_grids")]


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
        turbo=quick,
        matching=quick,
        control=quick,
        pictures=64,
        latents=32,
        held=8,
        captions=500,
    )
    job = Job(tmp_path_factory.mktemp("job"), recipe, str(fashion))
    torch.set_num_threads(1)
    text_stages.train_tokenizers(job)
    return job


@pytest.fixture(scope="module", autouse=True)
def tables_once() -> Iterator[None]:
    """Make the tables of every caption's tokens once for all tests."""
    make = text_stages.token_tables

    def token_tables(job: Job) -> list:
        if job.model not in TABLES:
            TABLES[job.model] = make(job)
        return TABLES[job.model]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_stages, "token_tables", token_tables)
        patch.setattr(transformer_stage, "token_tables", token_tables)
        yield


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
    pictures, labels = garment_files("train", job.data)
    monkeypatch.setattr(stages, "garment_files", lambda *_: (pictures[1:], labels[1:]))
    with pytest.raises(ValueError, match="holds a run with data = "):
        run_stages(job, "vae")
    file = tmp_path / "runs" / "vae" / "run.json"
    older = {k: v for k, v in json.loads(file.read_text()).items() if k != "data"}
    file.write_text(json.dumps(older))
    run_stages(job, "vae")


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


def test_transformer_learns(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer_stage, "save_grid", lambda *_, **__: None)
    run_stages(job, "clip", "t5", "vae", "transformer")
    values = losses(job, "transformer")
    assert sum(values[-3:]) < 0.9 * sum(values[:3]), values
    assert (job.model / "model_index.json").exists()
    size = sum(f.stat().st_size for f in job.model.rglob("*") if f.is_file())
    assert size <= 25e6


def test_a_dead_conditioning_is_seen() -> None:
    model = MMDiT(MMDiTConfig.tiny())
    pooled = torch.randn(4, model.config.pooled_projection_dim)
    alive = transformer_stage.conditioning(model, pooled)
    torch.nn.init.constant_(model.t_embedder.mlp[2].bias, -67)
    assert transformer_stage.conditioning(model, pooled) < 1e-9 < 1e-3 < alive


@pytest.fixture(scope="module")
def made(job: Job) -> Path:
    """The folder of a whole model, little trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer_stage, "save_grid", lambda *_, **__: None)
        run_stages(job, "clip", "t5", "vae", "transformer")
    return job.model


@pytest.fixture
def go_on(job: Job, made: Path, tmp_path: Path) -> Callable[..., Path]:
    """Trains a stage from ``made`` into a folder; the model that comes out."""
    quick = {"steps": 4, "batch_size": 4, "warmup_steps": 2, "learning_rate": 2e-3}
    quick |= {"log_every": 1, "save_every": 2, "validate_every": 0, "bfloat16": False}
    recipe = tmp_path / "recipe.json"
    small = {"latents": 32, "pictures": 4, "held": 8, "captions": 500}
    stages = {name: quick for name in ("transformer", "vae", "turbo")}
    stages["control"] = quick | {"validate_every": 4}
    stages["matching"] = stages["control"] | {"weight_decay": 0}
    recipe.write_text(json.dumps(stages | small))

    def go(stage: str, output: Path, start: Path = made, **flags) -> Path:
        TABLES[output / "model"] = TABLES[job.model]
        train(stage, output, job.data, recipe=str(recipe), start=start, **flags)
        return output / "model"

    return go


@pytest.mark.parametrize("stage", ["transformer", "vae"])
def test_a_stage_goes_on_from_a_model(
    go_on: Callable[..., Path], made: Path, tmp_path: Path, stage: str
) -> None:
    model = go_on(stage, tmp_path / "whole")
    old, new = files(made), files(model)
    changed = {name.split("/")[0] for name in old if old[name] != new[name]}
    assert old.keys() == new.keys() and changed == {stage}
    killed_after_step(2, lambda: go_on(stage, tmp_path / "killed"))
    again = tmp_path / "killed" / "runs" / stage
    assert (again / "step-2.safetensors").exists()
    assert not (again / "step-4.safetensors").exists()
    assert files(go_on(stage, tmp_path / "killed")) == new


def test_turbo_shares_all_but_the_transformer(
    go_on: Callable[..., Path], made: Path, tmp_path: Path
) -> None:
    assert files(go_on("turbo", tmp_path / "whole")) == files(made)
    turbo = tmp_path / "whole" / "turbo"
    parts = {path.name for path in turbo.iterdir()}
    assert parts == {"model_index.json", "scheduler", "transformer"}
    pipe, teacher = minidiff.load(turbo), minidiff.load(made)
    assert pipe.defaults == (4, 1.0) and torch.equal(
        pipe.vae.decoder.conv_in.weight, teacher.vae.decoder.conv_in.weight
    )
    pairs = zip(*(p.transformer.parameters() for p in (pipe, teacher)), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)
    killed_after_step(2, lambda: go_on("turbo", tmp_path / "killed"))
    go_on("turbo", tmp_path / "killed")
    assert files(tmp_path / "killed" / "turbo") == files(turbo)
    with pytest.raises(ValueError, match="a batch of 6 samples in 1 parts; expected 4"):
        go_on("turbo", tmp_path / "odd", batch_size=6)
    with pytest.raises(ValueError, match="shares its text_encoder with another"):
        go_on("turbo", tmp_path / "from", turbo)


def test_a_student_is_sharpened_beside_itself(
    go_on: Callable[..., Path], made: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="/turbo, .*; expected --stage turbo, or"):
        go_on("matching", tmp_path)
    go_on("turbo", tmp_path)
    before, turbo = files(tmp_path / "turbo"), minidiff.load(tmp_path / "turbo")
    go_on("matching", tmp_path)
    sharp = minidiff.load(tmp_path / "matching")
    pairs = zip(*(p.transformer.parameters() for p in (turbo, sharp)), strict=True)
    assert any((a - b).abs().max() > 1e-4 for a, b in pairs)
    assert files(tmp_path / "turbo") == before and sharp.defaults == (4, 1.0)
    assert (tmp_path / "grids" / "matching-000004.png").exists()


def test_a_control_net_learns_beside_a_model(
    go_on: Callable[..., Path], made: Path, tmp_path: Path
) -> None:
    """The model stays; a run that was killed ends where one that was not does."""
    assert files(go_on("control", tmp_path / "whole")) == files(made)
    net = minidiff.load_control(tmp_path / "whole" / "control")
    assert (net.kind, net.last, net.config.num_layers) == ("edges", False, 3)
    assert all(layer.weight.any() for layer in net.controlnet_blocks)
    killed_after_step(2, lambda: go_on("control", tmp_path / "killed"))
    assert not (tmp_path / "killed" / "control").exists()
    go_on("control", tmp_path / "killed")
    whole, again = (files(tmp_path / n / "control") for n in ("whole", "killed"))
    assert whole == again
    last = read_log(tmp_path / "whole" / "runs" / "control" / "log.jsonl")[-1]
    assert 0 <= last["agreement"] <= 1 and last["validation"] > 0
    assert (tmp_path / "whole" / "grids" / "control-000004.png").exists()


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
    [({}, 0.5), ({"shift": 3.0}, 0.75)],
    ids=str,
)
def test_levels_are_distributed_as_the_recipe_says(
    job: Job,
    made: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict,
    middle: float,
) -> None:
    """Logit-normal; shifted, 1/2 becomes 3/4."""
    job = replace(job, recipe=replace(job.recipe, **changes))
    task = transformer_lesson(job).task
    sigma = task.batch(torch.arange(4000))["sigma"]
    assert sigma.median() == pytest.approx(middle, abs=0.03)
    outer = (sigma < 0.1).double().mean()
    expected = 0 if changes else 0.014  # Φ(logit 0.1), or 0.0004
    assert outer == pytest.approx(expected, abs=0.006)


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
    with pytest.raises(ValueError, match=rf"file \({len(whole) - 1} bytes"):
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


def test_plain_fashion_mnist_trains_every_stage(fashion: Path, tmp_path: Path) -> None:
    quick = {"steps": 2, "batch_size": 4, "validate_every": 0, "bfloat16": False}
    recipe = {name: quick for name in ("clip", "t5", "vae", "transformer")}
    recipe["transformer"] = quick | {"validate_every": 1}
    recipe |= {"pictures": 16, "latents": 16, "held": 8, "captions": 200}
    file, output = tmp_path / "recipe.json", tmp_path / "model"
    file.write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match="scenes is 'striped'; expected world"):
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
    with pytest.raises(ValueError, match="holds a run with data = "):
        (output / "runs" / "vae.done").unlink()
        train("vae", output, fashion, recipe=str(file))


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


def test_every_other_batch_has_one_mean_color() -> None:
    n, size = 64, 8
    colors = torch.tensor([[200, 20, 20], [20, 200, 20], [20, 20, 200], [90, 90, 90]])
    which = torch.arange(n) % 4
    images = colors[which].byte()[..., None, None].expand(-1, -1, 6, 6)
    place = text_stages.alike_or_not(
        torch.arange(n), text_stages.by_color(images), size
    )
    batches = which[place].view(-1, size)
    alike = (batches == batches[:, :1]).all(1)
    assert alike.tolist() == [False, True] * 4
    assert len({*batches[1::2, 0].tolist()}) > 1  # not the same colour each time


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


def test_pictures_meet_their_own_captions(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = clip_lesson(job).task.batch(torch.arange(16))
    place = place_in_pool(torch.arange(16), job.recipe.pictures)
    scene = job.scenes().batch(place)
    assert (batch["images"] - scene.images).abs().max() <= 1 / 127
    pairs = job.scenes().caption_pairs(place)
    assert (pairs == scene.caption_ids[:, None]).any(1).all()
    for table, name in zip(text_stages.token_tables(job), "lg", strict=False):
        assert torch.equal(batch[f"ids_{name}"], table[pairs].long())


def test_t5_restores_words_and_says_the_same_anew(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers, ids = torch.arange(16), text_stages.token_tables(job)[2].long()
    batch = t5_lesson(job).task.batch(numbers)
    place = place_in_pool(numbers, job.recipe.pictures)
    pairs = job.scenes().caption_pairs(place)
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
    scene = job.scenes().batch(place)
    batch, pipe = task.batch(numbers), minidiff.load(made)
    with torch.no_grad():
        x0 = pipe.vae.scale(pipe.vae.encode(scene.images).mode())
    assert relative_error(batch["x0"], x0) < 2e-2  # encoded in bfloat16
    pooled = pipe.encode_prompt(scene.captions, LENGTH)[1]
    near = (batch["pooled"] - pooled).norm(dim=1) < 1e-2 * pooled.norm(dim=1)
    assert near.double().mean() > 0.7  # of others an encoder, or all, are dropped


def test_learning_looks_at_training_garments(
    job: Job, fashion: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "test"):
        garments = garments_by_class(split, fashion, "cpu")
        assert job.scenes(split).wardrobe.pictures is garments.pictures
    assert job.scenes().held_out == ""
    task, numbers = judge_lesson(job).task, torch.arange(4)
    found = task.batch(numbers)["images"]
    scenes = World("train", fashion, held_out=None, garments=SHARE)
    images = scenes.batch(place_in_pool(numbers, job.recipe.latents)).images
    kept = from_bytes(to_bytes(images))
    expected = damaged(kept, numbers, job.seed_for("damage"))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_pools_and_scales(job: Job) -> None:
    scenes = job.scenes()
    images = from_bytes(picture_pool(scenes, 8)[0])
    expected = scenes.batch(torch.arange(8)).images
    torch.testing.assert_close(images, expected, atol=1 / 255, rtol=0)
    vae = measured(VAE(VAEConfig.tiny()), images)
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
