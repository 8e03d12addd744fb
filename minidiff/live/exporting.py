"""A pipeline as files that a web page draws with: weights, tables and the runtime.

For each model ``NAME.js`` holds its sizes, tokenizers and a table of its weights; for
each of its parts the weights lie in half precision, as ``.bin`` for a server and in
base64 as ``.js`` for a page opened from the disk, which may not fetch. Parts are named
by their content, so that models share what they have in common.
"""

import base64
import json
import re
from dataclasses import asdict
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minidiff.control import ControlNet, check_net
from minidiff.files import tokenizer_files
from minidiff.files.disk import replacing, write_text
from minidiff.files.layout import MODELS
from minidiff.files.tokenizer_files import seen
from minidiff.live.kernel import FORMS
from minidiff.sampling import Pipeline
from minidiff.tokenizer import CLIPTokenizer, T5Tokenizer

HERE = Path(__file__).parent
RUNTIME = (  # one script for the worker: the chapters, and what they share
    *("tensors", "random", "tokenizer", "text_encoders", "vae", "attention", "dit"),
    *("flow_matching", "distillation", "control", "sampling", "worker"),
)
# and one for the page
PAGE = (
    *("random", "flow_matching", "live", "png", "inside", "plane"),
    *("edges", "sketch", "line"),
)
INDEX = "minidiff.exported = "
MOST_STEPS = 50  # that a slider offers
PANEL = 8  # columns that the kernel works on at once


def export_pipeline(
    pipe: Pipeline, folder: Path, model: Path | str, net: ControlNet | None = None
) -> None:
    """Write what a page needs to draw with ``pipe`` into ``folder``.

    ``model``, a name or a folder, is where the pipeline is from: its last part is what
    the page calls it, with "-edges" behind it where a ``net`` reads sketches. Other
    models that are there stay. Raises ValueError for what the runtime cannot run.
    """
    check_runnable(pipe, net)
    folder.mkdir(parents=True, exist_ok=True)
    name = Path(model).name + (f"-{net.kind}" if net else "")
    about = about_pipeline(pipe) | {"name": name, "words": sorted(seen(model))}
    side = pipe.transformer.config.sample_size * pipe.vae.config.factor if net else 0
    about |= {"control": net and asdict(net.config), "sketch": side}
    about["parts"] = {
        part: write_part(folder, part, module)
        for part, module in modules(pipe, net).items()
    }
    offered = usual(pipe) | {"sketch": side}
    write_script(folder / f"{name}.js", f"minidiff.models[{name!r}] = ", about)
    write_script(folder / "runtime.js", "minidiff.runtime = ", runtime())
    write_script(folder / "models.js", INDEX, exported(folder) | {name: offered})
    write_text(folder / "page.js", joined(PAGE))
    for name in ("live.css", "field.js"):
        write_text(folder / name, (HERE / name).read_text("utf-8"))


def modules(pipe: Pipeline, net: ControlNet | None) -> dict[str, nn.Module]:
    """What draws, by name; only a net needs the autoencoder's encoder."""
    parts = *pipe.text_encoders, pipe.transformer, pipe.vae.decoder
    drawing = dict(zip(MODELS, parts, strict=True))
    return drawing | ({"encoder": pipe.vae.encoder, "control": net} if net else {})


def check_runnable(pipe: Pipeline, net: ControlNet | None) -> None:
    """Raise ValueError for what the runtime does not do."""
    if net:
        check_net(net, pipe.transformer)
        if (net.kind, net.last) != ("edges", False):
            found = f"the net reads {net.kind}{' and counts last' if net.last else ''}"
            raise ValueError(f"{found}; expected edges, in diffusers' layout")
    if None in pipe.text_encoders:
        raise ValueError("this pipeline goes without T5; expected all text encoders")
    clips, t5 = pipe.text_encoders[:2], pipe.text_encoders[2].config
    heads = [c.config.hidden_size // c.config.num_attention_heads for c in clips]
    heads += [t5.d_kv, pipe.transformer.config.attention_head_dim]
    if bad := [size for size in heads if size % PANEL]:
        raise ValueError(f"heads of {bad[0]} channels; expected multiples of {PANEL}")


def runtime() -> dict[str, Any]:
    """The worker's script, and the forms of the kernel."""
    kernels = [in_base64(form.read_bytes()) for form in FORMS]
    return {"script": joined(RUNTIME), "kernels": kernels}


def joined(names: tuple[str, ...]) -> str:
    """Files of the runtime, one after the other."""
    return "\n".join((HERE / f"{name}.js").read_text("utf-8") for name in names)


def exported(folder: Path) -> dict[str, Any]:
    """The models that are in the folder already, with their usual settings."""
    index = folder / "models.js"
    return json.loads(index.read_text()[len(INDEX) : -2]) if index.is_file() else {}


def usual(pipe: Pipeline) -> dict[str, float]:
    """How the model is meant to be drawn from, and the most steps to offer."""
    steps, guidance = pipe.defaults
    most = getattr(pipe.scheduler, "jumps", MOST_STEPS)
    return {"steps": steps, "guidance": guidance, "most": most}


def about_pipeline(pipe: Pipeline) -> dict[str, Any]:
    """What the runtime must know of a pipeline besides its weights."""
    clip = pipe.tokenizers[0].model_max_length
    return {
        "version": f"minidiff {version('minidiff')}",
        "weights": pipe.settings.get("weights"),
        "defaults": usual(pipe),
        "lengths": [clip, clip, pipe.max_sequence_length],
        "tokenizers": [tokenizer_table(t) for t in pipe.tokenizers],
        "unicode": unicode_tables(),
        "text_encoders": [asdict(encoder.config) for encoder in pipe.text_encoders],
        "transformer": asdict(pipe.transformer.config),
        "vae": asdict(pipe.vae.config),
        "scheduler": asdict(pipe.scheduler),
        "solvers": pipe.scheduler.solvers,
    }


def tokenizer_table(tokenizer: CLIPTokenizer | T5Tokenizer) -> dict[str, Any]:
    """Pieces by id, and what cuts a text into them: merges, or scores and a map."""
    t, pieces = tokenizer, tokenizer.pieces
    table = {
        "pieces": [pieces.get(i) for i in range(max(pieces) + 1)],
        "added": [token._asdict() for token in t.settings.added],
        "length": t.model_max_length,
        "bos": t.bos_token_id,
        "eos": t.eos_token_id,
        "pad": t.pad_token_id,
        "unk": t.unk_token_id,
    }
    if isinstance(t, CLIPTokenizer):
        return table | {"merges": list(map(" ".join, t.ranks))}
    return table | {
        "scores": list(t.scores.values()),
        "charsmap": in_base64(t.charsmap),
    }


def unicode_tables() -> dict[str, Any]:
    """Classes of characters in JavaScript's syntax, and capitals that are too new."""
    capitals = {chr(a): chr(b) for a, b in tokenizer_files.NEW_CAPITALS.items()}
    return {
        "letter": in_javascript(tokenizer_files.LETTER),
        "number": in_javascript(tokenizer_files.NUMBER),
        "young": in_javascript(tokenizer_files.YOUNG.pattern[1:-1]),
        "capitals": capitals,
    }


def in_javascript(pattern: str) -> str:
    r"""``\U0000abcd`` as ``\u{abcd}``."""
    return re.sub(r"\\U0*([0-9a-f]+)", r"\\u{\1}", pattern)


# Weights


def write_part(folder: Path, part: str, module: nn.Module) -> dict[str, Any]:
    """Write the weights of a part; its file's name, and where each tensor begins."""
    table: dict[str, list[int]] = {}
    pieces, offset = [], 0
    for name, x in laid_out(module).items():
        table[name] = [offset, *x.shape]
        pieces.append(F.pad(x.flatten(), (0, -x.numel() % PANEL)))
        offset += len(pieces[-1])
    halves = torch.cat(pieces).half()
    if not halves.isfinite().all():
        raise ValueError(f"{part} has weights beyond half precision, 65,504")
    content = halves.numpy().tobytes()
    file = f"{part}-{sha256(content).hexdigest()[:8]}"
    with replacing(folder / f"{file}.bin") as grown:
        grown.write_bytes(content)
    start = f"minidiff.weights[{file!r}] = "
    write_script(folder / f"{file}.js", start, in_base64(content))
    return {"file": file, "table": table}


@torch.no_grad()
def laid_out(module: nn.Module) -> dict[str, Tensor]:
    """A part's tensors by name, those of products as the kernel reads them."""
    found = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            found[f"{name}.weight"] = in_panels(layer)
            if layer.bias is not None:
                padding = (0, -len(layer.bias) % PANEL)
                found[f"{name}.bias"] = F.pad(layer.bias, padding)
    return {name: x.detach().float().cpu() for name, x in found.items()}


def in_panels(layer: nn.Linear | nn.Conv2d) -> Tensor:
    """Panels of eight columns, (⌈N/8⌉, K, 8); of a 3 × 3 convolution, for each of its
    rows, where K are the channels of three neighbours."""
    weight = layer.weight
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
        rows = weight.permute(2, 0, 3, 1)  # (N, C, 3, 3) → (3, N, 3, C)
        return torch.stack([panels(row.flatten(1)) for row in rows])
    return panels(weight.flatten(1))


def panels(weight: Tensor) -> Tensor:
    """(N, K) → (⌈N/8⌉, K, 8), the last filled up with zeros."""
    full = F.pad(weight, (0, 0, 0, -len(weight) % PANEL))
    return full.unflatten(0, (-1, PANEL)).mT  # (N, K) → (N/8, 8, K) → (N/8, K, 8)


# Files


def in_base64(content: bytes) -> str:
    """In base64."""
    return base64.b64encode(content).decode()


def write_script(file: Path, start: str, content: Any) -> None:
    """A script of one assignment, which begins with ``start``."""
    text = json.dumps(content, separators=(",", ":"))
    write_text(file, f"{start}{text};\n")
