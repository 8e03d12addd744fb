"""Training on many devices: PyTorch's own engine, and what the losses need of it.

``torchrun`` starts one process a device. Without it every function here does nothing,
so that the training loop is the same in both cases.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn


def start(device: str) -> str:
    """Join the processes that ``torchrun`` started; the device of this one."""
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        return device
    cuda = device.startswith("cuda")
    if cuda:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
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
    """Until all processes have come this far."""
    if active():
        dist.barrier()


def wrap(module: nn.Module) -> nn.Module:
    """Data parallel: every process holds all weights, gradients are averaged."""
    if not active():
        return module
    return nn.parallel.DistributedDataParallel(module)


class _Gather(torch.autograd.Function):
    """The rows of all processes; backward, each gets the sum of what all ask of it."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(size())[rank()]


def gather(x: Tensor) -> Tensor:
    """The rows (B, …) of all processes, (N, …); gradients flow back to each."""
    return _Gather.apply(x) if active() else x


@torch.no_grad()
def average(x: Tensor) -> Tensor:
    """The mean of ``x`` over all processes."""
    if active():
        dist.all_reduce(x)
    return x / size()
