"""An evaluation from names and folders: what is asked, checked, loaded and measured."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minidiff.engine.loading import blueprint, load
from minidiff.interface import checks
from minidiff.interface.terminal import status
from minidiff.judging import metrics
from minidiff.judging.attention_maps import attention_correlation
from minidiff.judging.diversity import MOST, SEEDS, diversity
from minidiff.judging.free_prompts import read_free_prompts
from minidiff.judging.inception import load_inception
from minidiff.judging.judge import JUDGE, load_judge
from minidiff.sampling import Pipeline


@dataclass(frozen=True)
class Evaluation:
    """What a ``Comparison`` is asked, by names and files; None for what is usual.

    Raises ValueError, before a weight is read, for what cannot be.
    """

    model: str
    n: int = 500
    guidance_scale: float | None = None
    steps: int | None = None
    rows: str = "all"
    seed: int = metrics.EVALUATION_SEED
    judge: Path | None = None
    inception: Path | None = None
    data: Path | None = None
    device: str = "cpu"
    prompts: Path | None = None
    beside: str | None = None

    def __post_init__(self) -> None:
        checks.check_range("--seed", self.seed, 0, metrics.LARGEST_SEED)
        checks.check_range("-n", self.n, 2, metrics.MOST_PROMPTS)
        if self.steps is not None:
            checks.check_range("--steps", self.steps, 1, 1000)
        checks.check_number("guidance_scale", checks.given(self.guidance_scale, 1.0))
        metrics.choose_rows(self.rows)
        beside = () if self.beside is None else (self.beside,)
        for model in (self.model, *beside):
            parts = blueprint(model)
            metrics.check_side(parts["transformer"], parts["vae"])

    def open(self, model: str) -> Pipeline:
        """The pipeline of that name, in float32, that shows no progress."""
        pipe = load(model, self.device, torch.float32, fast=self.device == "cpu")
        pipe.progress = False
        return pipe

    def options(self, pipe: Pipeline) -> dict[str, Any]:
        """How it draws: as asked, or in its own usual way."""
        usual = pipe.defaults
        return {
            "num_inference_steps": self.steps or usual.num_inference_steps,
            "guidance_scale": checks.given(self.guidance_scale, usual.guidance_scale),
        }

    @property
    def batch(self) -> int:
        """Pictures at a time: the caches of a CPU hold few."""
        return 20 if self.device == "cpu" else 500

    def compare(
        self, pipe: Pipeline, extract: metrics.Extract, texts: list[str]
    ) -> dict[str, Any]:
        """The diversity beside another model's, if one is asked for."""
        if self.beside is None:
            return {}
        with status(f"loading {self.beside}"):
            other = self.open(self.beside)
        how = self.seed, self.batch
        found = diversity(pipe, other, extract, texts, *how, **self.options(pipe))
        return {"diversity": {"beside": self.beside, "share": found}}

    def measure(self, log: Callable[[str], None]) -> dict[str, Any]:
        """Load the models and measure: what ``table`` prints, ready for JSON."""
        free = self.prompts and read_free_prompts(self.prompts)
        with status(f"loading {self.model}"):
            judge = load_judge(self.judge or JUDGE, self.device)
            weights = self.inception
            inception = load_inception(weights, self.device) if weights else None
            pipe = self.open(self.model)
        sizes = self.n, self.seed, self.data, self.batch
        how = self.options(pipe)
        found = metrics.Comparison(pipe, judge, *sizes, log, inception, **how)
        if free:
            result = {"prompts": found.free(free)}
        else:
            result = found.rows(metrics.choose_rows(self.rows))
            result["attention"] = attention_correlation(pipe, folder=self.data)
        row = metrics.ROWS["all scenes"]
        texts = metrics.row_prompts(row, MOST, self.seed, self.data)[0]
        return (
            result | self.compare(pipe, judge.features, texts) | {"model": self.model}
        )


def table(result: dict[str, Any]) -> str:
    """What was measured as a Markdown table, with lines beneath it."""
    lines = [metrics.format_table(result)]
    if found := result.get("diversity"):
        lines.append(
            f"Diversity: {found['share']:.2f} of that of {found['beside']} (spread of "
            f"the judge's features over {SEEDS} pictures of a prompt)."
        )
    return "\n".join(lines)
