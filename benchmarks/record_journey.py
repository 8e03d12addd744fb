"""Record the journey of one prompt: the tensors that the chapters compare theirs with.

    python benchmarks/record_journey.py [--model tiny]

Run it when the shipped weights change. It writes minidiff/pretrained/journey.json.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import minidiff  # noqa: E402
from minidiff.classroom.journey import (  # noqa: E402
    PROMPT,
    RECORD,
    SEED,
    describe_tensor,
)
from minidiff.sampling import Pipeline  # noqa: E402


@torch.no_grad()
def journey(pipe: Pipeline) -> dict[str, Tensor]:
    """Every tensor that a chapter hands on, by name."""
    pipe.progress, read = False, []
    names = ("ids_l", "ids_g", "ids_t5")
    found = {n: f([PROMPT]) for n, f in zip(names, pipe.tokenizers, strict=True)}
    context, pooled = pipe.encode_prompt(PROMPT)
    noise = pipe.prepare_latents(1, seed=SEED)
    attention = pipe.transformer.joint_blocks[0].attention
    hook = attention.register_forward_hook(lambda *call: read.append(call[-1][1]))
    velocity = pipe.transformer(noise, torch.ones(1), context, pooled)
    hook.remove()
    latents = pipe(PROMPT, seed=SEED, output_type="latent")
    found |= {"context": context, "pooled": pooled, "noise": noise, "read": read[0]}
    found |= {"velocity": velocity, "latents": latents, "picture": pipe.decode(latents)}
    return found


def main() -> None:
    """Write the record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny")
    pipe = minidiff.load(parser.parse_args().model)
    tensors = {name: describe_tensor(x) for name, x in journey(pipe).items()}
    record = {"prompt": PROMPT, "seed": SEED, "tensors": tensors}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    for name, entry in tensors.items():
        print(name, tuple(entry["shape"]))


if __name__ == "__main__":
    main()
