"""Fashion-MNIST, garments as they are, and what ships of the world."""

import errno
import io

import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from minidiff.data.fashion_mnist import CLASSES, _read, fashion_mnist
from minidiff.data.garments import Garments, garment_captions
from minidiff.data.language import shown
from minidiff.data.reader import read
from minidiff.data.samples import sample_captions, sample_scenes
from minidiff.data.scenes import SHARES, World


@pytest.mark.slow
def test_fashion_mnist(fashion):
    images, labels = fashion_mnist("test", fashion)
    assert images.shape == (10_000, 28, 28) and images.dtype == torch.uint8
    assert labels.bincount().tolist() == [1000] * 10


def test_folder_without_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no test-00000-of-00001.parquet"):
        fashion_mnist("test", tmp_path)
    with pytest.raises(ValueError, match="split is 'val'"):
        fashion_mnist("val", tmp_path)


def test_a_file_of_other_data(tmp_path):
    file = tmp_path / "test-00000-of-00001.parquet"
    for columns in ({"a": [1]}, {"image": [1], "label": [1]}):
        parquet.write_table(pyarrow.table(columns), file)
        with pytest.raises(ValueError, match="00001.parquet is not of Fashion-MNIST"):
            fashion_mnist("test", tmp_path)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"00001.parquet.*not a parquet file"):
        fashion_mnist("test", tmp_path)


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
        fashion_mnist("test")


def test_a_full_disk_is_no_matter_of_the_network(downloads):
    downloads(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="No space left") as caught:
        fashion_mnist("test")
    assert not isinstance(caught.value, FileNotFoundError)


def test_digits_are_no_garments(tmp_path):
    """MNIST's files have the same names and columns."""
    stream = io.BytesIO()
    Image.new("L", (28, 28)).save(stream, "PNG")
    image = {"bytes": stream.getvalue(), "path": "a"}
    table = pyarrow.table({"image": [image] * 12, "label": [*range(10), 0, 0]})
    parquet.write_table(table, tmp_path / "test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="is not of Fashion-MNIST: its classes"):
        fashion_mnist("test", tmp_path)


@pytest.mark.slow
def test_a_linked_folder_is_looked_into(fashion, tmp_path):
    (tmp_path / "linked").symlink_to(fashion, target_is_directory=True)
    assert len(fashion_mnist("test", tmp_path)[1]) == 10_000


def test_only_what_is_picked_is_decoded(fashion):
    path = next(fashion.rglob("test-*.parquet"))
    lazy, _ = _read.__wrapped__(path)  # past its cache
    rows = torch.tensor([[3, 5], [5, 9999]])
    assert torch.equal(lazy[rows], fashion_mnist("test", fashion)[0][rows])
    assert lazy.known.nonzero().flatten().tolist() == [3, 5, 9999]


def test_plain_garments(fashion):
    batch = Garments("test", fashion).batch(torch.arange(200))
    images, (pictures, labels) = batch.images, fashion_mnist("test", fashion)
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
    name = CLASSES[batch.meanings[0]]
    assert batch.captions[0].endswith(name)
    assert {"a dress", "a photo of an ankle boot"} <= {*garment_captions()}


@pytest.mark.slow
def test_a_garment_has_two_captions_that_say_the_same(fashion):
    garments, indices = Garments("test", fashion), torch.arange(300)
    batch, pairs = garments.batch(indices), garments.caption_pairs(indices)
    assert torch.equal(pairs[:, 0], batch.caption_ids)
    texts = garments.all_captions()
    assert [texts[i] for i in pairs[:, 0].tolist()] == batch.captions
    for one, other in pairs.tolist():
        assert texts[one] != texts[other]
        assert one % len(CLASSES) == other % len(CLASSES)
    alone = garments.batch(indices[7:8])
    assert torch.equal(alone.images[0], batch.images[7])


def test_sample_scenes_need_no_data_set(downloads):
    downloads(OSError("no data set here"))
    images, texts = sample_scenes()
    assert images.shape == (16, 3, 64, 64) and len(texts) == 16
    assert texts[0] == "a red dress on a blue background"


def test_sample_scenes_are_scenes_of_the_world(fashion):
    images, texts = sample_scenes()
    world, numbers = World("test", fashion, layouts=(0.0, *SHARES[1:])), range(8, 16)
    again = world.batch(torch.tensor([*numbers]))
    assert (again.images - images[8:]).abs().max() < 0.005
    for text, meaning in zip(texts[8:], shown(again.attributes), strict=True):
        asked = {(g.kind, g.color or None) for g in read(text).groups}
        there = {(g.kind, c) for g in meaning.groups for c in (g.color or None, None)}
        assert asked <= there


def test_sample_captions_are_told_in_the_world_s_language():
    texts = sample_captions(50)
    assert texts == sample_captions(60)[:50] and len({*texts}) > 45
    assert texts != sample_captions(50, seed=2)
    assert all(read(text).groups for text in texts)
