"""A pipeline's parts in ONNX, for every other runtime."""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from minidiff.files.layout import MODELS
from minidiff.sampling import Pipeline

Parts = dict[str, tuple[nn.Module, tuple[Tensor, ...]]]
NAMES = {  # of each part's inputs, and of what comes out
    "text_encoder": (["ids"], ["states", "pooled"]),
    "text_encoder_2": (["ids"], ["states", "pooled"]),
    "text_encoder_3": (["ids"], ["states"]),
    "transformer": (["latents", "sigma", "context", "pooled"], ["velocity"]),
    "vae_decoder": (["latents"], ["picture"]),
    "vae_encoder": (["picture"], ["moments"]),
}


def check_possible(control: str | None) -> None:
    """Raise ValueError for a ``control``, and where a package is missing."""
    if control:
        raise ValueError(f"--control is {control}, which needs --format web")
    if missing := [n for n in ("onnx", "onnxscript") if find_spec(n) is None]:
        raise ValueError(f"export to ONNX: expected pip install {' '.join(missing)}")


def export_onnx(pipe: Pipeline, folder: Path) -> list[Path]:
    """Write each part of ``pipe`` as ``PART.onnx`` into ``folder``; the files.

    One text and one picture at a time, of the pipeline's own size. The decoder takes
    latents and the encoder gives moments as the VAE has them, not scaled.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for part, (module, given) in parts_with_inputs(pipe).items():
        inputs, outputs = NAMES[part]
        files.append(folder / f"{part}.onnx")
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # attention in plain steps
            torch.onnx.export(
                *(module.eval(), given, files[-1]),
                input_names=inputs,
                output_names=outputs,
                external_data=False,
                dynamo=True,
                verbose=False,
            )
    return files


def parts_with_inputs(pipe: Pipeline) -> Parts:
    """Each part, and what it reads in the drawing of a picture."""
    lengths = [t.model_max_length for t in pipe.tokenizers[:2]]
    lengths.append(pipe.max_sequence_length)
    read = zip(MODELS, pipe.text_encoders, pipe.tokenizers, lengths, strict=False)
    parts: Parts = {
        part: (encoder, (tokenizer([""], length),))
        for part, encoder, tokenizer, length in read
        if encoder is not None
    }
    latents = pipe.prepare_latents(1, seed=0)
    context, pooled = pipe.encode_prompt([""])
    given = latents, torch.full((1,), 0.5), context, pooled
    size = [pipe.vae.config.factor * n for n in latents.shape[2:]]
    return parts | {
        "transformer": (pipe.transformer, given),
        "vae_decoder": (pipe.vae.decoder, (latents,)),
        "vae_encoder": (pipe.vae.encoder, (torch.zeros(1, 3, *size),)),
    }
