"""minidiff and diffusers side by side on one GPU: time, memory, error.

    python benchmarks/gpu.py --output results.jsonl
    python benchmarks/gpu.py --output results.jsonl --stages products --models medium
    python benchmarks/gpu.py --output results.jsonl --models large
    python benchmarks/gpu.py --output rehearsal.jsonl --tiny      # on a CPU

Both codes run in one process on the same random weights and inputs: 1024×1024 pixels,
a batch of two for guidance, 333 text tokens, bfloat16. A time is the median of single
calls between CUDA events after a warm-up. An error or difference is ‖a − b‖ / ‖b‖: of
the stages "step" and "decode" against diffusers in float32, of all others against the
stage's first result. Every result is one JSON line, written as it comes; a stage that
fails is reported and the next one runs. Run again with the same output, it goes on
where it ran out of its ``--budget`` of seconds: with the stages that are not done, and
in "t5", "picture" and "whole" with the calls that are not (a call that failed is not
repeated); stages that an earlier run began come last. ``--models`` leaves out the
stages of other models. It needs diffusers, and minidiff installed or in PYTHONPATH.
"""

import argparse
import gc
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import T5EncoderModel

from minidiff.dit import MMDiT, MMDiTConfig
from minidiff.efficiency import quantize
from minidiff.engine.fast import (
    CompiledMMDiT,
    FastDecoder,
    FastMMDiT,
    attention_backend,
    has_fp8_products,
    pixel_attention,
)
from minidiff.engine.kernels import quantize_rows
from minidiff.engine.loading import TOKENIZERS, blueprint, load, read_tokenizers
from minidiff.engine.memory import Plan, place_part, to_float8
from minidiff.files.layout import hub_config
from minidiff.files.weights import (
    TINY,
    Rename,
    join_stored,
    load_component,
    prepare_component,
    save_component,
    transformer_sources,
    vae_sources,
)
from minidiff.flow_matching import Scheduler
from minidiff.learning.run import read_log
from minidiff.sampling import Pipeline
from minidiff.text_encoders import T5Config, T5Encoder
from minidiff.tokenizer import Tokenizer
from minidiff.vae import VAE

MODELS = {"medium": MMDiTConfig.sd35_medium(), "large": MMDiTConfig.sd35_large()}
TINY_MODEL = replace(
    MMDiTConfig.tiny(), num_layers=3, dual_attention_layers=(0,), pos_embed_max_size=16
)


@dataclass
class Bench:
    """Where results go, how much time is left, and the sizes to run."""

    output: Path
    deadline: float
    device: torch.device
    tiny: bool
    repetitions: int
    folder: Path
    compile: bool = True
    skipped: bool = False  # whether a call of this stage was, for want of time

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    @property
    def pixels(self) -> int:
        return 32 if self.tiny else 1024

    @property
    def latent(self) -> int:
        return 8 if self.tiny else 128

    @property
    def text(self) -> int:
        return 7 if self.tiny else 333

    @property
    def float8(self) -> bool:
        """Whether the device multiplies in fp8."""
        return self.device.type != "cuda" or has_fp8_products(self.device)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def emit(self, **record: Any) -> None:
        """Append one result as a JSON line, and print it."""
        self.skipped |= "skipped" in record
        line = json.dumps(record)
        with self.output.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def time(self, call: Callable[..., Any], *inputs: Any, warm_up: int = 2) -> float:
        """Median milliseconds of ``call(*inputs)``, after ``warm_up`` calls."""
        for _ in range(warm_up):
            call(*inputs)
        self.synchronize()
        times = []
        for _ in range(self.repetitions):
            if self.device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                # Half a millisecond, in which the host launches a short kernel
                torch.cuda._sleep(1_000_000)
                start.record()
                call(*inputs)
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end))
            else:
                begin = time.perf_counter()
                call(*inputs)
                times.append(1000 * (time.perf_counter() - begin))
        return statistics.median(times)

    def host_ms(self, call: Callable[[], Any]) -> float:
        """Milliseconds until the call returns, the GPU still at work."""
        self.synchronize()
        begin = time.perf_counter()
        call()
        taken = 1000 * (time.perf_counter() - begin)
        self.synchronize()
        return taken


def told(problem: Exception) -> str:
    """The beginning of what is wrong."""
    return f"{type(problem).__name__}: {problem}"[:300]


def error(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm()).item()


def random_weights(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Fill a module from the meta device: signals keep their size through a layer."""
    module.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if value.is_floating_point():
            value.data.normal_(generator=generator)
            if value.ndim > 1:
                fan = 1 if name.endswith("pos_embed") else value[0].numel()
                value.data.mul_(fan**-0.5)
            else:
                value.data.mul_(0.1)
                if ("norm" in name or ".ln_" in name) and name.endswith("weight"):
                    value.data.add_(1)


def converted(model: nn.Module, state: dict[str, Tensor], rename: Rename) -> nn.Module:
    """Give ``model``, on the meta device, a diffusers model's tensors."""
    expected = model.state_dict()
    device = next(iter(state.values())).device
    ours = {
        name: join_stored(state.__getitem__, source, expected[name].shape, device, None)
        for name, source in rename(expected).items()
    }
    model.load_state_dict(ours, assign=True)
    return model.eval().requires_grad_(False)


def pair(
    bench: Bench, theirs: type, ours: type, config: Any, rename: Rename
) -> tuple[nn.Module, nn.Module]:
    """The same random weights in diffusers' class ``theirs`` and in ``ours``."""
    with torch.device("meta"):
        reference = theirs.from_config(hub_config(config, theirs.__name__))
        model = ours(config)
    random_weights(reference, bench.device, bench.dtype)
    reference.eval().requires_grad_(False)
    return reference, converted(model, reference.state_dict(), rename)


def transformers(bench: Bench, name: str) -> tuple[nn.Module, nn.Module]:
    config = model_config(bench, name)
    return pair(bench, SD3Transformer2DModel, MMDiT, config, transformer_sources)


def autoencoders(bench: Bench) -> tuple[nn.Module, nn.Module]:
    config = blueprints(bench)["vae"].config
    return pair(bench, AutoencoderKL, VAE, config, vae_sources)


def model_config(bench: Bench, name: str) -> MMDiTConfig:
    return TINY_MODEL if bench.tiny else MODELS[name]


def blueprints(bench: Bench) -> dict[str, nn.Module]:
    """A pipeline's models on the meta device."""
    return blueprint("tiny" if bench.tiny else "sd3.5-medium")


def random(bench: Bench, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.randn(shape, device=bench.device, dtype=dtype or bench.dtype)


def profile(bench: Bench, what: str, call: Callable[[], Any]) -> None:
    """The kernels that take most of one call."""
    if bench.device.type != "cuda":
        return
    activity = torch.profiler.ProfilerActivity.CUDA
    try:
        call()
        with torch.profiler.profile(activities=[activity]) as result:
            call()
            torch.cuda.synchronize()
    except Exception as problem:  # the figures that follow need no profile
        bench.emit(stage="profile", what=what, failed=told(problem))
        return
    rows = sorted(result.key_averages(), key=lambda r: -r.self_device_time_total)
    kernels = [
        [r.key[:90], r.count, round(r.self_device_time_total / 1000, 3)]
        for r in rows[:24]
    ]
    total = sum(r.self_device_time_total for r in rows) / 1000
    bench.emit(stage="profile", what=what, total_ms=round(total, 2), kernels=kernels)


# Stages


def card(bench: Bench, models: list[str]) -> None:
    """The card's name and its two ceilings."""
    record = {"torch": torch.__version__, "python": sys.version.split()[0]}
    if bench.device.type == "cuda":
        record["card"] = torch.cuda.get_device_name()
        record["cudnn"] = torch.backends.cudnn.version()
        record["memory_gib"] = torch.cuda.get_device_properties(0).total_memory / 2**30
        record["fp8_products"] = bench.float8
    side = 256 if bench.tiny else 8192
    a, b = random(bench, side, side), random(bench, side, side)
    ms = bench.time(lambda: a @ b)
    record["matrix_tflops"] = 2 * side**3 / ms / 1e9
    c = torch.empty(8, side, side, device=bench.device)
    d = torch.empty_like(c)
    ms = bench.time(lambda: c.copy_(d))
    record["copy_gb_s"] = 2 * c.numel() * 4 / ms / 1e6
    bench.emit(stage="card", **record)


def products(bench: Bench, models: list[str]) -> None:
    """Rates of the transformer's matrix products: bf16, with GELU, fp8."""
    rows = 64 if bench.tiny else 2 * 4096
    for name in models:
        width = model_config(bench, name).width
        shapes = {
            "qkv": (width, 3 * width),
            "proj": (width, width),
            "fc1": (width, 4 * width),
            "fc2": (4 * width, width),
        }
        for kind, (inputs, outputs) in shapes.items():
            x, w = random(bench, rows, inputs), random(bench, outputs, inputs)
            bias = random(bench, outputs)
            flop = 2 * rows * inputs * outputs / 1e9
            times = {"addmm": bench.time(torch.addmm, bias, x, w.t())}
            if kind == "fc1":
                times["addmm, then gelu"] = bench.time(gelu_after, bias, x, w)
                times["gelu inside"] = bench.time(gelu_inside, bias, x, w)
            if bench.device.type == "cuda" and bench.float8:
                times |= float8_times(bench, x, w, bias)
            rates = {k: [round(t, 4), round(flop / t, 1)] for k, t in times.items()}
            bench.emit(stage="products", model=name, kind=kind, ms_and_tflops=rates)


def gelu_after(bias: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return F.gelu(torch.addmm(bias, x, w.t()), approximate="tanh")


def gelu_inside(bias: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return torch._addmm_activation(bias, x, w.t(), use_gelu=True)


def float8_times(bench: Bench, x: Tensor, w: Tensor, bias: Tensor) -> dict[str, float]:
    """Milliseconds of fp8 products with a scale per row and with one scale."""
    rows, weights = quantize(x), quantize(w)
    one = torch.ones((), device=x.device)

    def product(a: Tensor, b: Tensor, fast: bool) -> Tensor:
        return torch._scaled_mm(
            rows.values, weights.values.t(), a, b, bias=bias,
            out_dtype=x.dtype, use_fast_accum=fast,
        )  # fmt: skip

    scales = rows.scale, weights.scale.t()
    return {
        "fp8 rows": bench.time(lambda: product(*scales, True)),
        "fp8 rows, exact sums": bench.time(lambda: product(*scales, False)),
        "fp8 one scale": bench.time(lambda: product(one, one, True)),
        "quantize rows": bench.time(lambda: quantize_rows(x)),
    }


def attention(bench: Bench, models: list[str]) -> None:
    """Rates of joint attention by backend and by layout in memory."""
    length = 24 if bench.tiny else 4096 + 333
    for name in models:
        heads = model_config(bench, name).num_attention_heads
        width = model_config(bench, name).attention_head_dim
        order = (2, 0, 3, 1, 4)
        layouts = {
            "B H L d": random(bench, 3, 2, heads, length, width),
            "B L H d": random(bench, 3, 2, length, heads, width).transpose(2, 3),
            "B L 3 H d": random(bench, 2, length, 3, heads, width).permute(order),
            "L B 3 H d": random(bench, length, 2, 3, heads, width).permute(
                2, 1, 3, 0, 4
            ),
        }
        flop = 4 * 2 * heads * length**2 * width / 1e9
        for layout, qkv in layouts.items():
            for backend in (None, "flash", "cudnn"):
                try:
                    with attention_backend(backend):
                        ms = bench.time(F.scaled_dot_product_attention, *qkv)
                        out = F.scaled_dot_product_attention(*qkv)
                except RuntimeError as problem:
                    which = {"model": name, "layout": layout, "backend": backend}
                    bench.emit(stage="attention", **which, failed=told(problem))
                    continue
                bench.emit(
                    stage="attention", model=name, layout=layout, backend=backend,
                    ms=round(ms, 4), tflops=round(flop / ms, 1),
                    out_strides=list(out.stride()),
                )  # fmt: skip


def free() -> None:
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def step_inputs(bench: Bench, config: MMDiTConfig) -> tuple[Tensor, ...]:
    """Latents, noise level, context and pooled text of a guided step."""
    return (
        random(bench, 2, 16, bench.latent, bench.latent),
        torch.full((2,), 0.7, device=bench.device),
        random(bench, 2, bench.text, config.joint_attention_dim),
        random(bench, 2, config.pooled_projection_dim),
    )


def step(bench: Bench, name: str) -> None:
    """One denoising step, rung by rung, with each rung's error."""
    torch.manual_seed(0)
    theirs, ours = transformers(bench, name)
    latents, sigma, context, pooled = step_inputs(bench, ours.config)

    def diffusers_step(model: SD3Transformer2DModel = theirs) -> Tensor:
        like = next(model.parameters()).dtype
        inputs = [t.to(like) for t in (latents, context, pooled)]
        return model(*inputs, timestep=1000 * sigma, return_dict=False)[0]

    baseline: dict[str, float] = {}

    def ratio(ms: float, rung: str) -> float | None:
        return round(ms / baseline[rung], 4) if rung in baseline else None

    def run(rung: str, call: Callable[[], Tensor], note: str = "") -> None:
        if bench.left() < 10:
            bench.emit(stage="step", model=name, rung=rung, skipped="out of time")
            return
        try:
            begin = time.perf_counter()
            call()
            bench.synchronize()
            first = time.perf_counter() - begin
            ms = bench.time(call)
            baseline.setdefault(rung, ms)
            bench.emit(
                stage="step", model=name, rung=rung, ms=round(ms, 3),
                to_eager=ratio(ms, "diffusers"),
                to_compiled=ratio(ms, "diffusers compiled"),
                host_ms=round(bench.host_ms(call), 2), first_s=round(first, 2),
                error=None if reference is None else error(call(), reference),
                note=note,
            )  # fmt: skip
        except Exception as problem:
            bench.emit(stage="step", model=name, rung=rung, failed=told(problem))
            traceback.print_exc()

    with torch.inference_mode(False), torch.no_grad():
        reference = float32_reference(bench, theirs, diffusers_step)
        ahead = ours.modulations(sigma, pooled)
        given = (latents, None, context, None)
        run("diffusers", diffusers_step)
        run("plain", lambda: ours(latents, sigma, context, pooled))
        run("plain, ahead", lambda: ours(*given, modulations=ahead))
        for backend in ("flash", "cudnn"):
            with attention_backend(backend):
                run(f"plain, ahead, {backend}", lambda: ours(*given, modulations=ahead))
                run(f"diffusers, {backend}", diffusers_step)
            fast = FastMMDiT.of(ours, attention=backend)
            run(f"fast, {backend}", lambda f=fast: f(*given, modulations=ahead))
        profile(bench, f"{name} fast cudnn", lambda: fast(*given, modulations=ahead))
        if bench.compile and bench.left() > 50:
            for block in theirs.transformer_blocks:
                block.compile()
            run("diffusers compiled", diffusers_step, "each block")
            profile(bench, f"{name} diffusers compiled", diffusers_step)
            ours = CompiledMMDiT.of(ours)
            with attention_backend("cudnn"):
                run("plain compiled, cudnn", lambda: ours(*given, modulations=ahead))
            run("fast, again", lambda: fast(*given, modulations=ahead))
            other = (latents[..., :-2], None, context[:, :-2], None)
            begin = time.perf_counter()
            with attention_backend("cudnn"):
                ours(*other, modulations=ahead)
            bench.synchronize()
            bench.emit(
                stage="step", model=name, rung="plain compiled, another size",
                first_s=time.perf_counter() - begin,
            )  # fmt: skip
        elif bench.compile:
            bench.skipped = True
        for block in ours.joint_blocks:
            block._compiled_call_impl = None
        to_float8(ours)
        free()
        fast = FastMMDiT.of(ours, attention="cudnn")
        run("fast, fp8 weights", lambda: fast(*given, modulations=ahead))
        if bench.float8:
            fast = FastMMDiT.of(ours, fp8=True, attention="cudnn")
            run("fast, fp8 products", lambda: fast(*given, modulations=ahead))
            profile(bench, f"{name} fast fp8", lambda: fast(*given, modulations=ahead))


def float32_reference(
    bench: Bench, model: nn.Module, step: Callable[[], Tensor]
) -> Tensor | None:
    """The step in float32 products and sums; None where the card does not hold it."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    try:
        model.float()
        return step()
    except torch.OutOfMemoryError:
        return None
    finally:
        model.to(bench.dtype)
        free()


def decode(bench: Bench, models: list[str]) -> None:
    """The decoder, rung by rung."""
    theirs, ours = autoencoders(bench)
    latents = random(bench, 1, 16, bench.latent, bench.latent)

    def diffusers_decode(model: AutoencoderKL = theirs) -> Tensor:
        z = latents.to(next(model.parameters()).dtype)
        return model.decode(z, return_dict=False)[0]

    with torch.no_grad():
        reference = float32_reference(bench, theirs, diffusers_decode)
        base: list[float] = []

        def run(rung: str, call: Callable[[], Tensor]) -> None:
            try:
                measured(rung, call)
            except Exception as problem:
                bench.emit(stage="decode", rung=rung, failed=told(problem))
                traceback.print_exc()

        def measured(rung: str, call: Callable[[], Tensor]) -> None:
            begin = time.perf_counter()
            call()
            bench.synchronize()
            first = time.perf_counter() - begin
            ms = bench.time(call)
            if rung == "diffusers":
                base.append(ms)
            peak = None
            if bench.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                call()
                peak = round((torch.cuda.max_memory_allocated() - before) / 2**30, 3)
            bench.emit(
                stage="decode", rung=rung, ms=round(ms, 3),
                to_eager=round(ms / base[0], 4) if base else None,
                first_s=round(first, 2),
                host_ms=round(bench.host_ms(call), 2), peak_gib=peak,
                error=None if reference is None else error(call(), reference),
            )  # fmt: skip

        run("diffusers", diffusers_decode)
        run("plain", lambda: ours.decode(latents))
        theirs.to(memory_format=torch.channels_last)
        run("diffusers, channels last", diffusers_decode)
        for fold in (False, True):
            fast = FastDecoder.of(ours.decoder, fold)
            run(f"fast, fold={fold}", lambda f=fast: f(latents))
        profile(bench, "decode fast", lambda: fast(latents))
        with torch.backends.cudnn.flags(True, benchmark=True, allow_tf32=False):
            run("fast, cudnn search", lambda: fast(latents))
            profile(bench, "decode fast, cudnn search", lambda: fast(latents))
            run("diffusers, channels last, cudnn search", diffusers_decode)
        if bench.compile and bench.left() > 150:
            theirs.decoder.compile()
            run("diffusers compiled, channels last", diffusers_decode)
        elif bench.compile:
            bench.skipped = True


def convolutions(bench: Bench, models: list[str]) -> None:
    """The decoder's largest convolutions, and its one attention."""
    side, last = bench.pixels, torch.channels_last
    cases = [(128, 128, side), (256, 256, side // 2), (512, 512, side // 4)]
    for inputs, outputs, size in cases:
        x = random(bench, 1, inputs, size, size).to(memory_format=last)
        w = random(bench, outputs, inputs, 3, 3).to(memory_format=last)
        flop = 2 * 9 * inputs * outputs * size**2 / 1e9
        for search in (False, True):
            torch.backends.cudnn.benchmark = search
            ms = bench.time(F.conv2d, x, w, None, 1, 1)
            bench.emit(
                stage="convolutions", channels=inputs, side=size, search=search,
                ms=round(ms, 4), tflops=round(flop / ms, 1),
            )  # fmt: skip
        torch.backends.cudnn.benchmark = False
    tokens, width = (bench.latent**2, 32 if bench.tiny else 512)
    q, k, v = random(bench, 3, 1, tokens, width)
    one_head = [x[:, None] for x in (q, k, v)]  # the fused forms want four axes
    whole = bench.time(F.scaled_dot_product_attention, *one_head)

    def chunks() -> Tensor:
        return torch.cat([pixel_attention(p, k, v) for p in q.split(2048, 1)], 1)

    bench.emit(
        stage="convolutions", pixel_attention_ms=bench.time(chunks), sdpa_ms=whole
    )


# Files, memory, whole pictures


def write_transformer(bench: Bench, name: str) -> Path:
    """A transformer of random weights in the hub's layout: its folder."""
    folder = bench.folder / name
    if (folder / "config.json").is_file():  # written last
        return folder
    begin = time.perf_counter()
    with torch.device("meta"):
        model = MMDiT(model_config(bench, name))
    random_weights(model, bench.device, bench.dtype)
    save_component(model, folder, "SD3Transformer2DModel")
    bench.emit(stage="files", model=name, seconds=time.perf_counter() - begin)
    return folder


def anonymous_gib() -> float:
    """This process's memory that no file backs."""
    status = Path("/proc/self/status")  # of Linux
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 2**20
    return float("nan")


class Watch:
    """The largest ``anonymous_gib`` above the start while the block runs."""

    def __enter__(self) -> "Watch":
        self.start, self.peak, self.on = anonymous_gib(), 0.0, True
        self.thread = threading.Thread(target=self.look)
        self.thread.start()
        self.begin = time.perf_counter()
        return self

    def look(self) -> None:
        while self.on:
            self.peak = max(self.peak, anonymous_gib() - self.start)
            time.sleep(0.01)

    def __exit__(self, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.begin
        self.on = False
        self.thread.join()


def loading(bench: Bench, name: str) -> None:
    """Files in the page cache to weights on the device: diffusers, then ours."""
    folder = write_transformer(bench, name)
    free()

    def diffusers_load() -> nn.Module:
        kwargs = {"torch_dtype": bench.dtype, "low_cpu_mem_usage": True}
        return SD3Transformer2DModel.from_pretrained(folder, **kwargs).to(bench.device)

    def diffusers_map() -> nn.Module:
        kwargs = {"torch_dtype": bench.dtype, "device_map": str(bench.device)}
        return SD3Transformer2DModel.from_pretrained(folder, **kwargs)

    def ours() -> nn.Module:
        return load_component(MMDiT, MMDiTConfig, folder, bench.device, bench.dtype)

    for what, call in (
        ("ours", ours),
        ("diffusers, .to", diffusers_load),
        ("diffusers, device_map", diffusers_map),
        ("ours", ours),
        ("diffusers, .to", diffusers_load),
    ):
        free()
        with Watch() as watch:
            model = call()
        del model
        bench.emit(
            stage="load", model=name, what=what, seconds=round(watch.seconds, 3),
            anonymous_gib=round(watch.peak, 3),
        )  # fmt: skip


def pipeline(bench: Bench, transformer: nn.Module, vae: nn.Module) -> Pipeline:
    """A pipeline whose text encoders are names only."""
    encoders = [*blueprints(bench).values()][:3]
    pipe = Pipeline([None] * 3, encoders, transformer, vae, Scheduler(3.0))
    pipe.progress = False
    return pipe


def memory(bench: Bench, name: str) -> None:
    """Peak memory, time and error of a whole denoising call under each plan."""
    folder = write_transformer(bench, name)
    free()
    config = model_config(bench, name)
    torch.manual_seed(1)
    latents = random(bench, 1, 16, bench.latent, bench.latent, dtype=torch.float32)
    context = random(bench, 2, bench.text, config.joint_attention_dim)
    pooled = random(bench, 2, config.pooled_projection_dim)
    streamed = Plan("streamed", "streamed", "streamed")
    cases: list[tuple[str, Plan, bool | None]] = [
        ("plain, everything resident", Plan(), None),
        ("everything resident", Plan(), False),
        ("AdaLN streamed", streamed, False),
        ("AdaLN streamed, fp8 weights", replace(streamed, fp8=True), False),
    ]
    if bench.float8:
        cases.append(("AdaLN streamed, fp8 products", cases[-1][1], True))
    plain, vae = None, blueprints(bench)["vae"]
    for what, plan, fp8 in cases:
        if bench.left() < 15:
            bench.emit(stage="memory", model=name, what=what, skipped="out of time")
            continue
        free()
        model = place_part(
            prepare_component(MMDiT, MMDiTConfig, folder),
            plan,
            bench.device,
            bench.dtype,
        )
        model.requires_grad_(False)
        if fp8 is not None:
            model = FastMMDiT.of(model, fp8)
        pipe = pipeline(bench, model, vae)
        steps = 2 if bench.tiny else 28
        seconds = []
        for _ in range(2):
            if bench.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            begin = time.perf_counter()
            out = pipe.denoise(latents, context, pooled, steps, 4.5)
            bench.synchronize()
            seconds.append(time.perf_counter() - begin)
        plain = out if plain is None else plain
        peak = 0.0
        if bench.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**30
        bench.emit(
            stage="memory", model=name, what=what, plan=str(plan),
            peak_gib=round(peak, 3), seconds=round(seconds[-1], 3),
            first_s=round(seconds[0], 3), error=error(out, plain),
        )  # fmt: skip
        del pipe, model
    if not bench.skipped:
        shutil.rmtree(folder)


PROMPT = "a red dress on a blue background"
COMPILED = "diffusers compiled whole"
OURS = {
    "plain": {},
    "fast": {"fast": True},
    "fast, compile": {"fast": True, "compile": True},
    "fast, fp8": {"fast": True, "fp8": True},
}


def longer(tokenizer: Tokenizer, length: int) -> Tokenizer:
    """The same tokenizer for prompts of up to ``length`` tokens."""
    tokenizer.settings = tokenizer.settings._replace(model_max_length=length)
    tokenizer.model_max_length = length
    return tokenizer


def write_pipeline(bench: Bench, name: str) -> Path:
    """A whole pipeline of random weights in the hub's layout: its folder.

    The tokenizers are the small model's; their ids are rows of the large tables too.
    """
    folder = bench.folder / f"{name}-pipeline"
    if (folder / "model_index.json").is_file():
        return folder
    begin = time.perf_counter()
    tokenizers = read_tokenizers(TINY, TOKENIZERS)
    if not bench.tiny:
        lengths = 77, 77, 512
        tokenizers = [longer(t, n) for t, n in zip(tokenizers, lengths, strict=True)]
    parts = blueprints(bench)
    with torch.device("meta"):
        parts["transformer"] = MMDiT(model_config(bench, name))
    for model in parts.values():
        random_weights(model, bench.device, bench.dtype)
    *encoders, transformer, vae = parts.values()
    pipe = Pipeline(tokenizers, encoders, transformer, vae, Scheduler(3.0))
    pipe.save_pretrained(folder)
    seconds = round(time.perf_counter() - begin, 1)
    bench.emit(stage="files", model=folder.name, seconds=seconds)
    return folder


def measure(
    bench: Bench, call: Callable[[], Tensor]
) -> tuple[dict[str, float], Tensor]:
    """Seconds of the first call and of later ones, peak GiB; and what came out."""
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    out = call()
    bench.synchronize()
    found = {"first_s": round(time.perf_counter() - begin, 3)}
    repeated = replace(bench, repetitions=min(3, bench.repetitions))
    found["seconds"] = round(repeated.time(call, warm_up=0) / 1000, 5)
    if bench.device.type == "cuda":
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
    return found, out


class Compare:
    """Runs calls of one stage, each beside the first and beside ``COMPILED``."""

    def __init__(self, bench: Bench, **record: Any) -> None:
        self.bench, self.record = bench, record
        self.first: Tensor | None = None
        self.seconds: dict[str, float] = {}
        self.known = {
            found["what"]: found["seconds"]
            for found in read_log(bench.output)
            if record.items() <= found.items() and {"what", "seconds"} <= found.keys()
        }

    def __call__(self, what: str, call: Callable[[], Tensor], need: float = 20) -> None:
        """Measure and emit, where ``need`` seconds are left.

        What an earlier run has measured is not measured again, but for the first call,
        with whose result the others are compared.
        """
        if self.first is not None and what in self.known:
            self.seconds[what] = self.known[what]
            return
        if self.bench.left() < need:
            self.bench.emit(**self.record, what=what, skipped="out of time")
            return
        try:
            found, out = measure(self.bench, call)
        except Exception as problem:
            self.bench.emit(**self.record, what=what, failed=told(problem))
            traceback.print_exc()
            return
        self.first = out if self.first is None else self.first
        self.seconds[what] = now = found["seconds"]
        ratios = {
            f"to {name}": round(now / self.seconds[name], 4)
            for name in ("diffusers", COMPILED)
            if name in self.seconds
        }
        difference = error(out, self.first)
        self.bench.emit(
            **self.record, what=what, **found, **ratios, difference=difference
        )


def t5(bench: Bench, models: list[str]) -> None:
    """T5 from its file, on the device or layer by layer: two prompts."""
    folder = write_pipeline(bench, "medium") / "text_encoder_3"
    free()
    length, vocabulary = (7, 100) if bench.tiny else (256, 32000)
    ids = torch.randint(vocabulary, (2, length), device=bench.device)
    compare = Compare(bench, stage="t5")
    with torch.no_grad():
        model = T5EncoderModel.from_pretrained(folder, dtype=bench.dtype)
        model = model.to(bench.device).eval()
        compare("transformers", lambda m=model: m(ids)[0])
        del model
        for what in ("resident", "streamed"):
            free()
            prepared = prepare_component(T5Encoder, T5Config, folder)
            model = place_part(prepared, Plan(t5=what), bench.device, bench.dtype)
            compare(what, lambda m=model: m(ids))
            del model, prepared


def picture(bench: Bench, name: str) -> None:
    """From the prompt to pixels, everything included.

    diffusers keeps the latents in bfloat16 between steps, we in float32: the difference
    is no error. Only "step" compiles from nothing: here the compiler's cache may help.
    """
    folder = write_pipeline(bench, name)
    free()
    config = model_config(bench, name)
    shape = 1, config.in_channels, bench.latent, bench.latent
    call = {
        "prompt": PROMPT,
        "negative_prompt": "",
        "num_inference_steps": 2 if bench.tiny else 28,
        "guidance_scale": 4.5,
        "latents": random(bench, *shape, dtype=torch.float32),
        "max_sequence_length": 32 if bench.tiny else 256,
        "output_type": "pt",
    }
    compare = Compare(bench, stage="picture", model=name)
    theirs = StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=bench.dtype)
    if theirs.dtype != bench.dtype:  # versions differ in the argument's name
        raise RuntimeError(f"diffusers loaded {theirs.dtype}; expected {bench.dtype}")
    theirs = theirs.to(bench.device)
    theirs.set_progress_bar_config(disable=True)
    compare("diffusers", lambda p=theirs: p(**call).images)
    if bench.compile:
        theirs.transformer.compile()
        theirs.vae.to(memory_format=torch.channels_last)
        theirs.vae.decoder.compile()
        need = 10 if bench.tiny else 250 if name == "large" else 150
        compare(COMPILED, lambda p=theirs: p(**call).images, need)
    del theirs
    for what, settings in OURS.items():
        free()
        if what in compare.known or ("compile" in settings and not bench.compile):
            continue
        if bench.left() < (5 if bench.tiny else 60):
            bench.emit(stage="picture", model=name, what=what, skipped="out of time")
            continue
        pipe = load(folder, bench.device, bench.dtype, **settings)
        pipe.progress = False
        compare(what, lambda p=pipe: p(**call))
        del pipe
    if not bench.skipped:
        shutil.rmtree(folder)


def whole(bench: Bench, name: str) -> None:
    """One denoising step beside diffusers' transformer compiled as a whole."""
    torch.manual_seed(0)
    theirs, ours = transformers(bench, name)
    latents, sigma, context, pooled = step_inputs(bench, ours.config)

    def diffusers_step() -> Tensor:
        return theirs(latents, context, pooled, 1000 * sigma, return_dict=False)[0]

    compare = Compare(bench, stage="whole", model=name)
    with torch.no_grad():
        ahead = ours.modulations(sigma, pooled)
        given = latents, None, context, None
        fast = FastMMDiT.of(ours)
        compare("diffusers", diffusers_step)
        compare("fast", lambda: fast(*given, modulations=ahead))
        if bench.compile:
            theirs.compile()
            compare(COMPILED, diffusers_step, need=150)
            ours = CompiledMMDiT.of(ours)
            with attention_backend("cudnn"):
                compiled = lambda: ours(*given, modulations=ahead)  # noqa: E731
                compare("compiled, each block", compiled, need=60)
            compare("fast, again", lambda: fast(*given, modulations=ahead))


STAGES = {
    "card": card,
    "attention": attention,
    "products": products,
    "step-medium": lambda bench, models: step(bench, "medium"),
    "decode": decode,
    "step-large": lambda bench, models: step(bench, "large"),
    "load-medium": lambda bench, models: loading(bench, "medium"),
    "memory-medium": lambda bench, models: memory(bench, "medium"),
    "load-large": lambda bench, models: loading(bench, "large"),
    "memory-large": lambda bench, models: memory(bench, "large"),
    "t5": t5,
    "picture-medium": lambda bench, models: picture(bench, "medium"),
    "picture-large": lambda bench, models: picture(bench, "large"),
    "whole-medium": lambda bench, models: whole(bench, "medium"),
    "whole-large": lambda bench, models: whole(bench, "large"),
    "convolutions": convolutions,
}
NEEDS = {  # seconds, for those that compile, or first write or read many gigabytes
    "step-medium": 180,
    "step-large": 200,
    "decode": 200,
    "whole-medium": 200,
    "whole-large": 300,
    "load-large": 120,
    "memory-large": 150,
    "t5": 120,
    "picture-medium": 200,
    "picture-large": 400,
}


def chosen(stages: list[str], models: list[str]) -> list[str]:
    """Those of ``stages`` that are not named after a model that is not asked for."""
    others = tuple(f"-{name}" for name in MODELS.keys() - models)
    return [stage for stage in stages if not stage.endswith(others)]


def waiting(output: Path, stages: list[str]) -> list[str]:
    """Those of ``stages`` that no earlier run has done; what one began comes last."""
    log = read_log(output)
    done, begun = ({r["stage"] for r in log if r.get(k)} for k in ("done", "begun"))
    return sorted((s for s in stages if s not in done), key=lambda s: s in begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--budget", type=float, default=3600, help="seconds")
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="small sizes, on the CPU")
    parser.add_argument("--no-compile", action="store_true")
    roots = filter(os.path.isdir, ("/dev/shm", tempfile.gettempdir()))
    places = [Path(root, "minidiff") for root in roots]
    weights = max(places, key=lambda p: (p.is_dir(), shutil.disk_usage(p.parent).free))
    parser.add_argument("--folder", type=Path, default=weights, help="for weights")
    options = parser.parse_args()
    bench = Bench(
        options.output,
        time.monotonic() + options.budget,
        torch.device("cpu" if options.tiny else "cuda"),
        options.tiny,
        2 if options.tiny else options.repetitions,
        options.folder,
        not options.no_compile,
    )
    torch._dynamo.config.recompile_limit = 64  # for both, as ``CompiledMMDiT`` does
    gc.freeze()  # the modules stay, and ``free`` need not go through them
    for rest in bench.folder.rglob(".*.part"):  # of a write that was killed
        rest.unlink()
    for name in waiting(options.output, chosen(options.stages, options.models)):
        if bench.left() < (5 if bench.tiny else NEEDS.get(name, 5)):
            bench.emit(stage=name, skipped="out of time")
            continue
        begin, bench.skipped, failed = time.monotonic(), False, False
        bench.emit(stage=name, begun=True)
        try:
            free()
            STAGES[name](bench, options.models)
        except Exception as problem:
            traceback.print_exc()
            failed = told(problem)
            bench.emit(stage=name, failed=failed)
        seconds = round(time.monotonic() - begin, 1)
        bench.emit(stage=name, done=not (failed or bench.skipped), seconds=seconds)
    if not waiting(options.output, list(STAGES)):
        for name in MODELS:
            shutil.rmtree(bench.folder / name, ignore_errors=True)
            shutil.rmtree(bench.folder / f"{name}-pipeline", ignore_errors=True)


if __name__ == "__main__":
    main()
