import errno
import io

import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from minidiff.data import garments as data
from minidiff.data.fashion_mnist import CLASSES
from minidiff.data.garments import COLORS, HELD_OUT, Scenes, prompts


def pairs(attributes: data.Attributes) -> list[list[tuple[str, str]]]:
    """Each scene's (colour, class) names."""
    rows = zip(attributes.colors.tolist(), attributes.garments.tolist(), strict=True)
    names = list(COLORS)
    return [
        [(names[c], CLASSES[g]) for c, g in zip(*row, strict=True) if g >= 0]
        for row in rows
    ]


@pytest.mark.slow
def test_fashion_mnist(fashion):
    images, labels = data.fashion_mnist("test", fashion)
    assert images.shape == (10_000, 28, 28) and images.dtype == torch.uint8
    assert labels.bincount().tolist() == [1000] * 10


def test_folder_without_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no test-00000-of-00001.parquet"):
        data.fashion_mnist("test", tmp_path)
    with pytest.raises(ValueError, match="split is 'val'"):
        data.fashion_mnist("val", tmp_path)


def test_a_file_of_other_data(tmp_path):
    file = tmp_path / "test-00000-of-00001.parquet"
    for columns in ({"a": [1]}, {"image": [1], "label": [1]}):
        parquet.write_table(pyarrow.table(columns), file)
        with pytest.raises(ValueError, match="00001.parquet is not of Fashion-MNIST"):
            data.fashion_mnist("test", tmp_path)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"00001.parquet.*not a parquet file"):
        data.fashion_mnist("test", tmp_path)


@pytest.fixture
def downloads(monkeypatch):
    """Let the hub's download fail with the given error."""

    def let_fail(error):
        def fail(*_, **__):
            raise error

        monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)

    monkeypatch.delenv("MINIDIFF_DATA", raising=False)
    return let_fail


@pytest.mark.parametrize("error", [OSError("no route"), RuntimeError("CAS service")])
def test_no_network_names_both_ways(downloads, error):
    downloads(error)
    with pytest.raises(FileNotFoundError, match="network.*or let MINIDIFF_DATA name"):
        data.fashion_mnist("test")


def test_a_full_disk_is_no_matter_of_the_network(downloads):
    downloads(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="No space left") as caught:
        data.fashion_mnist("test")
    assert not isinstance(caught.value, FileNotFoundError)


def test_digits_are_no_garments(tmp_path):
    """MNIST's files have the same names and columns."""
    stream = io.BytesIO()
    Image.new("L", (28, 28)).save(stream, "PNG")
    image = {"bytes": stream.getvalue(), "path": "a"}
    table = pyarrow.table({"image": [image] * 12, "label": [*range(10), 0, 0]})
    parquet.write_table(table, tmp_path / "test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="is not of Fashion-MNIST: its classes"):
        data.fashion_mnist("test", tmp_path)


@pytest.mark.slow
def test_a_linked_folder_is_looked_into(fashion, tmp_path):
    (tmp_path / "linked").symlink_to(fashion, target_is_directory=True)
    assert len(data.fashion_mnist("test", tmp_path)[1]) == 10_000


def test_a_scene_depends_on_nothing_but_seed_and_index(fashion):
    scenes = Scenes("test", fashion, seed=3)
    indices = torch.tensor([7, 0, 123456789, 7])
    batch = scenes.batch(indices)
    assert batch.images.shape == (4, 3, 64, 64) and batch.masks.shape == (4, 2, 64, 64)
    for row, index in enumerate(indices):
        alone = scenes.batch(index[None])
        assert torch.allclose(alone.images[0], batch.images[row], atol=1e-5)
        assert alone.captions == [batch.captions[row]]
    other = Scenes("test", fashion, seed=4).batch(indices)
    assert not torch.equal(other.images, batch.images)


@pytest.mark.slow
def test_pictures_show_what_the_attributes_say(fashion):
    batch = Scenes("test", fashion).batch(torch.arange(400))
    images, masks = batch.images, batch.masks
    assert images.min() >= -1 and images.max() <= 1
    grounds = torch.tensor(list(data.BACKGROUNDS.values())) / 127.5 - 1
    ground = grounds[batch.attributes.background][..., None, None].expand_as(images)
    empty = (masks.amax(1) == 0)[:, None].expand_as(images)
    assert torch.allclose(images[empty], ground[empty], atol=1e-5)
    rows, columns = masks.sum(3), masks.sum(2)  # 2 × (B, 2, 64)
    axis = torch.arange(64) + 0.5
    x, y = ((m * axis).sum(-1) / m.sum(-1) for m in (columns, rows))
    layout = batch.attributes.layout
    assert (x[layout == 1] < 32).float().mean(0).tolist() == [1, 0]
    assert (y[layout == 2] < 32).float().mean(0).tolist() == [1, 0]
    assert (masks[layout == 0, 1] == 0).all()
    tints = torch.tensor(list(COLORS.values())) / 255
    brightest = ((images + 1) / 2 * (masks[:, :1] > 0.99)).amax((2, 3))
    found = brightest / brightest.amax(1, keepdim=True)
    expected = tints[batch.attributes.colors[:, 0]]
    expected = expected / expected.amax(1, keepdim=True)
    single = layout == 0
    assert (found - expected)[single].abs().mean() < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one", "two"])
def test_held_out_pairs(kind):
    _, seen = prompts(5000, kind, held_out=False)
    assert not any(pair in HELD_OUT for row in pairs(seen) for pair in row)
    _, unseen = prompts(5000, kind, held_out=True)
    held = [[pair for pair in row if pair in HELD_OUT] for row in pairs(unseen)]
    assert {len(row) for row in held} == {1}
    assert {pair for row in held for pair in row} == set(HELD_OUT)


def test_any_pair():
    u = data.uniform(0, torch.arange(20_000), 16)
    attributes, _ = data.draw_garments(u, 0.0, None)
    pair = attributes.colors[:, 0] * 10 + attributes.garments[:, 0]
    assert pair.bincount(minlength=80).min() > 150  # of 250 on average


@pytest.mark.parametrize("kind", ["one", "two"])
def test_draws_cover_the_grammar_evenly(kind):
    texts, attributes = prompts(20_000, kind)
    for number, size in ((attributes.garments[:, 0], 10), (attributes.colors[:, 0], 8)):
        shares = number.bincount(minlength=size) / len(number)
        assert (shares - 1 / size).abs().max() < 0.01
    assert (attributes.background.bincount(minlength=8) / 20_000).min() > 0.1
    shared = (attributes.colors == attributes.background[:, None]) & (
        attributes.colors < 6
    )
    assert not shared.any(), "a garment has its background's colour"
    assert len(set(texts)) > (1500 if kind == "one" else 15_000)


def test_captions():
    attributes = data.Attributes(
        *map(torch.tensor, ([0, 1, 2], [[3, -1], [3, 8], [9, 0]])),
        *map(torch.tensor, ([[0, -1], [0, 6], [6, 2]], [2, 5, 7])),
    )
    found = [data.scene_captions(attributes, torch.full((3,), t)) for t in range(4)]
    one, beside, stacked = zip(*found, strict=True)
    assert one == (
        "a red dress on a blue background",
        "a photo of a red dress on a blue background",
        "red dress with a blue background",
        "a picture of a red dress against a blue background",
    )
    assert beside == (
        "a red dress left of an orange bag on a white background",
        "an orange bag right of a red dress on a white background",
        "a photo of a red dress left of an orange bag on a white background",
        "red dress left and orange bag right on a white background",
    )
    assert stacked[:2] == (
        "an orange ankle boot above a blue t-shirt on a black background",
        "a blue t-shirt below an orange ankle boot on a black background",
    )


@pytest.mark.slow
def test_caption_ids_number_the_grammar():
    texts = data.all_captions()
    assert len(texts) == data.NUM_CAPTIONS == len(set(texts))
    ids = torch.arange(0, data.NUM_CAPTIONS, 37)
    assert torch.equal(data.caption_ids(*data.caption_attributes(ids)), ids)


class Spaces:
    """A tokenizer of words."""

    model_max_length, pad_token_id = 20, 0

    def encode(self, text: str) -> list[int]:
        return [1, *(sum(map(ord, w)) for w in text.split()), 2]

    def __call__(self, texts: list[str]) -> torch.Tensor:
        rows = [self.encode(t) for t in texts]
        return torch.tensor([r + [0] * (20 - len(r)) for r in rows])


@pytest.fixture
def every_hundredth(monkeypatch):
    texts = data.all_captions()[::100]
    monkeypatch.setattr(data, "all_captions", lambda: texts)
    return texts


def test_token_table(every_hundredth):
    table = data.token_table(Spaces(), data.all_captions())
    assert torch.equal(table.long(), Spaces()(every_hundredth))


def test_token_table_notices_a_tokenizer_that_looks_across_words(every_hundredth):
    class Length(Spaces):
        def encode(self, text: str) -> list[int]:
            return [1, *([len(text)] * len(text.split())), 2]

    with pytest.raises(ValueError, match="word by word"):
        data.token_table(Length(), data.all_captions())


@pytest.mark.slow
@pytest.mark.parametrize("kind", data.SCENES.values())
def test_a_scene_has_two_captions_that_say_the_same(fashion, kind):
    scenes, indices = kind("test", fashion), torch.arange(300)
    batch, pairs = scenes.batch(indices), scenes.caption_pairs(indices)
    assert torch.equal(pairs[:, 0], batch.caption_ids)
    texts = scenes.all_captions()
    meaning = dict(
        zip(batch.caption_ids.tolist(), batch.meanings.tolist(), strict=True)
    )
    for one, other in pairs.tolist():
        assert texts[one] != texts[other]
        assert meaning.get(other, meaning[one]) == meaning[one]
    assert [texts[i] for i in pairs[:, 0].tolist()] == batch.captions


def test_plain_garments(fashion):
    batch = data.Garments("test", fashion).batch(torch.arange(200))
    images, (pictures, labels) = batch.images, data.fashion_mnist("test", fashion)
    assert images.shape == (200, 3, 64, 64) and set(batch.meanings.tolist()) == {
        *range(10)
    }
    assert torch.equal(images[:, 0], images[:, 1]) and images.amax() == 1
    edge = images.clone()
    edge[:, :, 4:-4, 4:-4] = -1
    assert (edge == -1).all()
    small = torch.nn.functional.avg_pool2d((images[0, :1, 4:-4, 4:-4] + 1) / 2, 2)
    own = pictures[labels == batch.meanings[0]].float()
    own = own / own.amax((1, 2), keepdim=True)
    assert (own - small).abs().mean((1, 2)).min() < 0.03
    name = data.CLASSES[batch.meanings[0]]
    assert batch.captions[0].endswith(name)
    assert {"a dress", "a photo of an ankle boot"} <= {*data.garment_captions()}


def test_sample_scenes_need_no_data_set(downloads):
    downloads(OSError("no data set here"))
    images, texts = data.sample_scenes()
    assert images.shape == (16, 3, 64, 64) and len(texts) == 16
    assert texts[0] == "a red dress on a blue background"


def test_sample_scenes_are_scenes_of_the_data_set(fashion):
    images, texts = data.sample_scenes()
    again = Scenes("test", fashion, two_garments=1).batch(torch.arange(8, 16))
    assert again.captions == texts[8:]
    assert (again.images - images[8:]).abs().max() < 0.005
