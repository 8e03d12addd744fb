"""The doctor: whether a machine computes what it should, what fits, which files it has.

A driver that is silently wrong draws noise or grey, and so does a damaged file. So a
small piece of the model runs here as it will in a drawing, and in float32 on the CPU.
"""

import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import sdpa_kernel

from minidiff.dit import MMDiT
from minidiff.engine.fast import BACKENDS, FastDecoder, FastMMDiT, has_fp8_products
from minidiff.engine.loading import (
    PARTS,
    TOKENIZERS,
    blueprint,
    find_local,
    read_scheduler,
)
from minidiff.engine.memory import (
    LADDER,
    RESERVE,
    Call,
    estimate,
    free_host,
    free_memory,
    usual_size,
)
from minidiff.files import hub, single_file
from minidiff.files.layout import INDEX, part_folder, read_index, recognize
from minidiff.files.weights import Prepared, Read, open_tensors, prepare_component
from minidiff.interface.terminal import one_line

PACKAGES = ("minidiff", "torch", "safetensors", "huggingface_hub", "triton")
# The largest relative error that is rounding: some ten roundings, one upon the other
LIMITS = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 6e-2}
SIDE = 8  # of the piece's picture, in patches


class Found(NamedTuple):
    """A line of the report; ``wrong`` where the machine computes something else."""

    label: str
    text: str
    wrong: bool = False

    def __str__(self) -> str:
        return f"{self.label:<11}{self.text}"


def examine(
    model: Path | str, device: torch.device, dtype: torch.dtype
) -> Iterator[Found]:
    """What there is to say of a model on a device, line after line.

    Raises ValueError for what names no model, or a single file that is damaged, OSError
    for what is not here and cannot be fetched.
    """
    local = Path(model) if Path(model).is_file() else find_local(model)
    place = local or hub.find_cached(str(model))
    yield Found("versions", versions())
    yield Found("device", device_in_words(device))
    yield from try_dtypes(device)
    yield Found("hub", "not asked" if local else hub.access(str(model)))
    source, parts = open_parts(model, place)
    yield Found("weights", source)
    yield from try_attention(parts["transformer"].model.config, device, dtype)
    yield from try_block(parts["transformer"], device, dtype)
    yield from try_decoder(parts["vae"], device, dtype)
    yield from plans(shapes(model, place, parts), device, dtype)
    yield from faults(place, bool(local)) if place and place.is_dir() else ()
    yield from files(place) if place else ()


# The machine


def versions() -> str:
    """Python's, and those of the packages that matter."""
    found = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return f"{', '.join(found)}; {platform.platform(terse=True)}"


def device_in_words(device: torch.device) -> str:
    """What a device is."""
    if device.type == "cuda":
        known = torch.cuda.get_device_properties(device)
        capability = f"compute capability {known.major}.{known.minor}"
        return f"{device}: {known.name}, {capability}, {in_gb(known.total_memory)}"
    level, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return f"{device}: {platform.machine()}, {level}, {threads} threads"


def in_gb(size: float) -> str:
    """Bytes in words."""
    return f"{size / 1e9:.1f}GB"


def compared(
    label: str,
    what: str,
    call: Callable[..., Tensor],
    given: tuple[Tensor, ...],
    wanted: Tensor,
    device: torch.device,
    dtype: torch.dtype,
) -> Found:
    """``call`` on a device beside what is ``wanted``, computed in float32 on the CPU.

    The error is ‖found − wanted‖ / ‖wanted‖; what is not finite is wrong.
    """
    try:
        found = call(*[x.to(device, dtype) for x in given]).float().cpu()
    except RuntimeError as refused:
        return Found(label, f"{what}: not here ({one_line(refused)[:60]})")
    error = ((found - wanted).norm() / wanted.norm()).item()
    right = error <= LIMITS[dtype]
    verdict = "right" if right else f"wrong, expected at most {LIMITS[dtype]:.0e}"
    return Found(label, f"{what}: error {error:.1e}, {verdict}", not right)


def try_dtypes(device: torch.device) -> Iterator[Found]:
    """A product of matrices in each dtype."""
    given = noise((96, 160)), noise((160, 64))
    wanted = given[0] @ given[1]
    for dtype in LIMITS:
        yield compared(
            "dtypes", name(dtype), torch.matmul, given, wanted, device, dtype
        )
    if device.type == "cuda":
        known = "works" if has_fp8_products(device) else "not here"
        yield Found("dtypes", f"products in 8 bits: {known}")


def name(dtype: torch.dtype) -> str:
    """A dtype's name."""
    return str(dtype).removeprefix("torch.")


def noise(size: tuple[int, ...], seed: int = 0) -> Tensor:
    """Gaussian numbers on the CPU, float32."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def try_attention(
    config: Any, device: torch.device, dtype: torch.dtype
) -> Iterator[Found]:
    """Each back end, on a length that 128 does not divide."""
    size = 2, config.num_attention_heads, 333, config.attention_head_dim
    q, k, v = (noise(size, seed) for seed in range(3))
    wanted = (q @ k.mT / size[-1] ** 0.5).softmax(-1) @ v
    for title, backend in BACKENDS.items():
        with sdpa_kernel(backend), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch says why one does not serve
            call, where = F.scaled_dot_product_attention, (device, dtype)
            yield compared("attention", title, call, (q, k, v), wanted, *where)


# The model's smallest pieces


def open_parts(
    model: Path | str, place: Path | None
) -> tuple[str, dict[str, Prepared[Any]]]:
    """The transformer and the autoencoder, and whence their weights are in words."""
    names = "transformer", "vae"
    if place and place.is_file():
        file = open_tensors(place)
        found = {n: single_file.prepare_part(n, *PARTS[n], file) for n in names}
        return f"read from {place}", found
    missing = "its files are not here"
    try:
        if place:
            at = {n: part_folder(place, n) for n in names}
            found = {n: prepare_component(*PARTS[n], at[n]) for n in names}
            return f"read from {place}", found
    except (FileNotFoundError, ValueError) as error:
        missing = one_line(error)
    models: dict[str, Any] = blueprint(model)
    return f"random: {missing}", {n: Prepared(models[n], {}, {}) for n in names}


def fill(piece: nn.Module, readers: dict[str, Read], prefix: str = "") -> None:
    """Give a piece on the meta device its weights: read, or random where none are.

    Random matrices keep the size of a signal, norms are near one.
    """
    state = {}
    for seed, (own, x) in enumerate(piece.state_dict().items()):
        if read := readers.get(prefix + own):
            state[own] = read("cpu", torch.float32)
        elif x.ndim > 1:
            state[own] = noise((*x.shape,), seed) / x[0].numel() ** 0.5
        else:
            state[own] = 0.1 * noise((*x.shape,), seed) + own.endswith("weight")
    piece.load_state_dict(state, assign=True)


@torch.no_grad()
def try_block(
    part: Prepared[MMDiT], device: torch.device, dtype: torch.dtype
) -> Iterator[Found]:
    """A transformer of its first block alone, as it is and in fused passes."""
    model, readers = part.model, dict(part.tensors())
    config = model.config = replace(model.config, pos_embed_max_size=SIDE)
    model.pos_embed = torch.empty(1, SIDE**2, config.width, device="meta")
    readers.pop("pos_embed", None)  # a large table, of which few rows are read
    model.joint_blocks = model.joint_blocks[:1]
    fill(model, readers)
    side, channels = SIDE * config.patch_size, config.in_channels
    text = (2, 77, config.joint_attention_dim), (2, config.pooled_projection_dim)
    latents, sigma = noise((2, channels, side, side)), torch.tensor([0.25, 0.75])
    given = latents, sigma, *(noise(size) for size in text)
    wanted = model(*given)
    there = deepcopy(model).to(device, dtype)
    forms: dict[str, Any] = {"plain": there}
    if config.qk_norm == "rms_norm":
        forms["fused"] = FastMMDiT.of(there)
    for form, run in forms.items():
        yield compared("block", form, run, given, wanted, device, dtype)


@torch.no_grad()
def try_decoder(
    part: Prepared[Any], device: torch.device, dtype: torch.dtype
) -> Iterator[Found]:
    """The autoencoder's decoder on a small picture, as it is and in fused passes."""
    decoder = part.model.decoder
    fill(decoder, dict(part.tensors()), "decoder.")
    given = (noise((1, part.model.config.latent_channels, 2 * SIDE, 2 * SIDE)),)
    wanted = decoder(*given)
    there = deepcopy(decoder).to(device, dtype)
    yield compared("decoder", "plain", there, given, wanted, device, dtype)
    run = FastDecoder.of(there)
    yield compared("decoder", "fused", run, given, wanted, device, dtype)


# What fits, and what is here


def shapes(
    model: Path | str, place: Path | None, parts: dict[str, Prepared[Any]]
) -> dict[str, Any]:
    """All parts on the meta device; of a single file's encoders, the published ones."""
    if not (place and place.is_file()):
        return blueprint(place or model)
    known = recognize(parts["transformer"].model.config, place.stem)
    return blueprint(known.name) if known else {}


def plans(
    models: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> Iterator[Found]:
    """The free memory, and which plan fits it for a picture of the usual size."""
    card = device.type == "cuda"
    free = free_memory(device, 0) if card else free_host()
    yield Found("memory", f"{in_gb(free)} free")
    if not models:
        return
    call = Call(models, usual_size(models), dtype.itemsize)
    for plan in LADDER:
        need = estimate(plan, call) + RESERVE * card
        fits = "fits" if need <= free else "does not fit"
        yield Found("memory", f"{in_gb(need)} {fits}: {plan}")


def faults(place: Path, whole: bool) -> Iterator[Found]:
    """What keeps each part of a model's folder from being loaded.

    What is missing is wrong where the model should be ``whole``; of one on the hub it
    will be fetched.
    """
    for name in (*read_index(place)[1], "scheduler"):
        try:
            open_part(name, part_folder(place, name))
        except (OSError, ValueError) as error:
            absent = isinstance(error, FileNotFoundError) and not whole
            verdict = "not here yet" if absent else "wrong"
            yield Found("files", f"{name}: {verdict}, {one_line(error)}", not absent)


def open_part(name: str, folder: Path) -> object:
    """Check the files of a part, as loading does; of its weights nothing is read."""
    if name in PARTS:
        return prepare_component(*PARTS[name], folder)
    if name in TOKENIZERS:
        return TOKENIZERS[name].from_pretrained(folder)
    return read_scheduler(folder)


def files(place: Path) -> Iterator[Found]:
    """Each file of a model with its size, its hash and, where known, the hub's."""
    found = [place]
    if place.is_dir():
        names = (*read_index(place)[1], "scheduler")
        folders = dict.fromkeys(part_folder(place, n) for n in names)
        found = [place / INDEX, *(f for at in folders for f in sorted(at.glob("*")))]
    for file in filter(Path.is_file, found):
        kind, digest, published = hub.identify(file)
        same = {None: "", digest: ", as published"}.get(published, ", damaged")
        size = f"{file.stat().st_size:,} bytes"
        line = f"{file.parent.name}/{file.name}: {size}, {kind} {digest[:16]}{same}"
        yield Found("files", line, same == ", damaged")
