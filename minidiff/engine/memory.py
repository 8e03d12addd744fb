"""Fitting a model into a card: what stays on it, in how many bits, and what comes and
goes.

Three facts carry the plans. Text encoders run once a picture, layer after layer: their
weights can stay in the file's memory map and visit the card one layer at a time.
AdaLN's layers, a third of an MMDiT, read only the time and the pooled text: their
output is computed for all steps at once, and they leave. And a weight in 8 bits takes
half of its place in bfloat16.
"""

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minidiff.dit import MMDiT
from minidiff.efficiency import (
    BLOCK,
    Float8Linear,
    NF4Linear,
    StreamedLinear,
    quantize,
    store,
    swap,
    weigh,
)
from minidiff.engine.kernels import has_fp8
from minidiff.engine.tiling import Tiled
from minidiff.files.weights import Prepared, Read
from minidiff.interface.checks import check_choice, check_fast, check_range
from minidiff.interface.request import Request
from minidiff.lora import adapted_layers
from minidiff.text_encoders import T5Encoder
from minidiff.vae import VAE

GIB = 2**30
RESERVE = 0.6 * GIB  # what CUDA itself and the allocator's gaps take
BUDGETS = ("8GB", "12GB", "16GB", "24GB")
NOTHING = (0, 16, 0, 0)  # no latents: the weights alone
NF4 = 0.5 + 2 / BLOCK  # bytes of a weight: its code, its part of the scale
T5 = "text_encoder_3"
Form = Callable[[nn.Linear], nn.Module]
Models = Mapping[str, Any]  # the parts of a pipeline, by the hub's names


class NoRoom(ValueError):
    """A call needs more memory than is left beside the weights."""


@dataclass(frozen=True)
class Plan:
    """Where the parts of a pipeline live.

    ``t5`` and ``clip`` are "resident" (on the device), "streamed" (layer by layer from
    the file at each prompt) or, for T5, "none" (left out). ``modulation`` is "resident"
    or "streamed": AdaLN's weights, read from the file once for each picture. ``fp8``
    stores the blocks' matrices in 8 bits; ``nf4`` them, and those of a T5 that is
    resident, in 4 bits. ``vae_tile`` is the side of a tile in latent pixels, None the
    whole picture; ``vae_slicing`` works on one picture at a time.
    """

    t5: str = "resident"
    clip: str = "resident"
    modulation: str = "resident"
    fp8: bool = False
    vae_tile: int | None = None
    vae_slicing: bool = False
    nf4: bool = False

    def __post_init__(self) -> None:
        places = "resident", "streamed"
        check_choice("t5", self.t5, (*places, "none"))
        check_choice("clip", self.clip, places)
        check_choice("modulation", self.modulation, places)
        for name in ("fp8", "vae_slicing", "nf4"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name} is {value!r}; expected True or False")
        if self.fp8 and self.nf4:
            raise ValueError("fp8 and nf4 are True; expected one of them")
        if self.vae_tile is not None:
            check_range("vae_tile", self.vae_tile, 8)  # latent pixels

    def __str__(self) -> str:
        values = [(f.name, getattr(self, f.name), f.default) for f in fields(self)]
        changed = [f"{name} {value}" for name, value, usual in values if value != usual]
        return ", ".join(changed) or "everything resident"

    def check_room(
        self, pipe: Any, size: tuple[int, ...], levels: int, controls: Sequence[Any]
    ) -> None:
        """Raise NoRoom where latents of ``size`` need more memory than is left.

        ``pipe`` is loaded: what its weights take is gone from ``pipe.room``, and from
        the card, if it is on one. ``levels`` and ``controls`` are those of a request.
        """
        models, weight = {"transformer": pipe.transformer}, first_weight(pipe)
        width, nets = weight.dtype.itemsize, nets_of(controls)
        need = working(self, Call(models, size, width, levels, nets))
        left, whose = pipe.room, "memory"
        if weight.device.type == "cuda":
            free = free_memory(weight.device, need)
            left, whose = min((left, whose), (free, "the card"))
        if need > left:
            what = f"{size_in_words(size, pipe.vae)} at once take about"
            room = f"beside the weights; {whose} has {left / 1e9:.1f}GB left"
            known = "expected fewer or smaller ones, or a tighter plan"
            raise NoRoom(f"{what} {need / 1e9:.1f}GB {room}: {known}")


# From the roomiest to the tightest: each gives up what costs the least time.
LADDER = (
    Plan(),
    Plan(t5="streamed"),
    Plan(t5="streamed", clip="streamed", vae_slicing=True),
    Plan("streamed", "streamed", "streamed", vae_slicing=True),
    Plan("streamed", "streamed", "streamed", vae_slicing=True, vae_tile=64),
    Plan("streamed", "streamed", "streamed", True, vae_slicing=True, vae_tile=64),
)


# Choosing


@dataclass(frozen=True)
class Call:
    """What a drawing, with guidance, asks of a device.

    Args:
        models: the parts, by the hub's names (on the meta device will do).
        size: of the latents, (B, C, h, w).
        width: bytes of a working value.
        levels: noise levels times rows (two with guidance) for which each picture has
            its modulations; all are computed ahead.
        nets: ControlNets, loaded already.
    """

    models: Models
    size: tuple[int, ...]
    width: int = 2
    levels: int = 2 * 41  # Medium's 40 steps, the most that is usual
    nets: tuple[Any, ...] = ()

    @property
    def attached(self) -> int:
        """The bytes of the nets' weights."""
        return sum(x.nbytes for net in self.nets for x in net.parameters())


def nets_of(controls: Sequence[Any]) -> tuple[Any, ...]:
    """The networks of a request's controls, each of them once."""
    return tuple(dict.fromkeys(control.net for control in controls))


def usual_size(models: Models) -> tuple[int, ...]:
    """The latents (B, C, h, w) of one picture of the size that a model is meant for."""
    config = models["transformer"].config
    return 1, config.in_channels, config.sample_size, config.sample_size


def asked_by(request: Request, models: Models, dtype: torch.dtype) -> Call:
    """What a request that a pipeline has checked asks of a device."""
    height, width = (side // models["vae"].config.factor for side in request.size)
    size = request.count, models["transformer"].config.in_channels, height, width
    nets = nets_of(request.controls)
    return Call(models, size, dtype.itemsize, request.levels, nets)


def estimate(plan: Plan, call: Call) -> float:
    """About how many bytes of the device a call takes, the weights among them."""
    models, width = call.models, call.width
    t = models["transformer"]
    blocks = weigh(t, lambda n: "joint_blocks" in n and "adaLN" not in n)
    adaln = weigh(t, lambda n: "adaLN" in n)
    table = t.pos_embed.numel()
    total = (weigh(t) - blocks - adaln - table) * width
    total += blocks * (1 if plan.fp8 else NF4 if plan.nf4 else width)
    total += (adaln + table) * width * (plan.modulation == "resident")
    total += weigh(models["vae"]) * width
    where = {"text_encoder": plan.clip, "text_encoder_2": plan.clip, T5: plan.t5}
    here = [models[n] for n, at in where.items() if at == "resident" and n in models]
    total += sum(map(weigh, here)) * width + call.attached
    if plan.nf4 and models.get(T5) in here:
        total -= weigh(models[T5], lambda n: "block" in n) * (width - NF4)
    return total + working(plan, call)


def working(plan: Plan, call: Call) -> float:
    """About how many bytes a call takes beside the weights.

    It is what ``benchmarks/memory_count.py`` counts, and some room.
    """
    batch, _, *sides = call.size
    area = math.prod(sides)  # in latent pixels
    tile = min(area, plan.vae_tile**2) if plan.vae_tile else area
    slices = 1 if plan.vae_slicing else math.inf
    unit = GIB / 128**2 / 2  # a latent pixel's share of 1 GiB at 1024², in 16 bits
    decoding = 2.5 * unit * tile * min(batch, slices)  # encoding takes less
    config = call.models["transformer"].config
    tokens = area // config.patch_size**2 + 333
    modulations = 12 * config.num_layers + 3 * len(config.dual_attention_layers)
    said = sum(net.config.num_layers for net in call.nets)  # and times their strength
    numbers = (
        2 * (22 + 2 * said) * tokens + modulations * call.levels
    )  # of each channel
    denoising = batch * config.width * numbers
    return max(denoising, decoding) * call.width


def requested(memory: str | Plan | None = None, **knobs: Any) -> Plan:
    """What is asked for whatever the model; ValueError for what is no setting."""
    if unknown := knobs.keys() - {f.name for f in fields(Plan)}:
        names = ", ".join(f.name for f in fields(Plan))
        known = f"expected dtype, memory, fast, compile, or one of {names}"
        raise ValueError(f"{min(unknown)} is no setting; {known}")
    if memory is not None and not isinstance(memory, Plan):
        parse_budget(memory)
        memory = None
    return replace(memory or Plan(), **knobs)


class Fit(NamedTuple):
    """The plan with which a call fits, and what larger calls may take in bytes."""

    plan: Plan
    room: float


def choose(memory: str | Plan | None, call: Call, **knobs: Any) -> Plan:
    """The roomiest plan of the ladder that fits ``memory``, with ``knobs`` set on it.

    ``memory`` is "8GB" or any other number of gigabytes, a Plan, or None (everything
    resident). Raises ValueError for a text that is not one, or too little memory.
    """
    plan = requested(memory, **knobs)
    if memory is None or isinstance(memory, Plan):
        return plan
    budget = parse_budget(memory)
    if fitting := roomiest(budget, call, **knobs):
        return fitting
    raise ValueError(f"memory is {memory}; {shortage(budget, call, **knobs)}")


def roomiest(budget: float, call: Call, **knobs: Any) -> Plan | None:
    """The first plan of the ladder, with ``knobs``, that fits ``budget`` bytes."""
    for plan in LADDER:
        plan = adjusted(plan, **knobs)
        if estimate(plan, call) + RESERVE <= budget:
            return plan
    return None


def adjusted(plan: Plan, **knobs: Any) -> Plan:
    """A plan of the ladder with ``knobs`` set on it: 4 bits take the place of 8."""
    own = {"fp8": False} if knobs.get("nf4") else {}
    return replace(plan, **own | knobs)


def shortage(budget: float, call: Call, **knobs: Any) -> str:
    """What is needed where no plan fits; the one that would without ``knobs``."""
    least = estimate(adjusted(LADDER[-1], **knobs), call) + RESERVE
    large = math.prod(call.size) > math.prod(usual_size(call.models))
    what = "so many pixels at once" if large else "this model"
    line = f"{what} needs about {least / 1e9:.1f}GB"
    if not (other := roomiest(budget, call)):
        return line
    fixed = ", ".join(f"{name} {value}" for name, value in knobs.items())
    return f"with {fixed} {line}; this would fit: {other}"


def parse_budget(memory: str) -> float:
    """ "8GB" → bytes."""
    number = str(memory).upper().removesuffix("GB").strip()
    with suppress(ValueError):
        if 0 < (budget := float(number)) < 1e9:
            return budget * 1e9
    raise ValueError(f"memory is {memory!r}; expected {', '.join(BUDGETS)} or None")


def check_device(plan: Plan, call: Call, device: Any, **knobs: Any) -> None:
    """Raise ValueError where the device cannot follow the plan.

    That is a card that is too small (a plan that fits is named), and MPS for fp8. What
    ``load`` chooses for ``memory`` fits one picture of the usual size, so that for
    another the settings are named one by one.
    """
    device = torch.device(device)
    if plan.fp8 and device.type == "mps":
        found = "the plan holds weights in fp8, which MPS does not have"
        raise ValueError(f"{found}; expected fp8=False, or more memory")
    if device.type != "cuda":
        return
    need = estimate(plan, call) - call.attached
    if need <= (free := free_memory(device, need)):
        return
    card = f"the card has {free / 1e9:.1f}GB free"
    budget = int((free + RESERVE) / 1e8) / 10  # CUDA has taken its part of it
    smaller = roomiest(budget * 1e9, call, **knobs)  # rounded down, to fit the card
    if not smaller:
        raise ValueError(f"{card}; {shortage(budget * 1e9, call, **knobs)}")
    name = "this would fit"
    if call.size == usual_size(call.models):
        name = f"memory='{budget:g}GB' fits"
    found = f"{card} and this needs about {need / 1e9:.1f}GB"
    raise ValueError(f"{found}; {name}: {smaller}")


def free_memory(device: torch.device, need: float) -> int:
    """The bytes of a card that PyTorch can still give to tensors.

    Where they are fewer than ``need``, what dropped pipelines hold in cycles is freed.
    """

    def free() -> int:  # for CUDA, and what PyTorch holds unused
        reserved = torch.cuda.memory_reserved(device)
        unused = reserved - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused

    if free() < need:
        gc.collect()
    return free()


def free_host() -> float:
    """The bytes of the machine's memory that are free; infinite where it says none.

    A container's own limit counts too.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return math.inf
    known = dict(line.split(":", 1) for line in lines)
    free = [1024 * int(known["MemAvailable"].split()[0])]
    with suppress(OSError, ValueError):  # ValueError for "max"
        limit, used = (
            int(Path(f"/sys/fs/cgroup/memory.{name}").read_text())
            for name in ("max", "current")
        )
        free.append(limit - used)
    return max(0, min(free))


def room_left(
    memory: str | Plan | None, plan: Plan, call: Call, device: torch.device | None
) -> float:
    """How many bytes drawings may take beside the weights, at least what ``call`` does.

    That is what a budget leaves, and on the CPU as ``device`` half of the free memory;
    what a card has is asked at each call.
    """
    need = working(plan, call)
    weights, room = estimate(plan, call) - need, math.inf
    if not (memory is None or isinstance(memory, Plan)):
        room = parse_budget(memory) - RESERVE - weights
    if device and device.type == "cpu":
        room = min(room, (free_host() - weights) / 2)
    return max(room, need)


def first_weight(pipe: Any) -> Tensor:
    """A weight that says where a pipeline computes, and in what."""
    return pipe.transformer.x_embedder.proj.weight


def size_in_words(size: tuple[int, ...], vae: VAE) -> str:
    """The pictures that latents of ``size`` become, in words."""
    batch, _, height, width = size
    return f"{batch} × {vae.config.factor * width}×{vae.config.factor * height} pixels"


# Layers whose weights stay in the file


class StreamedEmbedding(nn.Module):
    """An embedding whose table stays in the memory map: only rows that are read move.

    Ids (…) → (…, D) on the ids' device, in ``dtype``.
    """

    def __init__(self, layer: nn.Embedding, dtype: torch.dtype) -> None:
        super().__init__()
        self.stored, self.dtype = layer.weight.detach(), dtype

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.stored[ids.to(self.stored.device)]  # (…) → (…, D)
        return rows.to(ids.device).to(self.dtype)


class CroppedTable:
    """``MMDiT.positions`` for a table that stays in the map: the last crop is kept."""

    def __init__(self, model: MMDiT, device: Any, dtype: torch.dtype) -> None:
        self.model, self.to = model, {"device": device, "dtype": dtype}
        self.last: tuple[tuple[int, int], Tensor] | None = None

    def __call__(self, height: int, width: int) -> Tensor:
        last = self.last  # read and set in one go: an interruption leaves a whole pair
        if last is None or last[0] != (height, width):
            crop = MMDiT.positions(self.model, height, width).to(**self.to)
            self.last = last = (height, width), crop
        return last[1]


# Placing


def is_streamed(plan: Plan, model: nn.Module, name: str) -> bool:
    """Whether the layer ``name`` of a model stays in its file."""
    if isinstance(model, VAE):
        return False
    if isinstance(model, MMDiT):
        return plan.modulation == "streamed" and "adaLN_modulation" in name
    where = plan.t5 if isinstance(model, T5Encoder) else plan.clip
    large = isinstance(model.get_submodule(name), nn.Linear) or name in (
        "shared",
        "text_model.embeddings.token_embedding",
    )
    return where == "streamed" and large


def form_of(plan: Plan, model: nn.Module, name: str) -> Form | None:
    """What stores the layer ``name`` of a model in fewer bits; None: it stays whole."""
    layer = model.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        return None
    blocks = name.startswith("joint_blocks") and "adaLN" not in name
    if isinstance(model, MMDiT) and blocks and plan.fp8:
        return in_float8
    t5 = isinstance(model, T5Encoder) and plan.t5 == "resident"
    chosen = t5 or (isinstance(model, MMDiT) and blocks)
    divides = layer.weight.numel() % BLOCK == 0
    return NF4Linear if plan.nf4 and chosen and divides else None


def in_float8(layer: nn.Linear) -> Float8Linear:
    """The layer, its matrix in 8 bits."""
    return Float8Linear(quantize(layer.weight), layer.bias)


@torch.no_grad()
def place_part(
    prepared: Prepared, plan: Plan, device: Any, dtype: torch.dtype
) -> nn.Module:
    """Read one part of a pipeline as the plan says."""
    model: Any = prepared.model
    table = isinstance(model, MMDiT) and plan.modulation == "streamed"
    state: dict[str, Tensor] = {}
    matrices: dict[str, tuple[Read, Form]] = {}
    for name, read in prepared.tensors():
        layer, _, kind = name.rpartition(".")
        if is_streamed(plan, model, layer) or (table and name == "pos_embed"):
            state[name] = read("cpu", None)
        elif kind == "weight" and (form := form_of(plan, model, layer)):
            matrices[layer] = read, form
        else:
            state[name] = read(device, dtype)
    model.load_state_dict(state, assign=True, strict=not matrices)
    for name, (read, form) in matrices.items():  # one whole matrix at a time
        layer = model.get_submodule(name)
        layer.weight = nn.Parameter(read(device, dtype))
        swap(model, name, form(layer))
    stream(model, plan, dtype)
    if table:
        model.positions = CroppedTable(model, device, dtype)
    return model.eval()


def stream(model: nn.Module, plan: Plan, dtype: torch.dtype) -> None:
    """Let the layers whose weights stay in their file read them there."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and is_streamed(plan, model, name):
            swap(model, name, StreamedLinear(layer))
        elif isinstance(layer, nn.Embedding) and is_streamed(plan, model, name):
            swap(model, name, StreamedEmbedding(layer, dtype))


def stand_in(model: nn.Module, plan: Plan) -> None:
    """Mark the linear layers of a meta model whose weights ``plan`` keeps elsewhere.

    A ``StreamedLinear`` takes their place, for those in fewer bits too.
    """
    for name, layer in list(model.named_modules()):
        away = is_streamed(plan, model, name) or form_of(plan, model, name)
        if isinstance(layer, nn.Linear) and away:
            swap(model, name, StreamedLinear(layer))


@torch.no_grad()
def to_float8(model: MMDiT) -> MMDiT:
    """Store a model's blocks in 8 bits, in place, as ``place_part`` does.

    Raises ValueError for a model with a LoRA beside its layers.
    """
    for name, _ in adapted_layers(model):
        raise ValueError(f"{name} has a LoRA beside it; expected 8 bits first")
    return store(model, in_float8)


def check_speed(
    plan: Plan, config: Any, device: torch.device, fast: bool, compile: bool
) -> None:
    """Raise ValueError where a transformer cannot be run as fast as asked for.

    That is with ``fast`` a model without ``rms_norm``, unless its blocks are compiled;
    and with ``compile`` weights in 4 bits, or in fp8 on a GPU for which Triton has no
    such numbers.
    """
    if compile and plan.nf4:
        raise ValueError("compile and nf4 are True; expected one of them")
    if fast and not compile:
        check_fast(config)
    if compile and plan.fp8 and device.type == "cuda" and not has_fp8(device):
        found = "compile is True and weights are in fp8, which this GPU does not know"
        raise ValueError(f"{found}; expected compute capability 8.9, or compile=False")


def load_parts(
    prepared: Mapping[str, Prepared],
    plan: Plan,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, nn.Module]:
    """Read the parts of a pipeline, by the hub's names, as ``plan`` says.

    T5 overflows in float16, where it then computes in bfloat16. Raises ValueError where
    the card is too small for the weights.
    """
    parts = {n: p for n, p in prepared.items() if plan.t5 != "none" or n != T5}
    models = {name: part.model for name, part in parts.items()}
    check_device(plan, Call(models, NOTHING, dtype.itemsize), device)
    wide = torch.bfloat16 if dtype == torch.float16 else dtype
    placed: dict[str, Any] = {
        name: place_part(part, plan, device, wide if name == T5 else dtype)
        for name, part in parts.items()
    }
    if plan.vae_tile or plan.vae_slicing:
        placed["vae"] = Tiled(placed["vae"], plan.vae_tile, plan.vae_slicing)
    return placed
