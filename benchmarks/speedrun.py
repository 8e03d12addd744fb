"""What each hour of a training bought: its stages, and how well it drew on the way.

    python benchmarks/speedrun.py RUN [-n 500] [--data FOLDER]

RUN is the folder that `minidiff train --output RUN` filled. Printed are the page's two
tables: each stage's steps, samples, seconds and last loss; and, for the transformer's
averaged weights at each validation (RUN/at/STEP), the shares that the judge found
right. What was measured is kept in RUN/speedrun.json and not measured again.
"""

import argparse
from pathlib import Path
from typing import Any

import minidiff
from minidiff.dit import MMDiT, MMDiTConfig
from minidiff.files.disk import read_json, write_json
from minidiff.files.weights import load_component
from minidiff.judging.judge import load_judge
from minidiff.judging.metrics import Comparison
from minidiff.learning.run import read_log

STAGES = ("clip", "t5", "vae", "judge", "transformer")
ROWS = ("one garment", "one thing", "two things", "all scenes")


def learned(run: Path, until: int | None = None) -> dict[str, Any]:
    """Steps, samples, seconds of learning and the last loss of a stage's run."""
    settings = read_json(run / "run.json")
    records = [r for r in read_log(run / "log.jsonl") if "loss" in r]
    records = [r for r in records if until is None or r["step"] <= until]
    steps = [0, *(r["step"] for r in records)]
    parts = zip(records, steps, strict=False)
    samples = [settings["batch_size"] * (r["step"] - before) for r, before in parts]
    pairs = zip(samples, records, strict=True)
    seconds = sum(n / r["samples_per_s"] for n, r in pairs)
    known = {"steps": steps[-1], "samples": sum(samples), "seconds": round(seconds)}
    return known | {"loss": records[-1]["loss"]}


def measured(folder: Path, step: Path, n: int, data: str | None) -> dict[str, float]:
    """The shares that were drawn rightly with the weights of one step."""
    pipe = minidiff.load(folder / "model", fast=True)
    weights = step / "model" / "transformer"
    pipe.transformer = load_component(MMDiT, MMDiTConfig, weights)
    pipe.progress = False
    found = Comparison(pipe, load_judge(folder / "judge"), n, folder=data, batch=20)
    return {row: found.row(row)[0]["model"]["all"] for row in ROWS}


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("-n", type=int, default=500, help="prompts of each row")
    parser.add_argument("--data", help="folder of Fashion-MNIST's parquet files")
    given = parser.parse_args()
    print("| stage | steps | samples | seconds | last loss |\n" + "|---" * 5 + "|")
    for name in STAGES:
        r = learned(given.run / "runs" / name)
        cells = [f"{r[k]:,}" for k in ("steps", "samples", "seconds")]
        print(f"| {name} | {' | '.join(cells)} | {r['loss']:.3f} |")
    file = given.run / "speedrun.json"
    kept = read_json(file) if file.exists() else {}
    print(f"\n| step | samples | seconds | loss | {' | '.join(ROWS)} |")
    print("|---" * (4 + len(ROWS)) + "|")
    for step in sorted(given.run.glob("at/*"), key=lambda path: int(path.name)):
        name = f"{step.name}, n = {given.n}"
        if name not in kept:
            kept[name] = measured(given.run, step, given.n, given.data)
            write_json(file, kept)
        r = learned(given.run / "runs" / "transformer", int(step.name))
        cells = " | ".join(f"{100 * kept[name][row]:.1f}" for row in ROWS)
        known = f"{r['samples']:,} | {r['seconds']:,} | {r['loss']:.3f}"
        print(f"| {int(step.name):,} | {known} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
