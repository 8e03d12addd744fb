"""Own pictures with captions train every stage."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from training_jobs import train

import minidiff
from minidiff.data import captioned
from minidiff.files.pictures import from_bytes
from minidiff.tokenizer import T5Tokenizer

pytestmark = pytest.mark.slow


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


@pytest.mark.usefixtures("short_grids")
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
    torch.testing.assert_close(shown, from_bytes(images[where]))
    other = captioned.Pictures("test", folder, seed=1)
    assert set(other.numbers.tolist()) != set(held.numbers.tolist())
    squeezed = captioned.Pictures("train", folder, crop=False)
    assert not torch.equal(squeezed.images, seen.images)


def test_a_tenth_of_a_folder_is_held_out(tmp_path: Path) -> None:
    for i in range(100):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.PNG")
        (tmp_path / f"{i}.txt").write_text(f"number {i}")
    sizes = [len(captioned.Pictures(s, str(tmp_path))) for s in ("train", "test")]
    assert sizes == [90, 10]
