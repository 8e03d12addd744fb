"""Fine-tuning on a folder of captioned pictures; LoRA files that diffusers loads."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import relative_error
from PIL import EpsImagePlugin, Image
from pipelines import load_tokenizers, reference_pipeline, save_tokenizers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import minidiff
from minidiff.cli import train as command
from minidiff.data import captioned
from minidiff.data.captioned import captions_of, read_folder
from minidiff.data.fashion_mnist import CLASSES
from minidiff.data.language import captions
from minidiff.data.samples import ONE
from minidiff.data.scenes import World
from minidiff.efficiency import Float8Linear, weigh
from minidiff.engine import memory
from minidiff.engine.adapters import load_lora
from minidiff.files.pictures import from_bytes
from minidiff.learning import steps
from minidiff.learning.run import read_log
from minidiff.lora import ATTENTION, adapted_layers
from minidiff.recipes import finetune, turbo
from minidiff.recipes.features import Features, validation
from minidiff.recipes.finetune import (
    FinetuneOptions,
    LoraConfig,
    finetune_pictures,
    lora_config,
    split_pictures,
)
from minidiff.recipes.own_pictures import (
    PictureConfig,
    Sizes,
    bucket_sizes,
    mixed_batches,
    nearest_bucket,
    read_sets,
)
from minidiff.sampling import Pipeline
from minidiff.training import Task, TrainingConfig


def test_captions_beside_pictures_and_in_one_file(pictures: Path) -> None:
    images, captions = read_folder(pictures, 8)
    assert images.shape == (4, 3, 8, 8)
    red = captions.index("a red background")
    assert images[red, :, 4, 4].tolist() == [255, 0, 0]
    line = {"file_name": "red.png", "text": "from one file"}
    (pictures / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    assert captions_of(pictures)["red.png"] == "from one file"


def test_phones_pictures_stand_upright(tmp_path: Path) -> None:
    picture = Image.new("RGB", (16, 16), "red")
    picture.paste("blue", (8, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side: left is to be above
    picture.save(tmp_path / "a.jpg", exif=exif, quality=95)
    (tmp_path / "a.txt").write_text("halves")
    image = read_folder(tmp_path, 16)[0][0].float()
    assert image[0, :4].mean() > 240 and image[2, -4:].mean() > 240


def test_files_of_no_known_kind_are_named(
    pictures: Path, capsys: pytest.CaptureFixture
) -> None:
    (pictures / "cats").mkdir()
    shutil.copy(pictures / "red.png", pictures / "cats")
    read_folder(pictures, 8)
    assert "cats is left out: no caption names its pictures" in capsys.readouterr().err
    line = json.dumps({"file_name": "cats/red.png", "text": "a cat"})
    (pictures / "metadata.jsonl").write_text(line)
    assert len(read_folder(pictures, 8)[1]) == 5 and not capsys.readouterr().err
    (pictures / "green.png").rename(pictures / "green.heic")
    with pytest.raises(ValueError, match="green.png has no picture .found green.heic"):
        captions_of(pictures)


def test_any_case_and_no_hidden_files(pictures: Path) -> None:
    (pictures / "red.txt").rename(pictures / "red.TXT")
    (pictures / "._red.txt").write_bytes(b"\xff")
    (pictures / "._red.png").write_bytes(b"not a picture")
    assert captions_of(pictures)["red.png"] == "a red background"
    assert len(captions_of(pictures)) == 4


def test_names_and_texts_of_a_list(pictures: Path) -> None:
    line = {"file_name": "./red.png", "text": "from one file"}
    (pictures / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    assert captions_of(pictures)["red.png"] == "from one file"
    line["text"] = "half of \ud800 a pair"
    (pictures / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match="metadata.jsonl, line 1"):
        captions_of(pictures)
    for name in ("../red.png", "a/../../red.png", "/red.png"):
        line = {"file_name": name, "text": "not here"}
        (pictures / "metadata.jsonl").write_text(json.dumps(line) + "\n")
        with pytest.raises(ValueError, match="expected a file in this folder or below"):
            captions_of(pictures)


def test_only_pictures_are_opened(
    pictures: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostScript would start another program; the range of fractions is not known."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", None)
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"
    (pictures / "red.png").write_bytes(script)
    Image.new("F", (8, 8), 2).save(pictures / "green.tif")
    (pictures / "green.png").unlink()
    assert len(read_folder(pictures, 8)[1]) == 2
    err = capsys.readouterr().err
    assert "red.png is not a picture that can be read: cannot identify" in err
    assert "green.tif holds values of 32 bits from 2 to 2; expected 8 or 16" in err


def test_crop_takes_the_middle_and_resize_all(tmp_path: Path) -> None:
    picture = Image.new("RGB", (30, 10), "black")
    picture.paste(Image.new("RGB", (10, 10), "white"), (10, 0))
    picture.save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("stripes")
    assert read_folder(tmp_path, 8)[0].min() == 255
    assert read_folder(tmp_path, 8, crop=False)[0].min() == 0


def test_the_command_line_crops_unless_told(pictures, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(turbo, "finetune_pictures", seen.append)
    for how in ({}, {"crop": False}):
        call = {"data": pictures, "model": "tiny", "device": "cpu", **how}
        command.train(pictures / "out", **call)
    assert [options.how.crop for options in seen] == [True, False]


def test_what_is_wrong_with_a_folder_is_named(
    pictures: Path, capsys: pytest.CaptureFixture
) -> None:
    (pictures / "red.png").write_bytes(b"no picture")
    assert len(read_folder(pictures, 8)[1]) == 3
    assert "red.png is not a picture that can be read" in capsys.readouterr().err
    chunks = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\x01IHDR\0" + b"\0" * 8
    (pictures / "red.png").write_bytes(chunks)  # a header that ends too early
    assert len(read_folder(pictures, 8)[1]) == 3
    assert "red.png is not a picture that can be read" in capsys.readouterr().err
    (pictures / "ghost.txt").write_text("nothing")
    with pytest.raises(ValueError, match=r"the caption of ghost.png has no picture"):
        read_folder(pictures, 8)
    (pictures / "ghost.txt").unlink()
    (pictures / "green.txt").unlink()
    assert len(read_folder(pictures, 8)[1]) == 2
    assert "green.png is left out: it has no caption" in capsys.readouterr().err
    (pictures / "blue.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"blue.txt is not a text in UTF-8"):
        read_folder(pictures, 8)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        read_folder(pictures / "elsewhere", 8)


def test_damaged_exif_costs_one_picture(
    pictures: Path, capsys: pytest.CaptureFixture
) -> None:
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x02"  # turned, and a word for a white point
    exif += b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"
    exif += b"\x01\x3e\0\x02\0\0\0\x04abc\0" + bytes(4)
    Image.new("RGB", (20, 14)).save(pictures / "red.jpg", exif=exif)
    (pictures / "red.png").unlink()
    assert len(read_folder(pictures, 8)[1]) == 3
    assert "red.jpg is not a picture that can be read" in capsys.readouterr().err


def test_pictures_of_every_kind_look_as_they_should(tmp_path: Path) -> None:
    half = np.full((8, 8), 32768, np.uint16)
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    palette = Image.new("P", (8, 8))
    palette.putpalette([0, 255, 0])
    Image.fromarray(half).save(tmp_path / "half.png")
    clear.save(tmp_path / "clear.png")
    palette.save(tmp_path / "palette.png", transparency=0)
    palette.save(tmp_path / "green.gif")
    clear.convert("LA").save(tmp_path / "two.png")
    names = [path.name for path in tmp_path.iterdir() if path.name != "half.png"]
    lines = [json.dumps({"file_name": n, "text": n}) for n in names]
    lines.append(json.dumps({"file_name": "half.png", "text": "a\u2028b"}))
    text = "\n".join(lines).replace("\\u2028", "\u2028")  # legal within a string
    (tmp_path / "metadata.jsonl").write_text(text, "utf-8")
    images, captions = read_folder(tmp_path, 8)
    means = images.float().mean((2, 3)).tolist()
    shown = dict(zip(captions, means, strict=True))
    white, grey = [255] * 3, [pytest.approx(127.5, abs=1)] * 3
    assert shown.pop("green.gif") == [0, 255, 0] and shown.pop("a\u2028b") == grey
    assert list(shown.values()) == [white] * 3
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "half.png", "text": null}')
    with pytest.raises(ValueError, match="line 1: expected an object with file_name"):
        read_folder(tmp_path, 8)


BAD = {
    "--learning-rate is 0.0": {"learning_rate": 0.0},
    "--learning-rate is nan": {"learning_rate": float("nan")},
    "--rank is 0": {"lora": True, "rank": 0},
    "rank is 33; expected at most 32 in these": {"lora": True, "rank": 33},
    "--alpha is nan": {"lora": True, "alpha": float("nan")},
    "steps is 0; expected": {"steps": 0},
    "batch_size is 0; expected": {"batch_size": 0},
    "no layer is called foo": {"lora": True, "targets": "foo"},
    "--from has no stages, recipe": {"stage": "vae"},
    "model is 'nothing'": {"model": "nothing"},
    "is a file; expected a folder": {"output": "metadata.jsonl"},
}


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_fine_tuned(
    model: Path, pictures: Path, tmp_path: Path, message: str
) -> None:
    (tmp_path / "metadata.jsonl").write_text("kept")
    call = {"output": "out", "data": pictures, "model": str(model)}
    call |= {"device": "cpu", **BAD[message]}
    with pytest.raises(ValueError, match=message):
        command.train(tmp_path / call.pop("output"), **call)


@pytest.mark.slow
def test_a_run_goes_on_with_the_same_settings_and_pictures_only(
    model: Path, pictures: Path, tmp_path: Path
) -> None:
    def train(rank: int = 2, **changes) -> Path:
        config = replace(CONFIG, steps=2, **changes)
        return finetune.finetune(
            model, pictures, tmp_path / "a", config, LoraConfig(rank)
        )

    train()
    assert len([*(tmp_path / "a" / "cache").iterdir()]) == 1
    with pytest.raises(ValueError, match="lora = LoraConfig.rank=2.*, not LoraConfig"):
        train(rank=3)
    with pytest.raises(ValueError, match="learning_rate = 0.01, not 0.1"):
        train(learning_rate=0.1)
    (pictures / "red.txt").write_text("another caption")
    with pytest.raises(ValueError, match="encodings = "):
        train()


def test_a_card_too_small_to_learn_on_is_told(
    model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the folder belongs to the run; by LoRA a fifth of the weights is kept."""
    n = weigh(minidiff.load(model).transformer)
    for free, lora in ((20 * n - 1, None), (2 * n - 1, LoraConfig(2))):
        monkeypatch.setattr(finetune, "free_memory", lambda *_, free=free: free)
        with pytest.raises(
            ValueError, match="weights and optimiser take .*; expected "
        ):
            config = replace(CONFIG, bfloat16=True)
            finetune.finetune(model, pictures, tmp_path / "a", config, lora, "cuda")
        assert not (tmp_path / "a" / "run").exists()


def test_sharded_fine_tuning_is_refused(pictures: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, sharded=True)
    with pytest.raises(ValueError, match="sharded is True; fine-tuning expects False"):
        finetune.finetune("tiny", pictures, tmp_path / "a", config)
    assert not (tmp_path / "a").exists()


STREAMED = {"t5": "streamed", "clip": "streamed"}  # as on a card


@pytest.mark.slow
@pytest.mark.parametrize("how", [{}, STREAMED], ids=["resident", "streamed"])
def test_encodings_are_named_after_all_that_makes_them(model: Path, how: dict) -> None:
    plain, pipe = minidiff.load(model), minidiff.load(model, **how)
    images = torch.zeros(1, 3, 8, 8)
    names = {finetune.encoding_name(plain, images, ["a"])}
    assert finetune.encoding_name(pipe, images, ["a"]) in names
    names.add(finetune.encoding_name(pipe, images, ["b"]))
    names.add(finetune.encoding_name(pipe, images + 1, ["a"]))
    for part in (pipe.vae, *pipe.text_encoders):
        stored = [x for m in part.modules() for x in getattr(m, "stored", ())]
        last = [*part.parameters(), *(x for x in stored if x is not None)][-1]
        last.data = last.data.clone()  # it may be a read-only memory map
        last.data.view(-1)[-1] += 1
        names.add(finetune.encoding_name(pipe, images, ["a"]))
    assert len(names) == 7


@pytest.mark.slow
def test_recomputed_blocks_give_the_same_lora(
    model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, recompute = [], steps.recompute
    monkeypatch.setattr(
        steps, "recompute", lambda blocks: asked.append(recompute(blocks))
    )
    config = replace(CONFIG, steps=3)
    files = [
        finetune.finetune(
            model, pictures, tmp_path / str(r), config, LoraConfig(2), recompute=r
        )
        for r in (False, True)
    ]
    a, b = (load_file(file) for file in files)
    assert all(torch.equal(a[k], b[k]) for k in a) and len(asked) == 1


@pytest.mark.slow
def test_validation_leaves_alone_what_learns(
    model: Path, pictures: Path, tmp_path: Path
) -> None:
    files = [
        finetune.finetune(
            model,
            pictures,
            tmp_path / str(every),
            replace(CONFIG, steps=3, validate_every=every),
            LoraConfig(2),
        )
        for every in (0, 2)
    ]
    a, b = (load_file(file) for file in files)
    assert all(torch.equal(a[k], b[k]) for k in a)
    log = read_log(tmp_path / "2" / "run" / "log.jsonl")
    assert [r["step"] for r in log if "validation" in r] == [2, 3]
    grids = sorted((tmp_path / "2" / "grids").iterdir())
    assert [path.name for path in grids] == ["000002.png", "000003.png"]
    first, second = (np.asarray(Image.open(path)) for path in grids)
    assert first.shape[1] == 4 * first.shape[0]
    assert (first != second).any()  # each is drawn with the weights of its step


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A random pipeline of diffusers in the hub's layout."""
    folder = tmp_path / "model"
    save_tokenizers(folder)
    reference_pipeline(load_tokenizers(folder)).save_pretrained(folder)
    return folder


CONFIG = TrainingConfig(12, 4, 1e-2, warmup_steps=2, ema_decay=0.5, save_every=5)


def gain(model: Path, pictures: Path, change) -> float:
    """The loss after ``change`` of the pipeline, relative to before."""
    pipe = minidiff.load(model)
    features = encoded(pipe, pictures)
    before = mean_loss(pipe, features)
    return mean_loss(change(pipe), features) / before


def with_lora(pipe: Pipeline, file: Path) -> Pipeline:
    load_lora(pipe, file)
    return pipe


def encoded(pipe: Pipeline, pictures: Path) -> Features:
    side = pipe.transformer.config.sample_size * pipe.vae.config.factor
    return finetune.encode_pictures(pipe, *read_folder(pictures, side))


def mean_loss(pipe: Pipeline, features: Features, at_once: int = 32) -> float:
    fixed = features.fixed(0)
    return validation(pipe.transformer, fixed, "cpu", at_once)["validation"]


@pytest.mark.slow
def test_lora_learns_and_diffusers_loads_it(
    model: Path, pictures: Path, tmp_path: Path
) -> None:
    output = tmp_path / "lora"
    file = finetune.finetune(model, pictures, output, CONFIG, LoraConfig(rank=4))

    assert gain(model, pictures, lambda pipe: with_lora(pipe, file)) < 0.98
    from diffusers import StableDiffusion3Pipeline

    theirs = StableDiffusion3Pipeline.from_pretrained(model)
    theirs.load_lora_weights(str(output))
    ours = with_lora(minidiff.load(model), file)
    c = ours.transformer.config
    x = torch.randn(2, c.in_channels, c.sample_size, c.sample_size)
    context, pooled = ours.encode_prompt(["a red dress", "a blue bag"])
    sigma = torch.tensor([0.3, 0.8])
    with torch.no_grad():
        a = ours.transformer(x, sigma, context, pooled)
        b = theirs.transformer(x, context, pooled, 1000 * sigma).sample
    assert relative_error(a, b) <= 1e-5


@pytest.mark.slow
def test_a_whole_model_learns(model: Path, pictures: Path, tmp_path: Path) -> None:
    folder = finetune.finetune(model, pictures, tmp_path / "full", CONFIG)
    assert gain(model, pictures, lambda _: minidiff.load(folder)) < 0.95


@pytest.mark.slow
def test_lora_learns_beside_weights_in_bfloat16(
    model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The corrections are float32, and so is what they learn from."""
    seen = []

    def watch(task: Task, *rest: object) -> nn.Module:
        known = {"base": pipes[0].dtype, "x0": task.batch(torch.arange(2))["x0"].dtype}
        seen.append(known | {"learned": next(task.model.parameters()).dtype})
        return fit(task, *rest)

    pipes, fit, load = [], finetune.fit, finetune.load
    monkeypatch.setattr(finetune, "fit", watch)
    monkeypatch.setattr(
        finetune, "load", lambda *how: pipes.append(load(*how)) or pipes[-1]
    )
    config = replace(CONFIG, bfloat16=True, validate_every=6)
    file = finetune.finetune(model, pictures, tmp_path / "a", config, LoraConfig(4))
    dtypes = {"base": torch.bfloat16, "x0": torch.float32, "learned": torch.float32}
    assert seen == [dtypes]
    assert len([*(tmp_path / "a" / "grids").iterdir()]) == 2

    assert gain(model, pictures, lambda pipe: with_lora(pipe, file)) < 0.98


@pytest.mark.slow
@pytest.mark.parametrize("error", [ValueError, RuntimeError])
def test_a_grid_that_does_not_fit_is_told_and_the_run_goes_on(
    model: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    error: type,
) -> None:
    """Of a size that is refused, or of the CPU's memory."""

    def full(*_: object, **__: object) -> None:
        raise error("no room: can't allocate memory")

    monkeypatch.setattr(memory.Plan, "check_room", full)
    config = replace(CONFIG, steps=4, validate_every=2)
    file = finetune.finetune(model, pictures, tmp_path / "out", config, LoraConfig(2))
    assert file.exists() and not (tmp_path / "out" / "grids").exists()
    assert "000002.png is not drawn: no room" in capsys.readouterr().err


def test_validation_in_parts_is_the_same(model: Path, pictures: Path) -> None:
    pipe = minidiff.load(model)
    features = encoded(pipe, pictures)
    whole, parts = (mean_loss(pipe, features, at_once=n) for n in (32, 3))
    assert whole == pytest.approx(parts, rel=1e-5)


@pytest.mark.slow
def test_streamed_encoders_learn_the_same_and_are_saved_whole(
    model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident = finetune.finetune(model, pictures, tmp_path / "a", CONFIG)
    how = [{}, STREAMED]  # the last load is the one that is saved
    monkeypatch.setattr(
        finetune, "load", lambda *given: minidiff.load(*given, **how.pop())
    )
    streamed = finetune.finetune(model, pictures, tmp_path / "b", CONFIG)
    files = [path.relative_to(resident) for path in resident.rglob("*.safetensors")]
    assert len(files) == 5
    for name in files:
        a, b = load_file(resident / name), load_file(streamed / name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_a_stopped_fine_tuning_goes_on(
    model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = finetune.finetune(model, pictures, tmp_path / "a", CONFIG, LoraConfig(2))
    fit = finetune.fit
    monkeypatch.setattr(finetune, "fit", lambda *a: fit(*a, deadline=1.0))
    for _ in range(3):
        with pytest.raises(TimeoutError):
            finetune.finetune(model, pictures, tmp_path / "b", CONFIG, LoraConfig(2))
    monkeypatch.setattr(finetune, "fit", fit)
    again = finetune.finetune(model, pictures, tmp_path / "b", CONFIG, LoraConfig(2))
    a, b = load_file(whole), load_file(again)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# A new style: garments in stripes, between which the background shows

STRIPED = 0.2  # what the judge calls striped has more


def stripes(images: Tensor) -> Tensor:
    """The judge: how much of each picture's change from row to row has the period of
    the stripes, eight pixels, (B,) in [0, 1]."""
    power = torch.fft.rfft(images, dim=-2).abs().square().sum((1, 3))  # → (B, 33)
    return power[:, 7:10].sum(1) / power[:, 1:].sum(1)


def tall_garments(split: str, folder: Path, n: int) -> tuple[Tensor, Tensor, list[str]]:
    """Scenes with one garment that is no shoe and no bag: plain, striped, captions."""
    world = World(split, folder, layouts=ONE, garments=1.0)
    batch, numbers = world.batch(torch.arange(3 * n)), torch.arange(3 * n)
    flat = torch.tensor([CLASSES.index(c) for c in CLASSES[5:] if c != "shirt"])
    tall = ~torch.isin(batch.attributes.kinds[:, 0], flat)
    images, masks = batch.images[tall][:n], batch.masks[tall][:n, :1]
    gaps = (torch.arange(64) // 4 % 2)[:, None]
    striped = images + masks * gaps * (images[:, :, :1, :1] - images)
    texts, _ = captions(batch.attributes, 0, numbers)
    return images, striped, [texts[i] for i in tall.nonzero()[:n]]


@pytest.mark.slow
def test_a_lora_learns_a_style_from_twenty_pictures(
    fashion: Path, tmp_path: Path
) -> None:
    plain, striped, _ = tall_garments("test", fashion, 100)
    assert (stripes(plain) > STRIPED).float().mean() < 0.01
    assert (stripes(striped) > STRIPED).float().mean() > 0.99
    _, striped, captions = tall_garments("train", fashion, 20)
    data = tmp_path / "pictures"
    data.mkdir()
    for i, (image, caption) in enumerate(zip(striped, captions, strict=True)):
        pixels = ((image + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0)
        Image.fromarray(np.asarray(pixels)).save(data / f"{i}.png")
        (data / f"{i}.txt").write_text(f"striped, {caption}")
    output, layers = (
        tmp_path / "lora",
        ",".join([*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_out"]),
    )
    command.train(
        output,
        data=data,
        model="tiny",
        lora=True,
        targets=layers,
        steps=70,
        batch_size=4,
        learning_rate=6e-3,
        device="cpu",
    )
    base, tuned = draw_striped(None), draw_striped(output)
    assert tuned >= base + 0.5, (base, tuned)


def draw_striped(lora: Path | None) -> float:
    """The share of striped pictures among twelve of the same prompts and noise."""
    pipe = minidiff.load("tiny")
    pipe.progress = False
    if lora:
        load_lora(pipe, lora)
    garments = ("red dress", "yellow coat", "white shirt", "orange pullover")
    prompts = [
        f"striped, a {garment} on a {ground} background"
        for garment in garments
        for ground in ("blue", "green", "purple")
    ]
    with torch.no_grad():
        images = pipe(prompts, num_inference_steps=10, output_type="pt", seed=0)
    return (stripes(2 * images - 1) > STRIPED).float().mean().item()


@pytest.mark.slow
def test_what_a_batch_holds(model: Path, pictures: Path) -> None:
    pipe = minidiff.load(model)
    images, captions = read_folder(pictures, 32)
    features = finetune.encode_pictures(pipe, images, captions)
    with torch.no_grad():
        mode = pipe.vae.encode(from_bytes(images)).mode()
        expected = pipe.vae.decode(mode) / 2 + 0.5
        context, pooled = pipe.encode_prompt(["", *captions])
    assert relative_error(pipe.decode(features.latents), expected.clamp(0, 1)) < 1e-5
    rows = torch.cat([torch.zeros(1, dtype=torch.long), features.place])
    assert relative_error(features.context[rows], context) < 1e-5
    assert relative_error(features.pooled[rows], pooled) < 1e-5
    tuned = finetune.Tuned(pipe, pipe.transformer, None)
    task = finetune.finetuning_task(tuned, [features], CONFIG, lambda: None)
    batch = task.batch(torch.arange(4000))
    shift = pipe.scheduler.shift  # moves 1/2 to s/(s + 1)
    assert shift == 3
    assert batch["sigma"].median().item() == pytest.approx(0.75, abs=0.03)
    empty = (batch["pooled"] == features.pooled[0]).all(1)
    assert empty.double().mean().item() == pytest.approx(0.1, abs=0.02)


def latents_of(task: Task, numbers: Tensor, features: Features) -> list[int]:
    """Which pictures the samples of these ``numbers`` show."""
    x0 = task.batch(numbers)["x0"][:, None].flatten(2)
    return (x0 == features.latents.flatten(1)).all(2).long().argmax(1).tolist()


def test_pictures_are_shuffled_and_every_tenth_is_held_out(model: Path) -> None:
    pipe = minidiff.load(model)
    images = torch.arange(20).byte().reshape(20, 1, 1, 1).expand(-1, 3, 32, 32) * 12
    features = finetune.encode_pictures(
        pipe, images, [f"number {i}" for i in range(20)]
    )
    tuned = finetune.Tuned(pipe, pipe.transformer, None)
    task = finetune.finetuning_task(tuned, [features], CONFIG, lambda: None, drop=0.0)
    shown = latents_of(task, torch.arange(54), features)
    epochs = shown[:18], shown[18:36], shown[36:]
    learned = [i for i in range(20) if i not in (9, 19)]
    assert all(sorted(epoch) == learned for epoch in epochs)
    assert len({*map(tuple, epochs)}) == 3 and learned not in epochs
    steps = [{(b - a) % 18 for a, b in zip(e, e[1:], strict=False)} for e in epochs]
    assert all(len(kinds) > 6 for kinds in steps)  # no walk in even strides
    assert latents_of(task, torch.tensor([40, 7]), features) == [shown[40], shown[7]]
    other = finetune.finetuning_task(tuned, [features], CONFIG, lambda: None, 1, 0.0)
    assert latents_of(other, torch.arange(18), features) != shown[:18]
    held = features.select(slice(9, 20, 10))
    expected = mean_loss(pipe, held)
    found = task.validate(pipe.transformer)
    assert found["held_out"] == 2
    assert found["validation"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "sizes, held",
    [
        ([1], [0]),
        ([2], [1]),
        ([19], [1]),
        ([20], [2]),
        ([1000], [32]),
        ([1, 1, 1], [0, 0, 1]),
        ([2, 2, 2, 2, 2], [0, 0, 0, 0, 1]),
        ([9, 1, 15], [0, 0, 2]),
        ([12, 12], [1, 1]),
    ],
)
def test_how_many_pictures_are_held_out(sizes: list[int], held: list[int]) -> None:
    """Of all shapes together."""
    texts = torch.zeros(1, 1, 1)
    sets = [
        Features(torch.zeros(n, 1), torch.zeros(n).long(), texts, texts[0])
        for n in sizes
    ]
    learned, out = split_pictures(sets)
    assert [len(part) for part in out] == held
    assert [len(a) + len(b) for a, b in zip(learned, out, strict=True)] == sizes


@pytest.mark.slow
def test_the_average_and_alpha_are_exported(
    model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = finetune.fit

    def marked(*given) -> nn.Module:
        averaged = fit(*given)
        for parameter in averaged.parameters():
            parameter.data.fill_(7)
        return averaged

    monkeypatch.setattr(finetune, "fit", marked)
    config, lora = replace(CONFIG, steps=1), LoraConfig(2, alpha=6)
    file = finetune.finetune(model, pictures, tmp_path / "out", config, lora)
    assert all((x == 7).all() for x in load_file(file).values())
    with safe_open(file, "pt") as opened:
        notes = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert notes["transformer.lora_alpha"] == 6 and notes["transformer.r"] == 2


@pytest.mark.slow
def test_a_grid_is_what_the_pipeline_draws(
    model: Path, pictures: Path, tmp_path: Path
) -> None:
    pipe = minidiff.load(model)
    pipe.progress = False
    captions = read_folder(pictures, 32)[1]
    tuned = finetune.Tuned(pipe, pipe.transformer, None)
    finetune.Shown(tuned, captions, 5).save(tmp_path / "grid.png")
    pixels = np.array(Image.open(tmp_path / "grid.png"))
    shown = torch.tensor(pixels).permute(2, 0, 1) / 255
    for i, x in enumerate(pipe(captions, seed=5, output_type="pt")):
        assert (shown[..., 32 * i : 32 * i + 32] - x).abs().max() < 2 / 255


@pytest.mark.slow
def test_every_layer_that_is_named_learns_or_is_told(
    model: Path, pictures: Path
) -> None:
    out = pictures / "out"
    options = FinetuneOptions(str(model), pictures, out, 1, 1, 1e-3)
    updates = lora_config(2, None, "to_q,to_kk")
    with pytest.raises(ValueError, match="no layer is called to_kk"):
        finetune_pictures(replace(options, output=pictures / "bad", lora=updates))
    updates = lora_config(2, None, "to_q, to_k")
    file = finetune_pictures(replace(options, lora=updates))
    names = {key.split(".lora")[0].split(".")[-1] for key in load_file(file)}
    assert names == {"to_q", "to_k"}


@pytest.mark.slow
def test_a_run_goes_on_by_another_name_of_its_pictures(
    model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, steps=2)
    monkeypatch.chdir(pictures.parent)
    for given in ("pictures", pictures):
        finetune.finetune(model, given, tmp_path / "a", config, LoraConfig(2))


@pytest.mark.slow
def test_captions_are_read_once(
    model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, read_text = [], captioned.read_text
    monkeypatch.setattr(
        captioned, "read_text", lambda *how: read.append(how) or read_text(*how)
    )
    config = replace(CONFIG, steps=1)
    finetune.finetune(model, pictures, tmp_path / "out", config, LoraConfig(2))
    assert len(read) == 4


@pytest.mark.slow
def test_another_base_is_told(model: Path, pictures: Path, tmp_path: Path) -> None:
    """A LoRA belongs to the weights that it was learned on, not to their folder."""
    base, config = shutil.copytree(model, tmp_path / "base"), replace(CONFIG, steps=2)
    finetune.finetune(base, pictures, tmp_path / "out", config, LoraConfig(2))
    file = base / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["proj_out.bias"] += 1
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match="holds a run with began = "):
        finetune.finetune(base, pictures, tmp_path / "out", config, LoraConfig(2))


@pytest.mark.slow
def test_options_of_fine_tuning_arrive(
    model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, read, configs, fit = [], [], [], finetune.fit

    def reading(*given: object) -> list:
        read.append(given)
        return read_sets(*given)

    def learning(task: Task, config: TrainingConfig, *rest: object) -> nn.Module:
        configs.append(config)
        return fit(task, replace(config, compile=False), *rest)

    monkeypatch.setattr(steps, "recompute", asked.append)
    monkeypatch.setattr(finetune, "read_sets", reading)
    monkeypatch.setattr(finetune, "fit", learning)
    options = FinetuneOptions(str(model), pictures, tmp_path / "out", 1)
    how = {"compile": True, "recompute": True, "lora": LoraConfig(2)}
    finetune_pictures(replace(options, **how, how=PictureConfig(crop=False)))
    assert len(asked) == 1 and read[0][3].crop is False and configs[0].compile


# What practitioners ask for


@pytest.mark.parametrize(
    ("size", "expected"),
    [((100, 100), (64, 64)), ((300, 200), (80, 48)), ((1, 9), (40, 80))],
)
def test_a_bucket_has_about_the_pictures_shape(size: tuple, expected: tuple) -> None:
    sizes = bucket_sizes(64, 8, 80)
    assert all(w % 8 == h % 8 == 0 and w * h <= 64**2 for w, h in sizes)
    assert all(max(s) <= min(80, 2 * min(s)) for s in sizes)
    assert sizes[nearest_bucket(size, sizes)] == expected


def test_pictures_keep_their_shape_in_buckets(tmp_path: Path) -> None:
    for i, size in enumerate(((60, 30), (30, 60), (62, 31))):
        picture = Image.new("RGB", size, "black")
        picture.paste("white", (0, 0, size[0] // 2, size[1]))  # the left half
        picture.save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"number {i}")
    known, how = Sizes(32, 8, 64), PictureConfig(buckets=True, trigger="ink,")
    tall, wide = read_sets(tmp_path, captions_of(tmp_path), known, how)
    assert tall[0].shape == (1, 3, 40, 24) and wide[0].shape == (2, 3, 24, 40)
    assert wide[1] == ["ink, number 0", "ink, number 2"]
    for images in (tall[0], wide[0]):
        left, right = images.float().chunk(2, dim=-1)
        assert left.mean() > 240 and right.mean() < 15
    (square,) = read_sets(tmp_path, captions_of(tmp_path), known, PictureConfig())
    assert square[0].shape == (3, 3, 32, 32)


def test_a_folder_says_how_often_its_pictures_count(
    pictures: Path, capsys: pytest.CaptureFixture
) -> None:
    for name in ("10_new", "2024_old"):
        (pictures / name).mkdir()
        Image.new("RGB", (8, 8), "black").save(pictures / name / "a.PNG")
    (pictures / "10_new" / "a.txt").write_text("a black thing")
    shutil.copy(pictures / "red.png", pictures / "10_new")
    captions = captions_of(pictures)
    assert len(captions) == 5 and captions["10_new/a.PNG"] == "a black thing"
    (found,) = read_sets(pictures, captions, Sizes(8, 8, 8), PictureConfig())
    assert found.repeats[found.captions.index("a black thing")] == 10
    assert found.repeats.sum() == 14
    told = capsys.readouterr().err.splitlines()
    assert told[0].endswith("10_new/red.png is left out: it has no caption")
    assert told[1].endswith("2024_old is left out: no caption names its pictures")
    line = json.dumps({"file_name": "10_new/red.png", "text": "red"})
    (pictures / "metadata.jsonl").write_text(line)
    (found,) = read_sets(
        pictures, captions_of(pictures), Sizes(8, 8, 8), PictureConfig()
    )
    assert found.repeats[found.captions.index("red")] == 10
    (pictures / "10_new" / "b.txt").write_text("nothing")
    with pytest.raises(ValueError, match="10_new/b.png has no picture"):
        captions_of(pictures)


def test_pictures_that_count_more_are_shown_more() -> None:
    texts = torch.zeros(1, 1, 1), torch.zeros(1, 1)
    latents = torch.arange(4.0).reshape(4, 1, 1, 1)
    often = {"repeats": torch.tensor([1, 1, 5, 1])}
    small = Features(latents, torch.zeros(4).long(), *texts, **often)
    large = replace(small, latents=latents + 4, repeats=torch.tensor([8, 8, 8, 8]))
    (learned,), _ = split_pictures([small])  # the last one is held out
    batches = mixed_batches([learned, large], None, 1, seed=0, drop=0.0, shift=1.0)
    assert batches.shares == [7 / 39, 32 / 39]
    for epoch in torch.arange(21).split(7):
        shown = batches.parts[0](epoch)["x0"].flatten().tolist()
        assert sorted(shown) == [0, 1, 2, 2, 2, 2, 2]


def features(n: int, side: int, value: float) -> Features:
    texts = torch.zeros(2, 3, 4), torch.zeros(2, 4)
    latents = torch.full((n, 2, side, side), value)
    return Features(latents, torch.ones(n).long(), *texts)


@pytest.mark.slow
def test_every_step_has_one_shape_and_half_are_the_prior() -> None:
    sets = [features(30, 4, 1.0), features(10, 6, 2.0)]
    prior, shown = features(5, 4, 3.0), []
    batches = mixed_batches(sets, prior, 4, seed=0, drop=0.0, shift=1.0)
    for step in range(400):
        numbers = torch.arange(4 * step, 4 * step + 4)
        (value,) = batches(numbers)["x0"].unique().tolist()
        parts = [batches(part)["x0"].unique().tolist() for part in numbers.split(2)]
        assert parts == [[value], [value]]  # parts of a step, on other processes too
        shown.append(value)
    share = {value: shown.count(value) / 400 for value in (1.0, 2.0, 3.0)}
    assert share[3.0] == pytest.approx(0.5, abs=0.07)
    assert share[1.0] / share[2.0] == pytest.approx(3, rel=0.35)
    alone = mixed_batches(sets[:1], None, 4, seed=0, drop=0.0, shift=1.0)
    assert alone.shares == [1.0] and len(alone(torch.arange(4))["x0"]) == 4


def one_step(model: Path, pictures: Path, output: Path, **how: object) -> dict:
    """The tensors of a LoRA after a few steps."""
    lora, data = how.pop("lora", LoraConfig(2)), PictureConfig(**how)
    config = replace(CONFIG, steps=3, validate_every=3)
    return load_file(finetune.finetune(model, pictures, output, config, lora, how=data))


@pytest.mark.slow
def test_a_run_counts_and_goes_on_only_with_the_same_counts(
    model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pictures / "3_more").mkdir()
    for name in ("red", "green"):
        for file in pictures.glob(f"{name}.*"):
            file.rename(pictures / "3_more" / file.name)
    tasks, fit = [], finetune.fit
    monkeypatch.setattr(finetune, "fit", lambda *a: tasks.append(a[0]) or fit(*a))
    one_step(model, pictures, tmp_path / "out")
    learned = tasks[0].batch.parts[0].features  # the last picture is held out
    assert learned.pool().tolist() == [0, 1, 2, 2, 2]
    (pictures / "3_more").rename(pictures / "4_more")
    with pytest.raises(ValueError, match="holds a run with repeats"):
        one_step(model, pictures, tmp_path / "out")


@pytest.mark.slow
def test_a_prior_is_drawn_once_and_changes_what_is_learned(
    model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, draw = [], finetune.prior_latents
    monkeypatch.setattr(
        finetune, "prior_latents", lambda *a: drawn.append(a[1:3]) or draw(*a)
    )
    how = {"prior": "a red dress", "prior_pictures": 3}
    kept = one_step(model, pictures, tmp_path / "a", **how)
    again = one_step(model, pictures, tmp_path / "a", **how)
    plain = one_step(model, pictures, tmp_path / "b")
    assert drawn == [("a red dress", 3)]
    assert all(torch.equal(kept[k], again[k]) for k in kept)
    assert not all(torch.equal(kept[k], plain[k]) for k in kept)


@pytest.mark.slow
def test_prompts_are_drawn_at_their_seeds(
    model: Path, pictures: Path, tmp_path: Path
) -> None:
    how = {"prompts": ("a red dress", "a blue bag")}
    one_step(model, pictures, tmp_path / "a", **how)
    with Image.open(tmp_path / "a" / "grids" / "000003.png") as sheet:
        assert sheet.width == 2 * sheet.height


@pytest.mark.slow
def test_corrections_learn_beside_8_bits(
    model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned, begin = [], finetune.begin_tuning
    monkeypatch.setattr(
        finetune, "begin_tuning", lambda *a: tuned.append(begin(*a)) or tuned[-1]
    )
    made = one_step(model, pictures, tmp_path / "a", lora=LoraConfig(2, fp8=True))
    layers = adapted_layers(tuned[0].pipe.transformer)
    kinds = {type(layer.layer) for _, layer in layers}
    assert kinds == {Float8Linear}
    learned = [bool(x.any()) for name, x in made.items() if "lora_B" in name]
    assert sum(learned) >= len(learned) - 2  # the last block's text asks nothing


@pytest.mark.slow
def test_both_clips_learn_and_diffusers_loads_them(
    model: Path, pictures: Path, tmp_path: Path
) -> None:
    lora = LoraConfig(2, encoders=True)
    made = one_step(model, pictures, tmp_path / "a", lora=lora)
    parts = {name.split(".")[0] for name in made}
    assert parts == {"transformer", "text_encoder", "text_encoder_2"}
    for part in parts:
        own = [x for n, x in made.items() if n.startswith(f"{part}.") and "_B" in n]
        assert sum(bool(x.any()) for x in own) > len(own) / 2, part
    from diffusers import StableDiffusion3Pipeline

    theirs = StableDiffusion3Pipeline.from_pretrained(model)
    theirs.load_lora_weights(str(tmp_path / "a"))
    bare = minidiff.load(model)
    ours = with_lora(minidiff.load(model), tmp_path / "a")
    with torch.no_grad():
        context, pooled = ours.encode_prompt("a red dress")
        reference = theirs.encode_prompt(
            "a red dress", None, None, max_sequence_length=ours.max_sequence_length
        )
    assert relative_error(pooled, reference[2]) <= 1e-5
    assert relative_error(context, reference[0]) <= 1e-5
    assert relative_error(pooled, bare.encode_prompt("a red dress")[1]) > 1e-5


def test_what_is_reencoded_is_what_was_encoded(model: Path, pictures: Path) -> None:
    pipe = minidiff.load(model)
    images, captions = read_folder(pictures, 32)
    made = finetune.encode_pictures(pipe, images, captions, ids=True)
    batch = made.fixed(0)
    with torch.no_grad():
        again = finetune.reencoded(pipe, batch | {"pooled": torch.empty(0)})
    assert relative_error(again["context"], batch["context"]) < 1e-6
    assert relative_error(again["pooled"], batch["pooled"]) < 1e-6


def test_words_that_say_nothing_are_refused() -> None:
    bad = {"--trigger is empty": {"trigger": "  "}, "--prompt is": {"prompts": (" ",)}}
    bad |= {"--prior is empty": {"prior": " "}, "--prior-pict": {"prior_pictures": 0}}
    for message, how in bad.items():
        with pytest.raises(ValueError, match=message):
            PictureConfig(**how)
