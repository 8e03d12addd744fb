"""Count the memory of a whole denoising call at full size, without a GPU.

    python benchmarks/memory_count.py

The models run on PyTorch's meta device, where tensors have shapes and no numbers. Each
storage counts from its first appearance until Python lets it go, as an allocator would
see it. Not counted: rounding and gaps in the allocator, workspaces of the libraries,
and what CUDA itself takes. Attention counts its output only, as in a fused kernel.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minidiff.control import ControlNet, ControlNetConfig, controls_of
from minidiff.dit import MMDiT, MMDiTConfig
from minidiff.engine.loading import blueprint
from minidiff.engine.memory import GIB, Plan, place_part
from minidiff.files.weights import Prepared, Read
from minidiff.flow_matching import ClassifierFree, Scheduler
from minidiff.sampling import Pipeline
from minidiff.text_encoders import T5Config, T5Encoder
from minidiff.vae import VAE, VAEConfig

STREAMED = Plan("streamed", "streamed", "streamed")


class Count(TorchDispatchMode):
    """Bytes of live storages on the meta device: ``live`` now, ``peak`` at most."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        super().__init__()
        self.known: set[int] = set()
        for tensor in in_files(model, plan):
            self.known.add(tensor.untyped_storage()._cdata)
        self.live = self.peak = 0
        for tensor in [*model.parameters(), *model.buffers()]:
            self.add(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type == "meta":
                self.add(leaf)
        return out

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.drop, key, size)

    def drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention that allocates its output alone."""
    original = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda q, *_, **__: torch.empty_like(q)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


class MetaFile(Prepared):
    """Reads every tensor of its model as an empty one of the stored dtype."""

    def tensors(self) -> Iterator[tuple[str, Read]]:
        for name, like in self.model.state_dict().items():
            yield name, partial(self.read, like)

    @staticmethod
    def read(like: Tensor, device: Any, dtype: torch.dtype | None) -> Tensor:
        return torch.empty(like.shape, dtype=dtype or torch.float16, device="meta")


def on_meta(model_class: type, config: Any, plan: Plan) -> nn.Module:
    """A model placed by ``plan``, in bfloat16, on the meta device."""
    with torch.device("meta"):
        model = model_class(config)
    model = place_part(MetaFile(model, {}, {}), plan, "meta", torch.bfloat16)
    return model.requires_grad_(False)


def in_files(model: nn.Module, plan: Plan) -> Iterator[Tensor]:
    """The tensors of a model that the plan leaves in the files."""
    for module in model.modules():
        stored = getattr(module, "stored", ())
        yield from (t for t in tree_leaves(stored) if isinstance(t, Tensor))
    tables = [m.pos_embed for m in model.modules() if isinstance(m, MMDiT)]
    yield from tables if plan.modulation == "streamed" else ()


def pipeline(transformer: MMDiT) -> Pipeline:
    """A pipeline around a transformer; its other models are shapes only."""
    *encoders, _, vae = blueprint("sd3.5-medium").values()
    pipe = Pipeline([None] * 3, encoders, transformer, vae, Scheduler(3.0))
    pipe.progress = False
    return pipe


def denoising_peak(config: MMDiTConfig, plan: Plan, blocks: int = 0) -> float:
    """GiB of a denoising call with guidance at 1024², weights included.

    Of the steps, which all take the same memory, two are run; with a ControlNet of so
    many ``blocks``.
    """
    model = on_meta(MMDiT, config, plan)
    nets = [control_net(config, blocks)] if blocks else []
    pipe = pipeline(model)
    x = torch.empty(1, 16, 128, 128, device="meta")
    context = torch.empty(2, 333, 4096, device="meta", dtype=torch.bfloat16)
    pooled = torch.empty(2, 2048, device="meta", dtype=torch.bfloat16)
    sigmas = pipe.scheduler.sigmas(28)

    def said(net: ControlNet, x: Tensor, sigma: Tensor) -> list[Tensor]:
        x, level = x.bfloat16(), sigma.expand(len(x)).to(x)
        return controls_of(net, model, x, level, pooled, x)

    every = nn.ModuleList([model, *nets])
    with fused_attention(), Count(every, plan) as count, torch.no_grad():
        answers = pipe.velocity(
            context, pooled, sigmas, [partial(said, n) for n in nets]
        )
        velocity = ClassifierFree(4.5)(answers, sigmas)
        for sigma, following in zip(sigmas[:2], sigmas[1:3], strict=True):
            x = x + (following - sigma) * velocity(x, sigma)
    return count.peak / GIB


def control_net(config: MMDiTConfig, blocks: int) -> ControlNet:
    """A ControlNet of so many blocks on the meta device, bfloat16."""
    with torch.device("meta"):
        return ControlNet(ControlNetConfig.of(config, blocks)).bfloat16()


def t5_peak(where: str, nf4: bool = False) -> float:
    """GiB of T5-XXL encoding two prompts of 256 tokens, weights included."""
    plan = Plan(t5=where, nf4=nf4)
    model = on_meta(T5Encoder, T5Config.t5_xxl(), plan)
    with fused_attention(), Count(model, plan) as count, torch.no_grad():
        model(torch.zeros(2, 256, dtype=torch.long, device="meta"))
    return count.peak / GIB


def vae_peak(work: str, side: int) -> float:
    """GiB of "encode" into, or "decode" of, ``side``² latent pixels, weights too."""
    model = on_meta(VAE, VAEConfig.sd35(), Plan())
    channels, n = (3, 8 * side) if work == "encode" else (16, side)
    x = torch.empty(1, channels, n, n, device="meta", dtype=torch.bfloat16)
    with fused_attention(), Count(model, Plan()) as count, torch.no_grad():
        getattr(model, work)(x)
    return count.peak / GIB


def main() -> None:
    configs = {"Medium": MMDiTConfig.sd35_medium(), "Large": MMDiTConfig.sd35_large()}
    plans = {
        "everything resident": Plan(),
        "AdaLN streamed": STREAMED,
        "AdaLN streamed, fp8 weights": replace(STREAMED, fp8=True),
        "AdaLN streamed, NF4 weights": replace(STREAMED, nf4=True),
    }
    print("denoising, 28 steps, 1024×1024, guidance, bfloat16: GiB counted")
    for name, config in configs.items():
        for what, plan in plans.items():
            print(f"  {name:<8}{what:<30}{denoising_peak(config, plan):6.2f}")
    what, large = "everything resident, ControlNet", configs["Large"]
    print(f"  Large   {what:<30}{denoising_peak(large, Plan(), 19):6.2f}")
    for where in ("resident", "streamed"):
        print(f"  T5-XXL  {where:<30}{t5_peak(where):6.2f}")
    print(f"  T5-XXL  {'resident, NF4 weights':<30}{t5_peak('resident', True):6.2f}")
    for work, side in (("encode", 128), ("decode", 128), ("decode", 64)):
        what = f"{side} latent pixels a side"
        print(f"  {work:<8}{what:<30}{vae_peak(work, side):6.2f}")


if __name__ == "__main__":
    main()
