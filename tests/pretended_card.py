"""A card that is not there: tensors that say "cuda" and compute on the CPU.

Within ``PretendedCard()`` what is moved to "cuda", or made there, is an ``OnCard``. It
takes each path that a tensor on a GPU takes, and as on a GPU an operation between it
and a tensor elsewhere is an error (but for a number, or an index). Kernels, streams and
compilation are not pretended. ``waits`` counts where the host would wait for the card.
"""

import traceback
from collections import Counter
from contextlib import ExitStack, nullcontext
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
INDEXING = aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_
WAITING = aten._local_scalar_dense, aten.equal, aten.nonzero


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
        check_places(name, tensors)
        if name in WAITING:
            note(name.__name__)
        inner_args, inner_kwargs = tree_map(bare, given)
        out = func(*inner_args, **inner_kwargs)
        known = {id(bare(x)): x for x in tensors}  # an operation in place returns it
        return tree_map(lambda x: known[id(x)] if id(x) in known else wrap(x), out)


def bare(x):
    return x.inner if isinstance(x, OnCard) else x


def wrap(x):
    return OnCard(x) if isinstance(x, Tensor) and not isinstance(x, OnCard) else x


def check_places(name, tensors):
    """Raise RuntimeError where an operation takes tensors of two devices."""
    elsewhere = [x for x in tensors if not isinstance(x, OnCard) and x.ndim]
    if not elsewhere or name is aten.copy_ or PretendedCard.backward:
        return
    if name not in INDEXING or not isinstance(tensors[0], OnCard):
        shapes = [(type(x).__name__, tuple(x.shape)) for x in tensors]
        raise RuntimeError(f"{name} takes tensors of two devices: {shapes}")


def note(what):
    """Count a wait under the line of the package that asks for it."""
    lines = [f for f in traceback.extract_stack() if "/minidiff/" in f.filename]
    where = lines[-1].filename.split("/minidiff/")[-1] if lines else "a test"
    PretendedCard.waits[where, what] += 1


class Move(torch.autograd.Function):
    """To the card or from it, and the gradient back."""

    @staticmethod
    def forward(ctx, x, cuda):
        ctx.cuda = cuda
        return OnCard(x.detach()) if cuda else bare(x).detach()

    @staticmethod
    def backward(ctx, gradient):
        return (bare if ctx.cuda else wrap)(gradient), None


def move(x, device):
    """``x`` on ``device``; None is where it is."""
    device = device and torch.device(device).type
    if device not in ("cuda", "cpu") or (device == "cuda") == isinstance(x, OnCard):
        return x
    if device == "cpu":
        note("to the CPU")
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
    """``nn.Module.to``, by new parameters that take the place of the old."""
    if args and isinstance(args[0], Tensor):
        args = args[0].device, args[0].dtype
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return _to(module, *args, **kwargs)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


class PretendedCard(TorchFunctionMode):
    """Within this context "cuda" is the pretended card, and ``torch.cuda`` knows it."""

    waits = Counter()
    backward = False  # zeros that autograd makes are the CPU's

    def __enter__(self):
        self.waits.clear()
        facts = {
            "device_count": 1,
            "get_device_capability": (9, 0),
            "mem_get_info": (80 * 10**9, 80 * 10**9),
            "memory_reserved": 0,
            "memory_allocated": 0,
            "synchronize": None,
            "device_of": nullcontext(),
        }
        self.patches = ExitStack()
        for name, fact in facts.items():
            self.patches.enter_context(
                mock.patch.object(torch.cuda, name, lambda *_, fact=fact: fact)
            )
        self.patches.enter_context(mock.patch.object(nn.Module, "to", module_to))
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
            return F.gelu(torch.addmm(*args), approximate="tanh")
        if func is torch.bmm and (wide := kwargs.pop("out_dtype", None)):
            return torch.bmm(*(x.to(wide) for x in args))  # not on a CPU
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            return move(func(*args, **kwargs | {"device": "cpu"}), "cuda")
        return func(*args, **kwargs)
