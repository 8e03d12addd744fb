"""Train every stage for three steps at the smallest size, alone or under torchrun.

Saves the averaged weights of all stages into the folder named by the first argument: as
"whole", and as "sharded" what sharded weights learned. Then runs ``minidiff`` with the
words of the folder's commands.json; what a process prints goes into NAME-RANK.txt.
"""

import json
import sys
from contextlib import redirect_stdout, suppress
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minidiff import cli
from minidiff.data import rng
from minidiff.dit import MMDiT, MMDiTConfig
from minidiff.judging.judge import Judge, JudgeConfig, judge_loss
from minidiff.learning import parallel
from minidiff.learning.run import Run
from minidiff.text_encoders import (
    CLIPTextConfig,
    CLIPTextEncoder,
    T5Config,
    T5Encoder,
)
from minidiff.training import (
    Batch,
    CLIPTraining,
    T5Training,
    Task,
    TrainingConfig,
    clip_loss,
    fit,
    t5_loss,
    transformer_loss,
    vae_loss,
)
from minidiff.vae import VAE, VAEConfig

CONFIG = TrainingConfig(3, 8, 1e-3, warmup_steps=1, ema_decay=0.9)


def normal(seed: int, indices: Tensor, *shape: int) -> Tensor:
    return rng.normal(seed, indices, shape).double()


def words(indices: Tensor, n: int) -> Tensor:
    return 1 + (rng.uniform(7, indices, n) * 18).long()


def transformer() -> Task:
    small = {"num_layers": 2, "num_attention_heads": 1, "attention_head_dim": 32}
    small |= {"sample_size": 4, "pos_embed_max_size": 4, "joint_attention_dim": 8}
    config = replace(MMDiTConfig.tiny(), pooled_projection_dim=6, **small)

    def batch(i: Tensor) -> Batch:
        known = {"x0": normal(1, i, 16, 4, 4), "noise": normal(2, i, 16, 4, 4)}
        known |= {"context": normal(4, i, 4, 8), "pooled": normal(5, i, 6)}
        return known | {"sigma": rng.uniform(3, i, 1)[:, 0].double()}

    return Task(MMDiT(config), transformer_loss, batch)


def muon() -> Task:
    return transformer()


def vae() -> Task:
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4}
    config = VAEConfig(latent_channels=4, layers_per_block=1, **sizes)

    def batch(i: Tensor) -> Batch:
        return {"images": normal(1, i, 3, 8, 8), "noise": normal(2, i, 4, 4, 4)}

    return Task(VAE(config), vae_loss, batch)


def clip() -> Task:
    encoders = [
        CLIPTextEncoder(CLIPTextConfig(20, 8, 16, 2, 2, 8, act, 1e-5, 8, 19))
        for act in ("gelu", "quick_gelu")
    ]

    def batch(i: Tensor) -> Batch:
        ids = torch.cat([words(i, 5), torch.full_like(i, 19)[:, None]], 1)
        known = {"images": normal(1, i, 3, 64, 64), "meaning": ids[:, 0] % 3}
        pairs = torch.stack([ids, ids], 1)
        return known | {"ids_l": pairs, "ids_g": pairs}

    return Task(CLIPTraining(*encoders), clip_loss, batch)


def t5() -> Task:
    def batch(i: Tensor) -> Batch:
        ids = words(i, 6)
        short = (i % 2 == 0)[:, None] & (torch.arange(6, device=i.device) > 3)
        return {"source": ids, "target": ids.masked_fill(short, 0)}

    return Task(T5Training(T5Encoder(T5Config(20, 8, 4, 16, 2, 2)), 6), t5_loss, batch)


def judge() -> Task:
    def batch(i: Tensor) -> Batch:
        known = {"images": normal(1, i, 3, 64, 64), "ground": i % 12}
        cells = rng.uniform(3, i, 64).unflatten(1, (8, 8)).double()
        known["trace"] = cells
        for name, count in (("kinds", 200), ("colors", 12)):
            known[name] = torch.where(cells > 0.8, (cells * count).long(), -1)
        return known

    return Task(Judge(JudgeConfig((8, 8, 8), (1, 1, 1), 12)), judge_loss, batch)


def learned(task: Task, config: TrainingConfig, folder: Path | None) -> nn.Module:
    """What a run learns; in a folder it is stopped after the first step, once."""
    if folder is None:
        return fit(task, config)
    with Run(folder / f"sharded {config.sharded}", {}) as run:
        with suppress(TimeoutError):
            fit(deepcopy(task), config, run, deadline=1.0)
        return fit(task, config, run)


def train(sharded: bool, folder: Path | None = None) -> dict[str, Tensor]:
    """The averaged weights of all stages, and how far they moved; in float64.

    Sharded, T5 and the judge are left out: they do nothing that the others do not. In
    a folder Muon's run, which has AdamW's state too, is stopped and goes on.
    """
    weights = {}
    plain = () if sharded else (t5, judge)
    for stage in (clip, vae, transformer, muon, *plain):
        torch.manual_seed(0)
        task = stage()
        task.model.double()
        before = {k: v.clone() for k, v in task.model.state_dict().items()}
        config = replace(CONFIG, sharded=sharded, muon=stage is muon)
        if stage in (vae, transformer):  # contrastive losses need whole batches
            config = replace(config, accumulation=2)
        kept = folder if stage is muon else None
        for name, value in learned(task, config, kept).state_dict().items():
            value = parallel.whole(value)
            weights[f"{stage.__name__}/{name}"] = value.contiguous()
            weights[f"moved/{stage.__name__}/{name}"] = value - before[name]
    return weights


def command(words: list[str], printed: Path) -> None:
    """Run ``minidiff`` with these words; it must succeed."""
    sys.argv = ["minidiff", *words]
    try:
        with printed.open("w") as file, redirect_stdout(file):
            cli.main()
    except SystemExit as ended:
        assert not ended.code, words


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    parallel.start("cpu")
    for name in ("whole", "sharded"):
        weights = train(name == "sharded", folder)
        if parallel.rank() == 0:
            save_file(weights, folder / name)
    torch.set_default_dtype(torch.float32)
    for name, words in json.loads((folder / "commands.json").read_text()).items():
        command(words, folder / f"{name}-{parallel.rank()}.txt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
