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


def gather(x: Tensor) -> Tensor:
    """The rows (B, …) of all processes, (N, …); gradients flow back to each."""
    if not active():
        return x
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(x.contiguous()))


@torch.no_grad()
def average(x: Tensor) -> Tensor:
    """The mean of ``x`` over all processes."""
    if active():
        dist.all_reduce(x)
    return x / size()
