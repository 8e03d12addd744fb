"""Training on many devices: PyTorch's own engine, and what the losses need of it.

``torchrun`` starts one process a device. Without it every function here does nothing,
so that the training loop is the same in both cases.
"""

import copy
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn


def start(device: str) -> str:
    """Join the processes that ``torchrun`` started; the device of this one."""
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        return device
    cuda = device.startswith("cuda")
    if cuda:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    patience = timedelta(hours=6)  # the others wait while the first draws or measures
    dist.init_process_group("nccl" if cuda else "gloo", timeout=patience)
    return device


def active() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """The number of this process; 0 writes files."""
    return dist.get_rank() if active() else 0


def size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if active() else 1


def wait() -> None:
    """Wait until all processes have come this far."""
    if active():
        dist.barrier()


def wrap(module: nn.Module, sharded: bool = False) -> nn.Module:
    """Data parallel: every process holds all weights, gradients are averaged.

    ``sharded``: every process keeps a part of each weight and collects the rest when
    it computes, all at once (PyTorch's FSDP2; its forerunner: Zhao et al. 2023).
    """
    if not active():
        return module
    if sharded:
        from torch.distributed.fsdp import fully_shard

        # FSDP takes no weights in channels_last
        module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        return cast(nn.Module, fully_shard(module))
    return nn.parallel.DistributedDataParallel(module)


def replica(module: nn.Module, sharded: bool = False) -> nn.Module:
    """A copy of ``module`` that does not learn, its weights cut as ``wrap`` cuts them.

    Cut, it only keeps weights: ``whole_model`` makes one that computes.
    """
    return replaced(module, shard if sharded and active() else torch.clone)


def whole_model(module: nn.Module) -> nn.Module:
    """``module``, or a copy with all of each weight where they are sharded.

    Every process must ask, and each gets one.
    """
    sharded = any(hasattr(p, "full_tensor") for p in module.parameters())
    return replaced(module, whole) if sharded else module


def replaced(module: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of ``module`` that does not learn, with ``change(weight)`` for each."""
    known = {
        id(p): nn.Parameter(change(p.detach()), requires_grad=False)
        for p in module.parameters()
    }
    return copy.deepcopy(module, known).eval()


def shard(x: Tensor) -> Tensor:
    """The whole weight ``x`` in equal parts of its rows, one for each process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(x, init_device_mesh(x.device.type, (size(),)), [Shard(0)])


def local(x: Tensor) -> Tensor:
    """The part of a sharded weight that this process keeps; others as they are."""
    return x.to_local() if hasattr(x, "to_local") else x


def whole(x: Tensor) -> Tensor:
    """All of a sharded weight; every process must ask."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def shard_like(x: Tensor, model: Any) -> Tensor:
    """A whole tensor ``x`` cut as ``model`` is."""
    if not hasattr(model, "device_mesh") or x.ndim == 0:
        return x
    from torch.distributed.tensor import distribute_tensor

    x = x.to(model.device_mesh.device_type)
    return distribute_tensor(x, model.device_mesh, model.placements)


class _Gather(torch.autograd.Function):
    """The rows of all processes; backward, each gets the sum of what all ask of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(size())[rank()]


def gather(x: Tensor) -> Tensor:
    """The rows (B, …) of all processes, (N, …); gradients flow back to each."""
    return _Gather.apply(x) if active() else x


@torch.no_grad()
def total(x: Tensor) -> Tensor:
    """The sum of ``x`` over all processes, in the place of ``x``."""
    if active():
        dist.all_reduce(x)
    return x


@torch.no_grad()
def average(x: Tensor) -> Tensor:
    """The mean of ``x`` over all processes; ``x`` becomes their sum."""
    return total(x) / size()
