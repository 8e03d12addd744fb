"""An evaluation from names and folders: what is asked, checked, loaded and measured."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minidiff.engine.loading import blueprint, load
from minidiff.files.disk import read_json
from minidiff.interface import checks
from minidiff.interface.terminal import status
from minidiff.judging import metrics, witness, world
from minidiff.judging.attention_maps import attention_correlation
from minidiff.judging.inception import load_inception
from minidiff.judging.judge import JUDGE, load_judge


@dataclass(frozen=True)
class Evaluation:
    """What ``metrics.evaluate`` is asked, by names and files; None for what is usual.

    Raises ValueError, before a weight is read, for what cannot be.
    """

    model: str
    n: int = 500
    guidance_scale: float | None = None
    steps: int = 28
    garments: str = "all"
    seed: int = metrics.EVALUATION_SEED
    judge: Path | None = None
    inception: Path | None = None
    data: Path | None = None
    device: str = "cpu"
    prompts: Path | None = None

    def __post_init__(self) -> None:
        checks.check_range("--seed", self.seed, 0, metrics.LARGEST_SEED)
        checks.check_range("-n", self.n, 2, metrics.MOST_PROMPTS)
        checks.check_range("--steps", self.steps, 1, 1000)
        checks.check_number("guidance_scale", self.guidance_scale or 1.0)
        metrics.choose_rows(self.garments)
        if self.prompts and not self.of_world:
            raise ValueError(
                "--prompts needs the judge of the world of things (--judge)"
            )
        parts = blueprint(self.model)
        metrics.check_side(parts["transformer"], parts["vae"])

    @property
    def of_world(self) -> bool:
        """Whether the judge is the one of garments and everyday things."""
        path = (self.judge or JUDGE) / "config.json"
        return path.is_file() and read_json(path).get("scenes") == "world"

    def measure_world(self, log: Callable[[str], None]) -> dict[str, Any]:
        """The same with the judge of garments and everyday things."""
        free = self.prompts and world.read_free_prompts(self.prompts)
        with status(f"loading {self.model}"):
            judge = witness.load_witness(self.judge or JUDGE, self.device)
            cpu = self.device == "cpu"
            pipe = load(self.model, self.device, torch.float32, fast=cpu)
        pipe.progress = False
        scale = self.guidance_scale or pipe.defaults.guidance_scale
        options: dict[str, Any] = {"num_inference_steps": self.steps}
        options["guidance_scale"] = scale
        sizes = self.n, self.seed, self.data, 20 if cpu else 500
        found = world.WorldEvaluation(pipe, judge, *sizes, log, **options)
        result = {"prompts": found.free(free)} if free else found.rows()
        return result | {"model": self.model}

    def measure(self, log: Callable[[str], None]) -> dict[str, Any]:
        """Load the models and measure: what ``table`` prints, ready for JSON."""
        if self.of_world:
            return self.measure_world(log)
        with status(f"loading {self.model}"):
            judge = load_judge(self.judge or JUDGE, self.device)
            weights = self.inception
            inception = load_inception(weights, self.device) if weights else None
            cpu = self.device == "cpu"  # its caches hold few pictures at a time
            pipe = load(self.model, self.device, torch.float32, fast=cpu)
        pipe.progress = False
        result = metrics.assess(
            pipe,
            judge,
            n=self.n,
            guidance_scale=self.guidance_scale,
            num_inference_steps=self.steps,
            folder=self.data,
            seed=self.seed,
            batch=20 if cpu else 500,
            rows=metrics.choose_rows(self.garments),
            log=log,
            inception=inception,
        )
        found = attention_correlation(pipe, folder=self.data)
        return result | {"model": self.model, "attention": found}


def table(result: dict[str, Any]) -> str:
    """What was measured as a Markdown table, with lines beneath it."""
    of_world = "psnr" in result or "prompts" in result
    return (world if of_world else metrics).format_table(result)
