"""Train, judge and evaluate the shipped model on one GPU: one resumable command.

    python benchmarks/gpu_job.py --data data --output runs/gpu --results "$OUT"

Run it again after it was stopped, with the same flags, until it says "finished". The
stages that do not need one another (both CLIPs, T5, autoencoder, judge) run side by
side; the transformer follows; then the evaluation. ``--seconds`` stops in time, with
everything saved. ``--probe`` runs a few steps of each stage, in a folder of its own
below the output's, and prints its speed.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import time
import traceback
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SIDE_BY_SIDE = ("clip", "t5", "vae", "judge")
STAGES = (*SIDE_BY_SIDE, "transformer")
PACKED = ("model", "judge", "logs", "grids", "evaluation.txt", "evaluation.json")
PART = 15 * 2**20  # bytes of one file of the results


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default=os.environ.get("MINIDIFF_DATA"))
    parser.add_argument("--output", default="runs/gpu", type=Path)
    parser.add_argument("--results", type=Path, help="folder for the packed results")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--recipe",
        default="gpu",
        choices=("gpu", "shipped", "longer", "further", "muon", "trial"),
    )
    parser.add_argument("--seconds", default=570.0, type=float)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--stage", help="run one stage only, in this process")
    parser.add_argument("--until", choices=("parallel", "transformer", "evaluate"))
    for stage in STAGES:
        parser.add_argument(f"--{stage}-steps", type=int)
        parser.add_argument(f"--{stage}-batch", type=int)
    parser.add_argument("--latents", type=int, help="scenes kept as latents")
    parser.add_argument("--pictures", type=int, help="scenes kept as pictures")
    parser.add_argument("--learning-rate", type=float, help="of the transformer")
    parser.add_argument("--evaluate", type=int, default=2000, help="pictures a row")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--compile", action="store_true", help="on a CPU too")
    parser.add_argument("--bfloat16", action="store_true", help="on a CPU too")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--sequential", action="store_true", help="one stage at a time")
    parser.add_argument("--cache", type=Path, help="folder for encoded scenes")
    parser.add_argument("--probe", action="store_true")
    args = parser.parse_args()
    if args.probe:
        args.output /= "probe"
    return args


def make_job(args: argparse.Namespace):
    """The stages' settings from the flags."""
    from minidiff.extras.stages import RECIPES, Job

    recipe, cuda = RECIPES[args.recipe], args.device != "cpu"
    for stage in STAGES:
        config = getattr(recipe, stage)
        changes = {"steps": getattr(args, f"{stage}_steps")}
        changes["batch_size"] = getattr(args, f"{stage}_batch")
        if stage == "transformer":
            changes["learning_rate"] = args.learning_rate
        changes = {k: v for k, v in changes.items() if v is not None}
        changes["compile"] = not args.no_compile if cuda else args.compile
        if cuda or args.bfloat16:
            changes["bfloat16"] = stage != "clip" or not cuda
        if args.probe:
            changes |= {"steps": 60, "warmup_steps": 10, "log_every": 10}
            changes |= {"save_every": 60, "validate_every": 60}
        recipe = replace(recipe, **{stage: replace(config, **changes)})
    recipe = replace(recipe, latents=args.latents or recipe.latents)
    recipe = replace(recipe, pictures=args.pictures or recipe.pictures)
    if args.probe:
        recipe = replace(recipe, pictures=2**14, latents=2**15)
    deadline = args.deadline or time.time() + args.seconds
    return Job(args.output, recipe, args.data, args.device, args.cache, deadline)


def evaluate(args: argparse.Namespace) -> None:
    """Choose the guidance on other prompts, then measure; tables go to the output."""
    from minidiff.attention import record_attention
    from minidiff.sampling import load
    from minidiff.support.judge import load_judge
    from minidiff.support.metrics import attention_correlation, format_table
    from minidiff.support.metrics import evaluate as measure

    pipe = load(str(args.output / "model"), device=args.device, dtype=torch_float32())
    pipe.progress = False
    judge = load_judge(args.output / "judge", args.device)
    common = {"folder": args.data, "batch": 1000, "log": print}
    found, n = {}, args.evaluate
    for scale in (1.5, 2.5, 4.0, 6.0):
        table = measure(
            pipe, judge, max(2, n // 8), guidance_scale=scale, seed=3, **common
        )
        found[str(scale)] = table
        print(format_table(table), flush=True)
    both = {
        scale: sum(row["model"]["all"] for row in table["rows"].values())
        for scale, table in found.items()
    }
    best = float(max(both, key=both.get))
    final = measure(pipe, judge, n, guidance_scale=best, **common)
    text = f"guidance scale {best} chosen on other prompts\n\n" + format_table(final)
    try:
        found["attention"] = attention_correlation(
            pipe, record_attention, 256, folder=args.data
        )
    except Exception:
        traceback.print_exc()
    found["final"] = final
    (args.output / "evaluation.json").write_text(json.dumps(found, indent=1))
    (args.output / "evaluation.txt").write_text(text + "\n")
    print(text, flush=True)


def torch_float32():
    """float32, imported late."""
    import torch

    return torch.float32


def spawn(args: argparse.Namespace, stages: tuple[str, ...], deadline: float) -> bool:
    """Run ``stages`` side by side, each as a process of its own; whether all worked."""
    logs = args.output / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    running, failed = {}, []
    for stage in stages:
        command = [sys.executable, __file__, *sys.argv[1:]]
        command += ["--stage", stage, "--deadline", str(deadline)]
        log = open(logs / f"{stage}.log", "a")
        running[stage] = subprocess.Popen(command, stdout=log, stderr=log)
    for stage, process in running.items():
        try:
            code = process.wait(max(1, deadline + 15 - time.time()))
        except subprocess.TimeoutExpired:
            process.kill()
            code = -9
        print(f"--- {stage}: exit status {code}")
        text = (logs / f"{stage}.log").read_text()[-6000:]
        print("\n".join(text.splitlines()[-60 if stage == "evaluate" else -8 :]))
        failed += [stage] if code else []
    sys.stdout.flush()
    return not failed


def speeds(output: Path) -> None:
    """Print each stage's last logged loss and speed."""
    from minidiff.support.trainer import read_log

    for log in sorted(output.glob("runs/*/log.jsonl")):
        records = read_log(log)
        losses = [r for r in records if "loss" in r]
        if not losses:
            continue
        last = losses[-1]
        rates = sorted(r["samples_per_s"] for r in losses)
        print(
            f"{log.parent.name}: step {last['step']}, loss {last['loss']:.4f}, "
            f"{rates[len(rates) // 2]:.0f} samples/s (median), {rates[-1]:.0f} (best)"
        )
        for record in records[-40:]:
            if "psnr" in record or "validation" in record:
                print("   ", {k: v for k, v in record.items() if k != "time"})


def suggest(output: Path) -> None:
    """What ``--transformer-steps`` fills a given time, at the speed just seen."""
    from minidiff.support.trainer import read_log

    records = read_log(output / "runs" / "transformer" / "log.jsonl")
    rates = sorted(r["samples_per_s"] for r in records if "loss" in r)
    if rates:
        size = json.loads((output / "runs/transformer/run.json").read_text())
        per_second = rates[len(rates) // 2] / size["batch_size"]
        for seconds in (300, 400, 500, 550, 600):
            steps = int(per_second * seconds * 0.97) // 500 * 500
            print(f"{seconds} s of training: --transformer-steps {steps}")


def pack(args: argparse.Namespace) -> None:
    """Model, judge, logs and grids as one tar file, cut in parts for the transfer."""
    if not args.results:
        return
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in PACKED:
            if (args.output / name).exists():
                tar.add(args.output / name, arcname=name)
        for path in sorted(args.output.glob("*.png")):
            tar.add(path, arcname=path.name)
        for path in sorted(args.output.glob("runs/*/*.json*")):
            tar.add(path, arcname=f"runs/{path.parent.name}-{path.name}")
        for path in sorted(args.output.glob("runs/*.done")):
            tar.add(path, arcname=f"runs/{path.name}")
    data = buffer.getvalue()
    args.results.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(data), PART)):
        (args.results / f"results-{number}.part").write_bytes(
            data[start : start + PART]
        )
    print(f"packed {len(data) / 2**20:.1f} MiB into {args.results}", flush=True)


def main() -> int:
    """Run what is left to do; 0 when all is done, 75 when it must be run again."""
    args = parse()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / "runs" / "inductor"))
    os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "1")
    if args.stage:  # several compile at once
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "6")
    threads = args.threads if args.device == "cpu" else 4
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    import torch

    from minidiff.extras.stages import run_stages

    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    start, job = time.time(), make_job(args)
    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    if args.stage == "evaluate":
        evaluate(args)
        return 0
    if args.stage:
        run_stages(job, (args.stage,))
        return 0
    done = False
    try:
        runs = args.output / "runs"
        todo = [s for s in SIDE_BY_SIDE if not (runs / f"{s}.done").exists()]
        made = [s for s in SIDE_BY_SIDE if s not in todo]  # with the same settings?
        run_stages(job, ("tokenizers", *made))
        groups = [(s,) for s in todo] if args.sequential else [tuple(todo)]
        done = all([spawn(args, group, job.deadline) for group in groups])
        print(f"side by side: {time.time() - start:.0f} s so far", flush=True)
        if done and args.until != "parallel":
            run_stages(job, ("transformer",))
            print(f"transformer: {time.time() - start:.0f} s so far", flush=True)
            evaluated = (args.output / "evaluation.txt").exists() or not args.evaluate
            if args.until != "transformer" and not args.probe and not evaluated:
                done = spawn(args, ("evaluate",), job.deadline)
    except TimeoutError as stopped:
        done = False
        print(f"{stopped}: run the same command again to go on", flush=True)
    except Exception:
        done = False
        traceback.print_exc()
    speeds(args.output)
    if args.probe:
        suggest(args.output)
    pack(args)
    print("finished" if done else "not finished", f"in {time.time() - start:.0f} s")
    return 0 if done else 75


if __name__ == "__main__":
    sys.exit(main())
