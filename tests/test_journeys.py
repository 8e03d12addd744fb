"""A prompt's journey to its picture: few files call each other both ways."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_prompts_journey_goes_one_way():
    """The solver calls what the pipeline gives it, the reader of files its chapter."""
    script = [sys.executable, "benchmarks/journeys.py", "--files", "--only", "prompt"]
    out = subprocess.run(script, cwd=ROOT, check=True, capture_output=True, text=True)
    pairs = [line.strip() for line in out.stdout.splitlines() if " ⇄ " in line]
    assert "flow_matching.py ⇄ sampling.py" in pairs and len(pairs) <= 3
