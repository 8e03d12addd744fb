"""The judge of the small world, and the evaluation that asks it."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from minidiff.data.language import Group, Meaning, shown
from minidiff.data.scenes import COLORS, KINDS, World, held_out_colors
from minidiff.judging import world as evaluation
from minidiff.judging.judge import save_judge
from minidiff.judging.witness import (
    Found,
    Item,
    Reading,
    Witness,
    WitnessConfig,
    find,
    follows,
    load_witness,
    shares,
    witness_loss,
    witness_targets,
)

SMALL = WitnessConfig((8, 8, 16), (1, 1, 1), 8)


def reading_of(scenes) -> Reading:
    """What a perfect witness would say."""
    t = witness_targets(scenes)
    kinds = F.one_hot(t["kinds"].clamp(min=0), len(KINDS)).float()
    colors = F.one_hot(t["colors"].clamp(min=0), len(COLORS)).float()
    ground = F.one_hot(t["ground"], len(COLORS)).float()
    return Reading(torch.logit(t["trace"], eps=1e-4), kinds, colors, ground)


@pytest.mark.slow
def test_a_perfect_witness_finds_everything_and_nods_to_nothing_else():
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


@pytest.mark.slow
def test_the_witness_learns_and_is_read_back(tmp_path):
    torch.manual_seed(0)
    witness = Witness(SMALL)
    scenes = World("train").batch(torch.arange(12))
    batch = {"images": scenes.images} | witness_targets(scenes)
    optimizer = torch.optim.AdamW(witness.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        losses.append(witness_loss(witness, batch))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.75 * losses[0]
    save_judge(witness, tmp_path, scenes="world", accuracy=0.5)
    again = load_witness(tmp_path)
    assert not any(p.requires_grad for p in again.parameters())
    features, reading = again.read(scenes.images)
    assert features.shape == (12, 16) and reading.kinds.shape == (12, 8, 8, len(KINDS))
    expected = witness.half().float()(scenes.images)
    torch.testing.assert_close(reading.kinds, expected.kinds, atol=1e-4, rtol=1e-4)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["scenes"] == "world" and config["accuracy"] == 0.5
    with pytest.raises(FileNotFoundError, match="no judge in .*; train it|no judge in"):
        load_witness(tmp_path / "none")


def test_a_first_guess_costs_what_chance_costs():
    """Zeros for logits: log of the number of answers for each question."""
    scenes = World("train").batch(torch.arange(8))
    t = witness_targets(scenes)
    zeros = torch.zeros(8, 8, 8)
    reading = Reading(
        zeros,
        zeros[..., None].expand(-1, -1, -1, len(KINDS)),
        zeros[..., None].expand(-1, -1, -1, 12),
        torch.zeros(8, 12),
    )
    loss = witness_loss(lambda _: reading, {"images": scenes.images} | t)
    colored = math.log(12) if (t["colors"] >= 0).any() else 0
    expected = 20 * math.log(2) + math.log(len(KINDS)) + colored + math.log(12)
    assert loss.item() == pytest.approx(expected, abs=1e-3)


# The evaluation


def test_rows_name_the_pairs_never_trained():
    row = evaluation.ROWS["one garment, colour never trained"]
    texts, meanings, numbers = evaluation.row_prompts(row, 40, 2)
    assert len(texts) == len(meanings) == len(numbers) == 40
    held = held_out_colors()
    for meaning in meanings:
        (group,) = meaning.groups
        assert group.color == list(COLORS)[held[KINDS.index(group.kind)]]
    scenes = evaluation.row_scenes(row, "test", None, "cpu", 2)
    shows = shown(scenes.attributes(numbers))
    pairs = zip(shows, meanings, strict=True)
    assert all(a.groups[0].kind == b.groups[0].kind for a, b in pairs)
    row = evaluation.ROWS["one thing, place never trained"]
    assert all(m.place for m in evaluation.row_prompts(row, 40, 2)[1])


def test_texture_is_the_roughness_inside():
    smooth = torch.full((2, 3, 64, 64), -1.0)
    smooth[:, :, 16:48, 16:48] = 1.0
    rough = smooth.clone()
    rough[:, :, 16:48, 16:48] -= 0.2 * (torch.arange(32) % 2)
    values = evaluation.texture(torch.cat([smooth, rough]))
    torch.testing.assert_close(values, torch.tensor([0.0, 0.0, 0.16, 0.16]))
    assert len(evaluation.texture(smooth[:, :, :, :1].expand(-1, -1, -1, 64))) == 0


def test_free_prompts_are_read(tmp_path):
    file = tmp_path / "prompts.jsonl"
    two = {"thing": "cat", "color": "red", "place": None}
    lines = [
        {"prompt": "two red cats", "things": [two, two], "ground": None},
        {"prompt": "x", "things": [{"thing": "cat"}, {"thing": "dress"}]},
        {
            "prompt": "y",
            "things": [{"thing": "dog"}, {"thing": "cat", "place": "left"}],
            "ground": "blue",
        },
        {"prompt": "z", "things": [{"thing": "dog", "place": "above"}]},
    ]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert [meaning for _, meaning in evaluation.read_free_prompts(file)] == [
        Meaning((Group("cat", 2, "red"),)),
        Meaning((Group("cat"), Group("dress"))),
        Meaning((Group("dog"), Group("cat")), "right", "blue"),
        Meaning((Group("dog"),), "above"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: "),
        ("[]", "line 1: "),
        ('{"prompt": "a"}', "line 1: 'things'"),
        ('{"prompt": "a", "things": []}', "0 kinds of things"),
        ('{"prompt": "a", "things": [{"thing": "wug"}]}', "thing is 'wug'"),
        ('{"prompt": "a", "things": [{"thing": 3}]}', "thing is 3"),
        (
            '{"prompt": "a", "things": [{"thing": "cat", "color": "mauve"}]}',
            "color is 'mauve'",
        ),
        (
            '{"prompt": "a", "things": [{"thing": "cat", "place": "inside"}]}',
            "place is 'inside'",
        ),
        ('{"prompt": "a", "things": [{"thing": "cat"}], "ground": "x"}', "ground is"),
        ("", "holds no prompt"),
    ],
)
def test_free_prompts_that_cannot_be_are_named(tmp_path, line, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text(line)
    with pytest.raises(ValueError, match="prompts.jsonl") as error:
        evaluation.read_free_prompts(file)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:T5 reads 32 tokens")
def test_an_evaluation_measures_every_row(monkeypatch):
    import minidiff

    pipe = minidiff.load("tiny")
    pipe.progress = False
    options = {"num_inference_steps": 1, "guidance_scale": 2.0}
    found = evaluation.WorldEvaluation(pipe, Witness(SMALL), 3, batch=3, **options)
    monkeypatch.setattr(found, "reconstruction", lambda: {"all": 30.0})
    result = found.rows(("one garment", "all scenes"))
    assert result["rows"].keys() == {"one garment", "all scenes"}
    assert result["frechet"]["n"] == 3 and result["texture"].keys() == {"real", "model"}
    table = evaluation.format_world(result)
    assert "| one garment | " in table and "30.0 dB" in table
    free = {"prompts": found.free([("a cat", Meaning((Group("cat"),)))])}
    assert free["prompts"]["n"] == 1 and free["prompts"]["rows"][0]["prompt"] == "a cat"
    assert "1 prompts: right" in evaluation.format_world(free)


# Training


@pytest.mark.slow
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
    load_witness(output / "judge")
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
