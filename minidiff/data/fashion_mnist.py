"""Fashion-MNIST's grey pictures of garments, read from the hub's parquet files."""

import functools
import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

REPOSITORY = "zalando-datasets/fashion_mnist"
CLASSES = (
    *("t-shirt", "trousers", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)


def _parquet_file(split: str, folder: str | Path | None) -> Path:
    """The split's parquet file: from a folder, or from the hub's cache or network."""
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}, expected 'train' or 'test'")
    name = f"{split}-00000-of-00001.parquet"
    folder = folder or os.environ.get("MINIDIFF_DATA")
    if folder:
        if found := _below(folder, name):
            return found
        own = "your own pictures: train --scenes FOLDER, or --from MODEL --data FOLDER"
        raise FileNotFoundError(f"no {name} in {folder} or below it ({own})")
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(REPOSITORY, f"fashion_mnist/{name}", repo_type="dataset")
    except Exception as error:  # the hub's, or the network's of several kinds
        if getattr(error, "errno", None):  # of this machine: no room, not permitted, …
            raise
        raise FileNotFoundError(
            f"Fashion-MNIST is not here and could not be downloaded from the hub's "
            f"data set {REPOSITORY} ({type(error).__name__}): connect to the network, "
            f"or let MINIDIFF_DATA name a folder that holds {name}"
        ) from error
    return Path(path)


def _below(folder: str | Path, name: str) -> Path | None:
    """The first file called ``name`` in ``folder`` or below it, through links too."""
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        if name in files:
            return Path(place, name)
        known = os.path.realpath(place)
        folders[:] = [] if known in seen else sorted(folders)
        seen.add(known)
    return None


class LazyPictures:
    """Pictures in their files: each is decoded when it is first asked for."""

    def __init__(self, files: list[bytes]) -> None:
        self.files = files
        self.gray = torch.zeros(len(files), 28, 28, dtype=torch.uint8)
        self.known = torch.zeros(len(files), dtype=torch.bool)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """uint8 pictures (…, 28, 28) of ``rows`` (…)."""
        if len(new := rows[~self.known[rows]].unique()):
            files = [io.BytesIO(self.files[i]) for i in new.tolist()]
            pictures = np.stack([np.asarray(Image.open(file)) for file in files])
            self.gray[new] = torch.from_numpy(pictures)
            self.known[new] = True
        return self.gray[rows]


@functools.lru_cache(maxsize=4)
def _read(path: Path) -> tuple[LazyPictures, Tensor]:
    import pyarrow.parquet as parquet

    table = parquet.read_table(path)
    try:
        files = table.column("image").combine_chunks().field("bytes").to_pylist()
        labels = table.column("label").to_numpy()
        if len(set(np.bincount(labels, minlength=len(CLASSES)).tolist())) > 1:
            raise ValueError("its classes are not equally many")  # as MNIST's digits
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not of Fashion-MNIST: {error}") from None
    return LazyPictures(files), torch.tensor(labels)


def garment_files(
    split: str, folder: str | Path | None = None
) -> tuple[list[bytes], Tensor]:
    """Fashion-MNIST as it is stored: see ``fashion_mnist``.

    Returns:
        The pictures' PNG files, N of them, and int64 labels (N,).
    """
    pictures, labels = _read(_parquet_file(split, folder))
    return pictures.files, labels


def fashion_mnist(
    split: str, folder: str | Path | None = None
) -> tuple[Tensor, Tensor]:
    """Fashion-MNIST (Xiao, Rasul and Vollgraf 2017): grey pictures and class numbers.

    Args:
        split: "train" (60,000) or "test" (10,000).
        folder: the hub's data set as a folder; else the one that the environment
            variable MINIDIFF_DATA names; else downloaded once from the hub.

    Returns:
        uint8 pictures (N, 28, 28) and int64 labels (N,), numbers in CLASSES.

    Raises:
        FileNotFoundError: the folder lacks the file, or there is no network.
        ValueError: the file is damaged, or of another data set.
    """
    pictures, labels = _read(_parquet_file(split, folder))
    return pictures[torch.arange(len(labels))], labels


@dataclass(frozen=True, eq=False)
class ByClass:
    """Garments by their classes.

    ``pictures`` are a tensor (N, 28, 28), uint8, or what gives one for rows; ``order``
    (N,) are their rows in the order of the classes; ``numbers`` and ``starts`` (10,):
    how many a class has, and where they begin.
    """

    pictures: Tensor | LazyPictures
    order: Tensor
    numbers: Tensor
    starts: Tensor

    @property
    def content(self) -> tuple:
        """All of them, as they are stored, and their order: none is decoded for it."""
        pictures = self.pictures
        stored = [pictures] if isinstance(pictures, Tensor) else pictures.files
        return (*stored, self.order)

    def pick(self, kinds: Tensor, u: Tensor) -> Tensor:
        """A picture (…, 28, 28) of each class in ``kinds``, chosen by ``u`` (…).

        In [0, 1], each garment's brightest value 1.
        """
        places = self.starts[kinds] + (u * self.numbers[kinds]).long()
        gray = self.pictures[self.order[places]].float()
        return gray / gray.amax((-2, -1), keepdim=True)


def garments_by_class(
    split: str, folder: str | Path | None, device: str | torch.device
) -> ByClass:
    """The garments of one split on a device: see ``fashion_mnist``.

    On a CPU a picture is decoded when it is first picked.
    """
    lazy, labels = _read(_parquet_file(split, folder))
    numbers = labels.bincount(minlength=len(CLASSES))
    tables = labels.argsort(stable=True), numbers, numbers.cumsum(0) - numbers
    on_cpu = torch.device(device).type == "cpu"
    pictures = lazy if on_cpu else lazy[torch.arange(len(labels))].to(device)
    return ByClass(pictures, *(table.to(device) for table in tables))
