"""Full-size Medium of random weights on a CPU: minidiff beside diffusers, bfloat16.

    PYTHONPATH=. python benchmarks/full_size_cpu.py --folder FOLDER --rounds 2
    PYTHONPATH=. python benchmarks/full_size_cpu.py --folder FOLDER --tiny

FOLDER gets the published layout: every part and every tensor of SD3.5 Medium, 16 GB
in bfloat16, written where it is not there yet. Then one picture of 256 × 256, 3 steps
with guidance, from the prompt to the pixels. Each drawing has a process of its own, for
only one pipeline fits into memory, and the pipelines take turns in every round. The
error is ‖a − b‖ / ‖b‖ of the pictures, to those of float32, which are drawn last: there
weights that are seldom read stay in the files. Each result is printed as it comes; the
process that draws needs about 20 GB.
"""

import argparse
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import error, longer, random_weights
from minidiff.engine.loading import TOKENIZERS, blueprint, load, read_tokenizers
from minidiff.files.disk import write_json
from minidiff.files.layout import INDEX, MODELS, pipeline_index, save_scheduler
from minidiff.files.weights import TINY, save_component
from minidiff.flow_matching import Scheduler
from minidiff.sampling import starting_noise

PROMPT = "a lighthouse in a storm, oil on canvas"
OURS: dict[str, dict[str, Any]] = {
    "minidiff": {"dtype": torch.bfloat16},
    "minidiff, fast": {"dtype": torch.bfloat16, "fast": True},
    "float32": {
        "dtype": torch.float32,
        "t5": "streamed",
        "clip": "streamed",
        "modulation": "streamed",
        "fast": False,
    },
}
TURNS = ("diffusers", "minidiff", "minidiff, fast")


def write(folder: Path, tiny: bool) -> None:
    """The published layout with random weights, a part at a time.

    The tokenizers are the small model's; their ids are rows of the large tables too.
    """
    if (folder / INDEX).is_file():  # written last
        return
    for name, model in blueprint("tiny" if tiny else "sd3.5-medium").items():
        random_weights(model, torch.device("cpu"), torch.bfloat16)
        save_component(model, folder / name, MODELS[name])
        model.to("meta")
    lengths = (None, None, None) if tiny else (77, 77, 512)
    readers = read_tokenizers(TINY, list(TOKENIZERS))
    for name, reader, length in zip(TOKENIZERS, readers, lengths, strict=True):
        assert reader
        kept = longer(reader, length) if length else reader
        kept.save_pretrained(folder / name)
    save_scheduler(Scheduler(3.0), folder / "scheduler")
    write_json(folder / INDEX, pipeline_index((*MODELS, *TOKENIZERS)))


def draw(what: str, folder: Path, tiny: bool, threads: int) -> tuple[float, Tensor]:
    """Seconds of one drawing, without the loading, and the picture (1, 3, H, W)."""
    torch.set_num_threads(threads)
    side = 8 if tiny else 32  # latent pixels
    call = {
        "num_inference_steps": 3,
        "guidance_scale": 4.5,
        "latents": starting_noise([0], (16, side, side)),
        "max_sequence_length": 32 if tiny else 256,
        "output_type": "pt",
    }
    pipe: Any
    if what == "diffusers":
        from diffusers import StableDiffusion3Pipeline

        pipe = StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.bfloat16)
        pipe.set_progress_bar_config(disable=True)
        factor = pipe.vae_scale_factor
        call |= {"height": factor * side, "width": factor * side}
        call["latents"] = call["latents"].bfloat16()
    else:
        pipe = load(folder, **OURS[what])
        pipe.progress = False
    begin = time.perf_counter()
    made = pipe(PROMPT, **call)
    seconds = time.perf_counter() - begin
    return seconds, (made.images if what == "diffusers" else made).float()


def alone(*given: Any) -> tuple[float, Tensor]:
    """``draw`` in a process of its own, whose memory is free again when it ends."""
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, fresh) as worker:
        seconds, picture = worker.submit(drawn, *given).result()
    return seconds, torch.tensor(picture)


def drawn(*given: Any) -> tuple[float, list]:
    """``draw``, in a form that outlives its process."""
    seconds, picture = draw(*given)
    return seconds, picture.tolist()


def compare(folder: Path, tiny: bool, threads: int, rounds: int) -> None:
    """Draw in turns, then in float32, and print times, ratios and errors."""
    times: dict[str, list[float]] = {what: [] for what in TURNS}
    pictures = {}
    for number in range(rounds):
        for what in TURNS:
            seconds, pictures[what] = alone(what, folder, tiny, threads)
            times[what].append(seconds)
            print(f"round {number + 1}: {what} {seconds:.2f} s", flush=True)
    seconds, exact = alone("float32", folder, tiny, threads)
    print(f"float32 {seconds:.2f} s; {threads} threads, torch {torch.__version__}")
    for what in TURNS:
        pairs = zip(times[what], times["diffusers"], strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        far = error(pictures[what], exact)
        print(f"{what:15} {ratio:.3f} of diffusers' time, error to float32 {far:.2e}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args(arguments)
    write(options.folder, options.tiny)
    compare(options.folder, options.tiny, options.threads, options.rounds)


if __name__ == "__main__":
    main()
