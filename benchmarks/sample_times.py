"""Seconds of `minidiff sample` from the shell, of the teacher and of its student.

    python benchmarks/sample_times.py [--rounds 5]

One picture, and eight; all take turns in every round, and the first round does not
count. Printed: medians, and their ratios to that of `python -c "import torch"`.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time

PROMPT = "a red dress on a blue background"
WAYS = {
    "tiny, 28 guided steps": ("--model", "tiny"),
    "tiny-turbo, 4 steps": ("--model", "tiny-turbo"),
    "tiny-turbo, 1 step": ("--model", "tiny-turbo", "--steps", "1"),
}


def seconds(*words: str) -> float:
    """How long Python takes for these words, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        call = [sys.executable, *words]
        subprocess.run(call, cwd=folder, check=True, capture_output=True)
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    sample = ("-m", "minidiff", "sample", PROMPT)
    calls = {"import torch": ("-c", "import torch")}
    for number in ("1", "8"):
        for name, how in WAYS.items():
            calls[f"{name}, {number}"] = (*sample, *how, "--num-images", number)
    taken = [
        {k: seconds(*words) for k, words in calls.items()} for _ in range(rounds + 1)
    ]
    medians = {k: statistics.median(found[k] for found in taken[1:]) for k in calls}
    for name, median in medians.items():
        ratio = median / medians["import torch"]
        print(f"{name}: {median:.2f} s, {ratio:.2f} times import torch")


if __name__ == "__main__":
    main()
