"""The transformer's training step: minidiff against diffusers, in one process.

    python benchmarks/training_step.py [--device cuda] [--batch-size 64] [--rounds 20]
    python benchmarks/training_step.py --eager --profile      # where the time goes
    python benchmarks/training_step.py --device cpu --bfloat16 --ladder  # each change

Both models have the shipped sizes, the same weights and the same batch; both take the
same loss (rectified flow), clip the same gradient norm and use the same fused AdamW.
Both are compiled unless told otherwise. They take turns; a time is the median over the
rounds, after a warm-up, and the ratio the median of the rounds' own ratios. Attention
is PyTorch's choice for diffusers and what ``minidiff train`` chooses for minidiff.
Printed: a table, and the same as one JSON line (in ``--output`` too).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from pathlib import Path

import diffusers
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from minidiff.dit import MMDiT, MMDiTConfig
from minidiff.files.layout import hub_config
from minidiff.files.weights import stored_tensors, transformer_sources
from minidiff.learning.steps import INDUCTOR
from minidiff.recipes.train import attention_to_train
from minidiff.recipes.transformer_stage import plain_attention
from minidiff.training import Batch, transformer_loss

AIM = 1.5


class Diffusers(nn.Module):
    """Their transformer, called as ours is."""

    def __init__(self, ours: MMDiT) -> None:
        super().__init__()
        content = hub_config(ours.config, "SD3Transformer2DModel")
        self.model = SD3Transformer2DModel.from_config(content)
        stored = stored_tensors(ours.state_dict(), transformer_sources)
        self.model.load_state_dict(stored)

    def forward(
        self, x: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor
    ) -> Tensor:
        return self.model(x, context, pooled, 1000 * sigma, return_dict=False)[0]


def make_batch(config: MMDiTConfig, size: int, device: str) -> Batch:
    """Random latents, noise, levels and text features of ``size`` samples."""
    latent = size, config.in_channels, config.sample_size, config.sample_size
    batch = {
        "x0": torch.randn(latent),
        "noise": torch.randn(latent),
        "sigma": torch.rand(size),
        "context": torch.randn(size, 64, config.joint_attention_dim),
        "pooled": torch.randn(size, config.pooled_projection_dim),
    }
    return {name: x.to(device) for name, x in batch.items()}


def random_weights(model: nn.Module) -> None:
    """Give all weights values: new models have gates of zero, which hide the blocks."""
    for parameter in model.parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        nn.init.normal_(parameter, 0, scale)


def make_step(
    model: nn.Module,
    batch: Batch,
    args: argparse.Namespace,
    options: dict[str, object] = INDUCTOR,
) -> Callable[[], Tensor]:
    """One step of training ``model`` on ``batch``; it returns the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

    def loss_of(batch: Batch) -> Tensor:
        with precision(args):
            return transformer_loss(model, batch)

    objective = loss_of if args.eager else torch.compile(loss_of, options=options)

    def step() -> Tensor:
        ours = isinstance(model, MMDiT)
        with attention_to_train(args.device, args.bfloat16) if ours else nullcontext():
            loss = objective(batch)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def precision(args: argparse.Namespace) -> AbstractContextManager:
    """Matrix products in bfloat16, if asked for."""
    kind = args.device.split(":")[0]
    return torch.autocast(kind, torch.bfloat16, enabled=args.bfloat16)


def milliseconds(step: Callable[[], Tensor], count: int) -> float:
    """The time of a step, the mean over ``count``."""
    start = time.perf_counter()
    for _ in range(count):
        loss = step()
    loss.item()  # waits for the device
    return (time.perf_counter() - start) / count * 1000


def take_turns(
    steps: dict[str, Callable], args: argparse.Namespace
) -> dict[str, list[float]]:
    """The milliseconds of each step in each round, after a warm-up."""
    for step in steps.values():
        milliseconds(step, args.warmup)
    rounds = []
    for i in range(args.rounds):
        names = list(steps)[:: 1 if i % 2 else -1]
        rounds.append({n: milliseconds(steps[n], args.count) for n in names})
    return {name: [r[name] for r in rounds] for name in steps}


def compare(steps: dict[str, Callable], args: argparse.Namespace) -> dict:
    """Median times of both and their ratio, taking turns."""
    times = take_turns(steps, args)
    ours, theirs = times["minidiff"], times["diffusers"]
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    return {
        "minidiff_ms": round(statistics.median(ours), 3),
        "diffusers_ms": round(statistics.median(theirs), 3),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_quartiles": [round(q, 3) for q in statistics.quantiles(ratios)[::2]],
    }


def climb(model: MMDiT, batch: Batch, args: argparse.Namespace) -> None:
    """Print the times of the steps that led to ours on a CPU, each with one change."""
    usual, plain = deepcopy(model), plain_attention(deepcopy(model))
    steps = {
        "PyTorch's plain attention": make_step(usual, batch, args, {}),
        "two products in the working dtype": make_step(plain, batch, args, {}),
        "quicker tanh, fused multiply-adds": make_step(deepcopy(plain), batch, args),
    }
    for name, times in take_turns(steps, args).items():
        print(f"| {name} | {statistics.median(times):.0f} |")


def profile(steps: dict[str, Callable], device: str) -> None:
    """Print the operations that take most of three steps."""
    from torch.profiler import ProfilerActivity

    kinds = [ProfilerActivity.CPU]
    kinds += [ProfilerActivity.CUDA] if device.startswith("cuda") else []
    order = f"self_{device.split(':')[0]}_time_total"
    for name, step in steps.items():
        milliseconds(step, 2)
        with torch.profiler.profile(activities=kinds) as found:
            milliseconds(step, 3)
        print(f"\n{name}\n{found.key_averages().table(sort_by=order, row_limit=15)}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--batch-size", type=int, default=512 if cuda else 32)
    parser.add_argument("--threads", type=int, help="of a CPU")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--count", type=int, help="steps each in a round")
    parser.add_argument("--warmup", type=int, default=5, help="steps")
    parser.add_argument("--bfloat16", action=argparse.BooleanOptionalAction)
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--profile", action="store_true", help="only show operations")
    parser.add_argument("--ladder", action="store_true", help="of a CPU, only")
    parser.add_argument("--output", type=Path, help="append the JSON line to a file")
    args = parser.parse_args()
    args.count = args.count or (20 if args.device != "cpu" else 2)
    if args.bfloat16 is None:
        args.bfloat16 = args.device != "cpu"
    on_cpu = args.device == "cpu" and args.bfloat16
    if args.ladder and (args.eager or args.profile or not on_cpu):
        parser.error("--ladder expects --device cpu --bfloat16, no --eager, --profile")
    return args


def main() -> None:
    """Build both, check that they compute the same, measure."""
    args = parse()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    if args.threads:
        torch.set_num_threads(args.threads)
    ours = MMDiT(MMDiTConfig.tiny())
    random_weights(ours)
    batch = make_batch(ours.config, args.batch_size, args.device)
    if args.ladder:
        climb(ours, batch, args)
        return
    if args.device == "cpu" and args.bfloat16:
        plain_attention(ours)
    theirs = Diffusers(ours)
    models = {"minidiff": ours, "diffusers": theirs}
    models = {name: model.to(args.device).train() for name, model in models.items()}
    steps = {name: make_step(model, batch, args) for name, model in models.items()}
    a, b = (step().item() for step in steps.values())
    if abs(a - b) > (1e-2 if args.bfloat16 else 1e-4) * abs(b):
        raise ValueError(f"the first losses are {a} and {b}; expected the same")
    if args.profile:
        profile(steps, args.device)
        return
    report(compare(steps, args), args)


def report(result: dict, args: argparse.Namespace) -> None:
    """Print the table and the JSON line; keep the line if asked."""
    cuda = args.device.startswith("cuda")
    result |= {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "threads": None if cuda else torch.get_num_threads(),
        "batch_size": args.batch_size,
        "matrices": "bfloat16" if args.bfloat16 else "float32",
        "compiled": not args.eager,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    print("| | ms a step | samples/s |\n|---|---|---|")
    for name in ("minidiff", "diffusers"):
        ms = result[f"{name}_ms"]
        print(f"| {name} | {ms:.1f} | {1000 * args.batch_size / ms:.0f} |")
    low, high = result["ratio_quartiles"]
    print(
        f"\nratio {result['ratio']:.2f} (quartiles {low:.2f} and {high:.2f}; ", end=""
    )
    print(f"at least {AIM} is the aim)\n{json.dumps(result)}")
    if args.output:
        with args.output.open("a") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
