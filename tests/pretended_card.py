"""A card that is not there: tensors that say "cuda" and compute on the CPU.

Within ``PretendedCard()`` what is moved to "cuda", or made there, is an ``OnCard``.
Python takes each path that a tensor on a GPU takes, and as on a GPU an operation with a
tensor elsewhere is an error (but for a number, or an index). To PyTorch's own C++ it is
on the CPU: kernels, streams, compilation and fused optimisers are not pretended.
``waits`` counts where the host would wait for the card.
"""

import traceback
from collections import Counter
from contextlib import ExitStack, nullcontext
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

import minidiff

PACKAGE = Path(minidiff.__file__).parent
aten = torch.ops.aten
INDEXING = aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_
NUMBER_TOO = aten.masked_fill, aten.masked_fill_, aten.fill_
WAITING = aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select


class OnCard(Tensor):
    """A tensor of the pretended card, around one of the CPU."""

    def __new__(cls, inner):
        form = inner.stride(), inner.storage_offset(), None, inner.dtype
        return Tensor._make_wrapper_subclass(cls, inner.size(), *form)

    def __init__(self, inner):
        self.inner = inner

    device = property(lambda self: torch.device("cuda", 0))
    is_cuda = property(lambda self: True)
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self):
        return f"OnCard({self.inner})"

    def numpy(self):
        raise TypeError("a tensor on cuda has no numpy(); expected one on the CPU")

    def tolist(self):
        note("tolist")
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        name, given = func.overloadpacket, (args, kwargs or {})
        tensors = [x for x in tree_leaves(given) if isinstance(x, Tensor)]
        check_places(func, tensors)
        moves = name is aten.copy_ and len({type(x) is cls for x in tensors}) > 1
        masked = name in INDEXING and any(x.dtype == torch.bool for x in tensors[1:])
        if name in WAITING or moves or masked:
            note(name.__name__)
        inner_args, inner_kwargs = tree_map(bare, given)
        out = func(*inner_args, **inner_kwargs)
        known = {id(bare(x)): x for x in tensors}  # an operation in place returns it
        return tree_map(lambda x: known[id(x)] if id(x) in known else wrap(x), out)


def bare(x):
    return x.inner if isinstance(x, OnCard) else x


def wrap(x):
    return OnCard(x) if isinstance(x, Tensor) and not isinstance(x, OnCard) else x


def check_places(func, tensors):
    """Raise RuntimeError where an operation takes tensors of two devices."""
    name, elsewhere = func.overloadpacket, [x for x in tensors if bare(x) is x]
    if not elsewhere or name is aten.copy_ or PretendedCard.backward:
        return
    numbers = name in NUMBER_TOO or torch.Tag.pointwise in func.tags
    fits = name in INDEXING or (numbers and not any(x.ndim for x in elsewhere))
    fixed = name in INDEXING or func._schema.is_mutable  # the first gives the place
    if not fits or (fixed and bare(tensors[0]) is tensors[0]):
        shapes = [(type(x).__name__, tuple(x.shape)) for x in tensors]
        raise RuntimeError(f"{name} takes tensors of two devices: {shapes}")


def note(what):
    """Count a wait under the line of the package that asks for it."""
    frames = traceback.extract_stack()
    lines = [f for f in frames if Path(f.filename).is_relative_to(PACKAGE)]
    where = f"{Path(lines[-1].filename).name}:{lines[-1].lineno}" if lines else "a test"
    PretendedCard.waits[where, what] += 1


class Move(torch.autograd.Function):
    """To the card or from it, and the gradient back."""

    @staticmethod
    def forward(ctx, x, cuda):
        ctx.cuda = cuda
        copied = bare(x).detach().clone()
        return OnCard(copied) if cuda else copied

    @staticmethod
    def backward(ctx, gradient):
        return (bare if ctx.cuda else wrap)(gradient), None


def move(x, device):
    """``x`` on ``device``; None is where it is."""
    device = device and torch.device(device).type
    if device not in ("cuda", "cpu") or (device == "cuda") == isinstance(x, OnCard):
        return x
    note(f"to {device}")
    return Move.apply(x, device == "cuda")


def to(x, *args, dtype=None, device=None, memory_format=None, **_):
    """``Tensor.to``."""
    for value in args:
        if isinstance(value, Tensor):
            device, dtype = value.device, value.dtype
        elif isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, str | torch.device):
            device = value
    kept = {"dtype": dtype, "memory_format": memory_format}
    kept = {name: value for name, value in kept.items() if value is not None}
    x = move(x, device)
    return x.to(**kept) if kept else x


def module_to(module, *args, _to=nn.Module.to, **kwargs):
    """``nn.Module.to``, where C++ would ask a tensor for its device."""
    if args and isinstance(args[0], Tensor):
        args = args[0].device, args[0].dtype
    return _to(module, *args, **kwargs)


def scaled_mm(a, b, scale_a, scale_b, **options):
    """``torch._scaled_mm`` with a scale for each row, as strict as a GPU's."""
    (rows, inner), outputs = a.shape, b.shape[1]
    assert inner % 16 == outputs % 16 == 0 and a.stride(1) == b.stride(0) == 1
    assert (scale_a.shape, scale_b.shape) == ((rows, 1), (1, outputs))
    for scale in (scale_a, scale_b):
        assert scale.dtype == torch.float32 and scale.is_contiguous()
    assert options["out_dtype"] == options["bias"].dtype == torch.bfloat16
    return torch._scaled_mm(a, b, scale_a, scale_b, **options)


class PretendedCard(TorchFunctionMode):
    """Within this context "cuda" is the pretended card, and ``torch.cuda`` knows it."""

    waits = Counter()
    backward = False  # zeros that autograd makes are the CPU's
    facts = {
        "device_count": 1,
        "get_device_capability": (9, 0),
        "mem_get_info": (80 * 10**9, 80 * 10**9),
        "memory_reserved": 0,
        "memory_allocated": 0,
        "synchronize": None,
        "device_of": nullcontext(),
    }

    def __enter__(self):
        self.waits.clear()
        with ExitStack() as stack:
            for name, fact in self.facts.items():
                known = mock.Mock(return_value=fact)
                stack.enter_context(mock.patch.object(torch.cuda, name, known))
            stack.enter_context(mock.patch.object(nn.Module, "to", module_to))
            version = mock.Mock(return_value=91900)
            stack.enter_context(
                mock.patch.object(torch.backends.cudnn, "version", version)
            )
            flags = torch.__future__
            before = flags.get_swap_module_params_on_conversion()
            stack.callback(flags.set_swap_module_params_on_conversion, before)
            flags.set_swap_module_params_on_conversion(True)
            self.patches = stack.pop_all()
        return super().__enter__()

    def __exit__(self, *problem):
        self.patches.close()
        return super().__exit__(*problem)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is Tensor.to:
            return to(*args, **kwargs)
        if func is Tensor.cpu:
            return move(args[0], "cpu")
        if func is Tensor.backward:
            with mock.patch.object(PretendedCard, "backward", True):
                return func(*args, **kwargs)
        if func is torch._addmm_activation:  # with another GELU on a CPU
            assert kwargs == {"use_gelu": True}
            return F.gelu(torch.addmm(*args), approximate="tanh")
        if func is torch.bmm and (wide := kwargs.pop("out_dtype", None)):
            assert wide in (args[0].dtype, torch.float32)
            return torch.bmm(*(x.to(wide) for x in args))  # not on a CPU
        if func is torch._scaled_mm:
            return scaled_mm(*args, **kwargs)
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            assert kwargs.get("generator") is None, "a generator of the CPU"
            made = func(*args, **kwargs | {"device": "cpu"})
            return move(made, "cuda") if func is torch.tensor else wrap(made)
        return func(*args, **kwargs)
