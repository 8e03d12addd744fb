"""Time minidiff's pipeline against diffusers' on the same tiny weights, on the CPU.

    python benchmarks/pipeline_cpu.py [--model FOLDER] [--threads 2] [--rounds 5]
    python benchmarks/pipeline_cpu.py --threads 1 --processor-time   # beside other work

Both take turns in every round, each in a process of its own, since ``fast=True``
changes how a process keeps its memory: 8 pictures of one prompt, 28 steps, guidance 4,
text and decoding included, the same starting latents; minidiff as ``load`` gives it,
and with ``fast=False`` and ``fast=True``. Printed: the median times, their ratios to
diffusers', and how far the pictures are apart.
"""

import argparse
import functools
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import diffusers
import numpy as np
import torch

from minidiff.engine.loading import load
from minidiff.files.weights import TINY

NAMES = ("diffusers", "minidiff", "minidiff, plain", "minidiff, fast")
FAST = {"minidiff, plain": False, "minidiff, fast": True}
PROMPT = "a red dress on a blue background"


def open_pipeline(name: str, folder: Path, threads: int, processor: bool) -> None:
    """What a process does first: ``RUN`` draws with one of ``NAMES``."""
    global RUN, CLOCK
    CLOCK = time.process_time if processor else time.perf_counter
    torch.set_num_threads(threads)
    pipe = load(folder, fast=FAST.get(name))
    call = {"num_inference_steps": 28, "guidance_scale": 4.0, "output_type": "pt"}
    call |= {"num_images_per_prompt": 8, "latents": pipe.prepare_latents(8)}
    call["max_sequence_length"] = pipe.max_sequence_length
    pipe.progress = False
    RUN = functools.partial(pipe, PROMPT, **call)
    if name == "diffusers":
        kind = diffusers.StableDiffusion3Pipeline
        theirs = kind.from_pretrained(folder, dtype=torch.float32)
        theirs.set_progress_bar_config(disable=True)
        RUN = lambda: theirs(PROMPT, **call).images  # noqa: E731


def draw() -> np.ndarray:
    """The pictures."""
    return RUN().numpy()


def seconds() -> float:
    """The time of one call."""
    start = CLOCK()
    RUN()
    return CLOCK() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, default=TINY)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processor-time", action="store_true")
    options = parser.parse_args()
    how = options.model, options.threads, options.processor_time
    compare(how, options.rounds)


def compare(how: tuple[Path, int, bool], rounds: int) -> None:
    """Time the pipelines as ``how`` says (folder, threads, clock); print the result."""
    fresh = multiprocessing.get_context("spawn")
    workers = {
        name: ProcessPoolExecutor(1, fresh, open_pipeline, (name, *how))
        for name in NAMES
    }
    pictures = {n: w.submit(draw).result() for n, w in workers.items()}  # the warm-up
    times = [
        {name: worker.submit(seconds).result() for name, worker in workers.items()}
        for _ in range(rounds)
    ]
    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}")
    print(f"{how[1]} threads, median of {rounds} rounds; aim: 0.65")
    reference = pictures["diffusers"]
    for name in NAMES:
        middle = statistics.median(t[name] for t in times)
        ratio = statistics.median(t[name] / t["diffusers"] for t in times)
        print(f"{name:15} {middle:.2f} s, {ratio:.3f} of diffusers' time")
        difference = np.linalg.norm(pictures[name] - reference)
        relative = difference / np.linalg.norm(reference)
        print(f"{'':15} its pictures differ from diffusers' by {relative:.1e}")


if __name__ == "__main__":
    main()
