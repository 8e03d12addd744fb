"""Measure every component against diffusers and transformers; write book/parity.md.

    python benchmarks/parity_report.py [--output book/parity.md]

The comparisons are those of the tests, with the same random weights. It takes about a
minute on a CPU. The published tokenizers' files are read from MINIDIFF_SHARED; without
them their rows are left out.
"""

import argparse
import logging
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
warnings.filterwarnings("ignore", message="IProgress")
SHARED = Path(os.environ.get("MINIDIFF_SHARED", ROOT.parent / "shared"))
PACKAGES = ("minidiff", "torch", "diffusers", "transformers", "peft", "tokenizers")
BOUND = 1e-5
Row = tuple[str, str, int, float]  # what, against what, how many cases, largest error

INTRODUCTION = """# Parity report

Every component of minidiff, given the same weights and the same input as the reference
implementation, on a CPU, in float32 unless the row says otherwise. All parameters but
the shipped model's are random and different from zero (norm weights around one, biases
and gates too): a shipped model could hide a mistake behind a weight that happens to be
zero. The error is
$\\lVert a - b\\rVert / \\lVert b\\rVert$, and the largest over all cases stands in the
table. The tests demand at most $10^{-5}$ in every row, and show for each component
that a small mistake (another epsilon, scale and shift exchanged) is caught.

Two float32 computations that differ only in the order of their additions agree to about
$10^{-7}$ or $10^{-6}$: nothing better can be expected.

This page is written by `python benchmarks/parity_report.py`; the digits change with the
processor and the versions.
"""


def largest(error: Callable[..., float], cases) -> tuple[int, float]:
    """How many cases, and the largest error among them."""
    errors = []
    for case in cases:
        torch.manual_seed(0)
        errors.append(error(*case) if isinstance(case, tuple) else error(case))
    return len(errors), max(errors)


def text_rows() -> Iterator[Row]:
    """CLIP and T5."""
    import test_text_encoders as t

    yield (
        "CLIP text encoder: penultimate states and pooled vector",
        "`transformers.CLIPTextModelWithProjection`",
        *largest(t.clip_error, t.CLIP_CONFIGS),
    )
    yield (
        "T5 encoder",
        "`transformers.T5EncoderModel`",
        *largest(t.t5_error, t.T5_CONFIGS),
    )


def vae_rows() -> Iterator[Row]:
    """Both halves of the autoencoder."""
    import test_vae as t

    reference = "`diffusers.AutoencoderKL`"
    yield (
        "VAE, encoder: mean, logarithm of the variance, mode, sample",
        reference,
        *largest(t.encode_error, t.CONFIGS),
    )
    yield "VAE, decoder", reference, *largest(t.decode_error, t.CONFIGS)


@torch.no_grad()
def transformer_rows() -> Iterator[Row]:
    """Attention alone, and the whole transformer."""
    import test_attention as a
    import test_dit as t

    cases = [(norm, last) for norm in ("rms_norm", None) for last in (False, True)]
    reference = "`diffusers` `Attention`, `JointAttnProcessor2_0`"
    yield "Joint attention", reference, *largest(a.joint_error, cases)
    sizes = [(8, 8), (4, 6), (8, 2)]
    cases = [(config, size) for config in t.CONFIGS.values() for size in sizes]
    cases += [(t.DUAL, (4, 6), skip) for skip in ([1], [0, 2], [3])]
    yield (
        "MMDiT and MMDiT-X, sizes not square, layers skipped",
        "`diffusers.SD3Transformer2DModel`",
        *largest(t.parity, cases),
    )


def flow_rows() -> Iterator[Row]:
    """Schedules and solvers."""
    import test_flow_matching as t
    from helpers import relative_error

    def schedule(steps: int, shift: float) -> float:
        ours = t.fm.sigma_schedule(steps, shift)
        return relative_error(ours, t.diffusers_schedule(steps, shift).sigmas)

    def solver(name: str, steps: int) -> float:
        x, _ = t.pair()
        scheduler = t.diffusers_schedule(steps, 3.0, heun=name == "heun")
        ours = getattr(t.fm, name)(t.curved, x, t.fm.sigma_schedule(steps))
        return relative_error(ours, t.diffusers_drawing(scheduler, x))

    def dpmpp(steps: int) -> float:
        x, _ = t.pair(torch.float64)
        sigmas = t.fm.sigma_schedule(steps).double()
        expected = t.reference_dpmpp_2m(t.curved, x, sigmas)
        return relative_error(t.fm.dpmpp_2m(t.curved, x, sigmas), expected)

    euler = "`diffusers.FlowMatchEulerDiscreteScheduler`"
    cases = [(n, shift) for n in (1, 2, 4, 28, 40, 1000) for shift in (1.0, 3.0, 6.5)]
    yield "Noise levels", euler, *largest(schedule, cases)
    for name, reference in (("euler", euler), ("heun", euler.replace("Euler", "Heun"))):
        cases = [(name, n) for n in (1, 4, 11)]
        yield f"Solver: {name}", reference, *largest(solver, cases)
    reference = "the reference's formula, in float64"
    yield "Solver: dpmpp_2m", reference, *largest(dpmpp, [1, 2, 4, 28])


def pipeline_rows() -> Iterator[Row]:
    """From the prompt to latents and pictures, 8 steps with guidance."""
    import test_sampling as t
    from helpers import relative_error

    import minidiff
    from minidiff.files.weights import TINY

    found: dict[str, list[float]] = {"latent": [], "pt": []}
    for case in t.CASES.values():
        model, call = t.split(case)
        options = {"dual": (), "t5": True, "shift": 3.0} | model
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            t.save_tokenizers(folder, options["t5"])
            tokenizers = t.load_tokenizers(folder, options["t5"])
            reference = t.reference_pipeline(tokenizers, **options)
            reference.save_pretrained(folder / "saved")
            pipe = minidiff.load(folder / "saved")
        noise = t.noise_for(pipe, call)
        for kind, errors in found.items():
            expected = t.theirs(reference, call, noise, kind)
            errors.append(relative_error(t.ours(pipe, call, noise, kind), expected))
    reference = "`diffusers.StableDiffusion3Pipeline`"
    for kind, name in (("latent", "latents"), ("pt", "pictures")):
        errors = found[kind]
        yield f"Whole pipeline: {name}", reference, len(errors), max(errors)
    if (TINY / "model_index.json").exists():
        yield "Shipped model: pictures", reference, 2, shipped_error()


def shipped_error() -> float:
    """The shipped folder, drawn by diffusers and by us: two prompts, 8 steps."""
    from diffusers import StableDiffusion3Pipeline
    from helpers import relative_error

    import minidiff
    from minidiff.files.weights import TINY

    theirs = StableDiffusion3Pipeline.from_pretrained(TINY, dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    ours = minidiff.load("tiny")
    length, side = ours.max_sequence_length, ours.transformer.config.sample_size
    noise = torch.randn(2, 16, side, side)
    call = {
        "prompt": [
            "a red dress on a blue background",
            "a green bag above a white coat",
        ],
        "num_inference_steps": 8,
        "guidance_scale": 4.0,
        "latents": noise,
        "max_sequence_length": length,
        "output_type": "pt",
    }
    return relative_error(ours(**call), theirs(**call).images)


def in_a_folder(error: Callable[..., float]) -> Callable[..., float]:
    """``error`` with a new folder before its case."""

    def measured(*case: object) -> float:
        with tempfile.TemporaryDirectory() as name:
            return error(Path(name), *case)

    return measured


def few_step_rows() -> Iterator[Row]:
    """Jumps, told to diffusers as levels and names."""
    import test_distillation as t

    yield (
        "Few steps: latents of a student's jumps",
        "`diffusers`' transformer and `FlowMatchEulerDiscreteScheduler`",
        *largest(in_a_folder(t.jumps_error), [(1,), (2,), (5,), (8,)]),
    )


def lora_rows() -> Iterator[Row]:
    """Files of diffusers and peft, and one of ours."""
    import test_lora as t
    import test_lora_styles as s

    from minidiff.engine.adapters import load_lora

    def read(folder: Path, medium: bool, fused: bool) -> float:
        case = t.adapted(folder, medium)
        load_lora(case.pipe, case.file, fused=fused)
        return t.update_error(case)

    def from_peft(folder: Path, kind: str) -> float:
        return s.peft_error(s.from_peft(folder, kind))

    cases = [(medium, fused) for medium in (False, True) for fused in (False, True)]
    reference = "`diffusers` and `peft`"
    yield (
        "LoRA, beside the layers and fused: velocity and pooled vector",
        reference,
        *largest(in_a_folder(read), cases),
    )
    yield (
        "LoRA, saved by minidiff",
        reference,
        *largest(in_a_folder(t.saved_error), [()]),
    )
    cases = [(kind,) for kind in s.REFERENCES]
    yield "rsLoRA, DoRA, LoHa, LoKr", "`peft`", *largest(in_a_folder(from_peft), cases)


def control_rows() -> Iterator[Row]:
    """A net alone, in both forms of its file, and two of them in a drawing."""
    import test_control as t
    from small import small_pipeline

    def drawing(folder: Path) -> float:
        small_pipeline(folder / "tokenizers").save_pretrained(folder / "saved")
        return t.drawing_error(folder, folder / "saved", t.begin(folder / "saved"))

    for name, reference, error in (
        ("folder", "`diffusers.SD3ControlNetModel`", t.folder_error),
        ("single file", "Stability's published formula", t.single_file_error),
        ("guided drawing", "`diffusers.StableDiffusion3ControlNetPipeline`", drawing),
    ):
        yield f"ControlNet, {name}", reference, *largest(in_a_folder(error), [()])


def drawing_rows() -> Iterator[Row]:
    """A picture to begin from, a mask, a second guidance."""
    import test_guidance as g
    import test_image_to_image as t

    with tempfile.TemporaryDirectory() as name:
        pipes, both = t.trio(Path(name)), g.pair(Path(name) / "guided")
    both[0].name = "sd3.5-medium"
    for what, kind, error, cases in (
        ("Image to image", "Img2Img", t.image_error, [(pipes, s) for s in t.STRENGTHS]),
        ("Inpainting", "Inpaint", t.inpainting_error, [(pipes, *m) for m in t.MASKED]),
        ("Skip Layer Guidance", "", g.latents_error, [(both, s) for s in g.SETTINGS]),
    ):
        reference = f"`diffusers.StableDiffusion3{kind}Pipeline`"
        yield f"{what}: latents", reference, *largest(error, cases)


def memory_rows() -> Iterator[Row]:
    """What of the ways to need less has a reference that runs on a CPU."""
    import test_efficiency as t

    reference = "Dettmers et al. 2023, appendix E"
    yield "NF4: its sixteen levels", reference, *largest(t.levels_error, [()])


def tokenizer_rows(count: int = 20_000) -> Iterator[tuple[str, str, int, int]]:
    """Strings whose ids differ, on the published vocabularies."""
    from tokenizer_strings import strings
    from transformers import AutoTokenizer

    from minidiff.tokenizer import CLIPTokenizer, T5Tokenizer

    folder = SHARED / "sd35" / "tokenizers"
    if not folder.is_dir():
        return
    texts = strings(count, seed=7)
    for part, kind, length in (
        ("tokenizer", CLIPTokenizer, 77),
        ("tokenizer_2", CLIPTokenizer, 77),
        ("tokenizer_3", T5Tokenizer, 256),
    ):
        reference = AutoTokenizer.from_pretrained(folder / part)
        given = {"padding": "max_length", "max_length": length, "truncation": True}
        expected = reference(texts, **given, return_tensors="pt").input_ids
        ours = kind.from_pretrained(folder / part)(texts, max_length=length)
        wrong = int((ours != expected).any(1).sum())
        name = f"`transformers.{type(reference).__name__}`"
        yield f"SD3.5's `{part}`", name, count, wrong


PARTS = {
    "Networks, solvers, pipeline": (
        text_rows,
        vae_rows,
        transformer_rows,
        flow_rows,
        pipeline_rows,
    ),
    "Few steps, LoRA, control, other drawings, memory": (
        few_step_rows,
        lora_rows,
        control_rows,
        drawing_rows,
        memory_rows,
    ),
}


def table(title: str, rows: list[Row]) -> list[str]:
    """A section of the page."""
    lines = ["", f"## {title}", ""]
    lines += ["| component | reference | cases | largest relative error |"]
    lines += ["|---|---|---|---|"]
    return lines + [
        f"| {a} | {b} | {n} | {f'{error:.1e}' if error else 'equal in every bit'} |"
        for a, b, n, error in rows
    ]


def report(tables: dict[str, list[Row]], tokenizers: list) -> str:
    """The page."""
    lines = [INTRODUCTION.rstrip("\n")]
    for title, rows in tables.items():
        lines += table(title, rows)
    if tokenizers:
        lines += ["", "## Tokenizers", ""]
        lines += [
            "Generated strings of every Unicode plane, scripts, emoji, control",
            "characters, runs of spaces and special tokens' texts, padded and",
            "truncated as the pipeline does it.",
            "",
            "| tokenizer | reference | strings | with other ids |",
            "|---|---|---|---|",
        ]
        lines += [f"| {a} | {b} | {n:,} | {wrong} |" for a, b, n, wrong in tokenizers]
    lines += ["", "## Versions", "", "| package | version |", "|---|---|"]
    lines += [f"| {name} | {version(name)} |" for name in PACKAGES]
    lines += [f"| Python | {platform.python_version()}, {platform.machine()} |", ""]
    return "\n".join(lines)


def quiet() -> None:
    """Silence the warnings of the reference about the overlong prompts."""
    import diffusers
    import transformers

    for package in (diffusers, transformers):
        package.utils.logging.set_verbosity(logging.CRITICAL)
        package.utils.logging.disable_progress_bar()


def main() -> int:
    """Measure, write, and fail where an error is above the bound."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "book" / "parity.md")
    output = parser.parse_args().output
    quiet()
    tables: dict[str, list[Row]] = {}
    for title, parts in PARTS.items():
        for row in chain.from_iterable(part() for part in parts):
            print(f"{row[0]}: {row[3]:.1e}", flush=True)
            tables.setdefault(title, []).append(row)
    tokenizers = list(tokenizer_rows())
    output.write_text(report(tables, tokenizers), encoding="utf-8")
    print(f"wrote {output}")
    rows = chain.from_iterable(tables.values())
    wrong = [r[0] for r in rows if r[3] > BOUND] + [t[0] for t in tokenizers if t[3]]
    print("above the bound:", ", ".join(wrong) or "none")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
