"""What a stage leaves behind: one component in the hub's layout, float16."""

import torch
from torch import nn

from minidiff.data.reader import vocabulary
from minidiff.data.told import ToldScenes
from minidiff.engine import loading
from minidiff.files import layout
from minidiff.files.layout import ENCODERS, TOKENIZERS
from minidiff.files.reading import read_json
from minidiff.files.weights import save_component
from minidiff.files.words import write_words
from minidiff.files.writing import write_json
from minidiff.flow_matching import Scheduler
from minidiff.learning import parallel
from minidiff.recipes.job import Job


def export_part(job: Job, model: nn.Module, name: str) -> None:
    """Write one component of the hub's layout in float16."""
    if parallel.rank():
        return
    save_component(model, job.model / name, layout.MODELS[name], torch.float16)
    if name in ENCODERS:
        state_special_ids(job, name)


def state_special_ids(job: Job, name: str) -> None:
    """Add the special ids that transformers' configurations of encoders state."""
    tokenizer = job.read_tokenizers()[list(ENCODERS).index(name)]
    path = job.model / name / "config.json"
    ids = {k: getattr(tokenizer, k) for k in ("bos_token_id", "eos_token_id")}
    ids["pad_token_id"] = tokenizer.pad_token_id
    known = {k: v for k, v in ids.items() if v is not None}
    write_json(path, read_json(path) | known)


def export_index(job: Job) -> None:
    """What makes a folder of components a pipeline: two files, and the words seen."""
    if parallel.rank():
        return
    layout.save_scheduler(Scheduler(shift=1.0), job.model / "scheduler")
    index = layout.pipeline_index((*loading.PARTS, *TOKENIZERS))
    write_json(job.model / "model_index.json", index)
    scenes = job.scenes()
    if isinstance(scenes, ToldScenes):
        write_words(job.model, [*vocabulary(), *scenes.kinds])
    else:
        write_words(job.model, scenes.all_captions())
