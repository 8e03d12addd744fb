"""The judge of the small world: what it learns, finds, and answers."""

import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F

from minidiff.data.language import Group, Meaning, shown
from minidiff.data.samples import ONE
from minidiff.data.scenes import COLORS, KINDS, World
from minidiff.judging.answers import follows, shares
from minidiff.judging.judge import (
    JUDGE,
    Found,
    Item,
    Judge,
    JudgeConfig,
    Reading,
    find,
    judge_loss,
    judge_targets,
    load_judge,
    save_judge,
    with_silhouette,
)
from minidiff.recipes.judge_stage import damaged, reads_rightly

SMALL = JudgeConfig((8, 8, 16), (1, 1, 1), 8)


def reading_of(scenes) -> Reading:
    """What a perfect judge would say."""
    t = judge_targets(scenes)
    kinds = F.one_hot(t["kinds"].clamp(min=0), len(KINDS)).float()
    colors = F.one_hot(t["colors"].clamp(min=0), len(COLORS)).float()
    ground = F.one_hot(t["ground"], len(COLORS)).float()
    return Reading(torch.logit(t["trace"], eps=1e-4), kinds, colors, ground)


def test_a_perfect_judge_finds_everything_and_nods_to_nothing_else():
    scenes = World("test", held_out=None).batch(torch.arange(300))
    found, meanings = find(reading_of(scenes)), shown(scenes.attributes)
    answers = [follows(*pair) for pair in zip(found, meanings, strict=True)]
    assert shares(answers) == dict.fromkeys(shares(answers), 1.0)
    others = zip(found, meanings[1:] + meanings[:1], strict=True)
    assert sum(follows(*pair)["all"] for pair in others) <= 1


CAT, DOG = Item("cat", "red", 16, 30), Item("dog", "blue", 48, 34)
PAIR = Found((CAT, DOG), "white")
RED, BLUE = Group("cat", 1, "red"), Group("dog", 1, "blue")


@pytest.mark.parametrize(
    ("found", "meaning", "wrong"),
    [
        (PAIR, Meaning((RED, BLUE), "left", "white"), ""),
        (PAIR, Meaning((BLUE, RED), "right"), ""),
        (PAIR, Meaning((RED, BLUE), "beside"), ""),
        (PAIR, Meaning((RED, BLUE), "above"), "places"),
        (PAIR, Meaning((RED, BLUE), "right"), "places"),
        (PAIR, Meaning((RED, BLUE), "", "black"), "ground"),
        (PAIR, Meaning((RED, Group("dog", 1, "green"))), "colors"),
        (PAIR, Meaning((RED, Group("fox"))), "things"),
        (PAIR, Meaning((RED,)), "things"),  # and nothing more
        (PAIR, Meaning((Group("cat", 2),)), "things"),
        (Found((CAT,), "white"), Meaning((RED,), "left"), ""),
        (Found((CAT,), "white"), Meaning((RED,), "middle"), "places"),
        (Found((DOG,), "white"), Meaning((BLUE,), "bottom right"), "places"),
        (Found((CAT, CAT), "red"), Meaning((Group("cat", 0),)), ""),
        (Found((CAT,), "red"), Meaning((Group("cat", 0),)), "things"),
        (Found((CAT, DOG, DOG), "red"), Meaning((RED, Group("dog", 2)), "left"), ""),
        (Found((), "red"), Meaning((RED,)), "things"),
    ],
)
def test_a_picture_follows_a_sentence_or_not(found, meaning, wrong):
    answer = follows(found, meaning)
    assert answer["all"] == (not wrong)
    assert not wrong or not answer[wrong]
    if wrong not in ("", "things"):
        assert [k for k, right in answer.items() if not right] == [wrong, "all"]


def test_the_judge_learns_and_is_read_back(tmp_path):
    torch.manual_seed(0)
    judge = Judge(SMALL)
    scenes = World("train").batch(torch.arange(12))
    batch = {"images": scenes.images} | judge_targets(scenes)
    optimizer = torch.optim.AdamW(judge.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        losses.append(judge_loss(judge, batch))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.75 * losses[0]
    save_judge(judge, tmp_path, scenes="world", accuracy=0.5)
    again = load_judge(tmp_path)
    assert not any(p.requires_grad for p in again.parameters())
    features, reading = again.read(scenes.images)
    assert features.shape == (12, 16) and reading.kinds.shape == (12, 8, 8, len(KINDS))
    expected = judge.half().float()(scenes.images)
    torch.testing.assert_close(reading.kinds, expected.kinds, atol=1e-4, rtol=1e-4)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["scenes"] == "world" and config["accuracy"] == 0.5
    with pytest.raises(FileNotFoundError, match="no judge in .*; train it|no judge in"):
        load_judge(tmp_path / "none")


def test_the_loss_is_a_mean_over_scenes():
    """Of halves with unlike numbers of items too, so that devices can share."""
    torch.manual_seed(0)
    scenes, judge = World("train").batch(torch.arange(12)), Judge(SMALL).double()
    whole = {"images": scenes.images.double()} | judge_targets(scenes)
    whole["trace"] = whole["trace"].double()
    parts = [{k: v[i : i + 6] for k, v in whole.items()} for i in (0, 6)]
    assert len({int((part["kinds"] >= 0).sum()) for part in parts}) == 2
    losses = [judge_loss(judge, part).item() for part in parts]
    assert judge_loss(judge, whole).item() == pytest.approx(sum(losses) / 2, rel=1e-12)


def test_pictures_are_spoilt_by_their_number_alone():
    """A fifth has no speckles, which alone change a plain picture; few escape all."""
    numbers = torch.arange(400)
    images = World("train").batch(torch.arange(4)).images[numbers % 4]
    spoilt = damaged(images, numbers, 3)
    assert torch.equal(damaged(images[:9], numbers[:9], 3)[5], spoilt[5])
    assert not torch.equal(damaged(images, numbers, 4), spoilt)
    assert spoilt.abs().max() <= 1
    plain = torch.zeros_like(images)
    changes = damaged(plain, numbers, 3) - plain, spoilt - images
    speckled, changed = (x.abs().mean((1, 2, 3)) > 1e-5 for x in changes)
    assert 0.12 < (~speckled).float().mean() < 0.28
    assert (~changed).any() and not (speckled & ~changed).any()
    assert changed[~speckled].float().mean() > 0.8  # by bending or blurring: 0.96


def test_a_first_guess_costs_what_chance_costs():
    """Zeros for logits: log of the number of answers for each question."""
    scenes = World("train").batch(torch.arange(8))
    t = judge_targets(scenes)
    zeros = torch.zeros(8, 8, 8)
    reading = Reading(
        zeros,
        zeros[..., None].expand(-1, -1, -1, len(KINDS)),
        zeros[..., None].expand(-1, -1, -1, 12),
        torch.zeros(8, 12),
    )
    loss = judge_loss(lambda _: reading, {"images": scenes.images} | t)
    colored = (t["colors"] >= 0).any(2).any(1).float().mean().item() * math.log(12)
    expected = 20 * math.log(2) + math.log(len(KINDS)) + colored + math.log(12)
    assert loss.item() == pytest.approx(expected, abs=1e-3)


def test_silhouette_knows_no_colour():
    """The same garment in other colours, of the same distance to the background."""
    image = -torch.ones(1, 3, 64, 64)
    image[:, 0, 20:40, 20:40] = 0.5
    extra = with_silhouette(image)[:, 3:]
    assert torch.equal(extra, with_silhouette(image.roll(1, 1))[:, 3:])
    assert extra[0, 0, 30, 30] == 1.5 and extra[0, 0, 0, 0] == 0


def test_no_judge(tmp_path):
    with pytest.raises(FileNotFoundError, match="train it with"):
        load_judge(tmp_path)


def test_a_judge_that_cannot_be_used_is_named(tmp_path):
    folder = shutil.copytree(JUDGE, tmp_path / "judge")
    file, config = folder / "model.safetensors", folder / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"features": 5}))
    with pytest.raises(ValueError, match=f"{file}: .* has shape .*; expected"):
        load_judge(folder)
    config.write_text("{")
    with pytest.raises(ValueError, match=f"{config} is not valid JSON"):
        load_judge(folder)
    config.write_text(json.dumps(values))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"{file} is not a whole safetensors file"):
        load_judge(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "garments", "least"),
    [("one garment", 1.0, 0.87), ("one thing", 0.0, 0.99)],
)
def test_the_shipped_judge_reads_real_scenes(fashion, name, garments, least):
    assert sum(f.stat().st_size for f in JUDGE.iterdir()) <= 2 * 2**20
    claimed = json.loads((JUDGE / "config.json").read_text())["accuracy"][name]
    world = World("test", fashion, "cpu", 2, None, ONE, garments)
    found = reads_rightly(load_judge(), world, torch.arange(300))
    assert claimed >= least and abs(found - claimed) < 0.05


# Training


@pytest.mark.slow
@pytest.mark.usefixtures("short_grids")
def test_the_world_trains_every_stage(fashion, tmp_path):
    import minidiff
    from minidiff.files import tokenizer_files as words
    from minidiff.recipes.train import TrainOptions, train_stages

    quick = {"steps": 1, "batch_size": 4, "validate_every": 0}
    recipe = {name: quick for name in ("clip", "t5", "vae", "judge", "transformer")}
    recipe["transformer"] = quick | {"validate_every": 1, "plateau": 0.5}
    sizes = {"pictures": 16, "latents": 16, "held": 8, "captions": 1500}
    file, output = tmp_path / "recipe.json", tmp_path / "model"
    file.write_text(json.dumps(recipe | sizes | {"scenes": "world"}))
    train_stages(TrainOptions(output, data=fashion, recipe=str(file)))
    model = output / "model"
    assert words.unknown_words(["a storm over a cat"], words.seen(model)).endswith(
        ": storm"
    )
    assert (output / "at" / "1" / "model" / "transformer").is_dir()
    load_judge(output / "judge")
    pipe = minidiff.load(model)
    assert pipe("A CAT", num_inference_steps=1)[0].size == (64, 64)
    capital, small = (pipe.tokenizers[2].encode(t) for t in ("A CAT", "a cat"))
    assert capital == small
    parts = {
        name: sum(p.numel() for p in getattr(pipe, name).parameters())
        for name in ("transformer", "vae")
    }
    encoders = sum(p.numel() for e in pipe.text_encoders for p in e.parameters())
    assert 2 * parts["transformer"] < 12e6  # bytes of float16
    assert 2 * (sum(parts.values()) + encoders) < 20e6
