"""Files and answers that are damaged, hostile or careless: one line a case.

Each is refused in one line that names the file, says what was found and what was
expected, and repeats little of it; or it is read, and the right thing comes out.
"""

import base64
import json
import os
import shutil
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import short
from safetensors.torch import save_file
from torch import nn

import minidiff
from minidiff import lora
from minidiff.dit import MMDiT, MMDiTConfig
from minidiff.files import (
    disk,
    layout,
    sentencepiece,
    single_file,
    weights,
)
from minidiff.files.lora_files import METADATA
from minidiff.files.sentencepiece import read_model
from minidiff.flow_matching import Scheduler
from minidiff.text_encoders import CLIPTextConfig, CLIPTextEncoder, T5Config, T5Encoder
from minidiff.tokenizer import CLIPTokenizer, T5Tokenizer
from minidiff.vae import VAE, VAEConfig

LONG = "x" * 1_000_000


def refused(message: str, call: Callable[[], Any]) -> None:
    """``call`` raises one short line that ``message`` is found in."""
    with pytest.raises((ValueError, OSError), match=message) as failed:
        call()
    told = str(failed.value)
    assert "\n" not in told and len(told) < 700, told[:1000]


# What is no file, or too large


def make(kind: str, path: Path) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("nowhere")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound, suppress(OSError):
            bound.bind(str(path))
    elif kind == "large":
        with path.open("wb") as file:
            file.truncate(200_000_000)


READERS = {
    "prompts.txt": disk.read_prompts,
    "model_index.json": lambda path: layout.read_index(path.parent),
    "config.json": partial(layout.read_config, VAEConfig),
    "scheduler_config.json": partial(layout.read_config, Scheduler),
    "spiece.model": read_model,
    "a.safetensors": weights.open_tensors,
    "lora.safetensors": lambda path: lora.read_lora(path, {}),
}
KINDS = [
    ("nothing", "is missing"),
    ("pipe", "is a pipe; expected a file"),
    ("folder", "is a folder; expected a file"),
    ("link", "is a link to a file that is missing"),
    ("device", "is a device; expected a file"),
    ("socket", "is a socket; expected a file"),
    ("large", "has 200,000,000 bytes; expected at most|not a whole safetensors"),
]


@pytest.mark.parametrize(("kind", "message"), KINDS)
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_is_not_opened(tmp_path, monkeypatch, name, kind, message):
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    make(kind, Path(name))
    if kind == "large" and "safetensors" in name:
        Path(name).write_bytes(b"\xff" * 8 + bytes(100))
    refused(f"{name} {message}", lambda: READERS[name](tmp_path / name))


TEXTS = [
    (b"", "holds no prompt; expected one on each line"),
    (b" \n\t\n", "holds no prompt"),
    (b"\xff\xfe\x00", "is not a text in UTF-8"),
    (b"a red dress\xc3", "is not a text in UTF-8"),
    (b"\xef\xbb\xbfa bag\r\n\r\n a hat \n", ["a bag", "a hat"]),
]


@pytest.mark.parametrize(("content", "expected"), TEXTS)
def test_prompts(tmp_path, content, expected):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    if isinstance(expected, list):
        assert disk.read_prompts(file) == expected
    else:
        refused(f"prompts.txt {expected}", lambda: disk.read_prompts(file))


def test_no_more_prompts_are_read_than_can_be_drawn(monkeypatch):
    monkeypatch.setattr(disk, "read_lines", lambda _: map(str, count()))
    refused("over 100,000 prompts", lambda: disk.read_prompts("endless"))


def test_a_file_that_grows_is_read_to_its_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "check_length", lambda *_: None)
    file = tmp_path / "log.txt"
    file.write_bytes(b"x" * 11)
    assert disk.read_bytes(file, 11) == b"x" * 11
    refused("log.txt has over 10 bytes", lambda: disk.read_bytes(file, 10))


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="Linux alone has it")
def test_what_fails_while_it_is_read_is_named():
    with pytest.raises(OSError, match="/proc/self/mem"):
        disk.read_text("/proc/self/mem")


JSONS = [
    ("", "is not valid JSON: Expecting value"),
    ("{", "is not valid JSON: Expecting property name"),
    ("null", "holds a NoneType; expected an object"),
    ("[]", "holds a list; expected an object"),
    ('"a"', "holds a str; expected an object"),
    ("[" * 100_000, "is not valid JSON: nested too deeply"),
    ('{"a":' * 100_000, "is not valid JSON: nested too deeply"),
    ("1" * 5_000, "is not valid JSON: Exceeds the limit"),
    ('{"a": "' + LONG[:500_000], "is not valid JSON: Unterminated string"),
    (" " * 1_000_001, "has 1,000,001 bytes; expected at most 1,000,000"),
]


@pytest.mark.parametrize(("content", "message"), JSONS, ids=short)
def test_json(tmp_path, content, message):
    file = tmp_path / "config.json"
    file.write_text(content)
    refused(f"config.json {message}", lambda: disk.read_json(file))


# Configurations: values as JSON has them


CONFIGS = [
    (MMDiTConfig, "num_layers", "0", "is 0; expected 1 to 128"),
    (MMDiTConfig, "num_layers", "1000", "is 1000; expected 1 to 128"),
    (MMDiTConfig, "num_layers", "9223372036854775808", "expected 1 to 128"),
    (MMDiTConfig, "num_layers", "1" + "0" * 400, "is 10*…; expected 1 to"),
    (MMDiTConfig, "num_layers", "true", "is True; expected int"),
    (MMDiTConfig, "num_layers", "2.0", "is 2.0; expected int"),
    (MMDiTConfig, "num_layers", '"2"', "is '2'; expected int"),
    (MMDiTConfig, "num_layers", "null", "is None; expected int"),
    (MMDiTConfig, "num_layers", "[2]", "is .2,.; expected int"),
    (MMDiTConfig, "num_attention_heads", "-1", "is -1; expected 1 to"),
    (MMDiTConfig, "attention_head_dim", "1e999", "is inf; expected int"),
    (MMDiTConfig, "sample_size", "99999999999", "expected 1 to 1.04858e.06"),
    (MMDiTConfig, "out_channels", "99999999999", "expected 1 to 1.04858e.06"),
    (MMDiTConfig, "out_channels", "{}", "is {}; expected int . None"),
    (MMDiTConfig, "dual_attention_layers", "[-1]", "is .-1,.; expected 0 to 127"),
    (MMDiTConfig, "dual_attention_layers", "[99]", "layers .99.: the model has 24"),
    (MMDiTConfig, "dual_attention_layers", "[true]", "expected tuple"),
    (MMDiTConfig, "dual_attention_layers", "3", "is 3; expected tuple"),
    (MMDiTConfig, "dual_attention_layers", f"{[0] * 129}", "expected at most 128 ent"),
    (MMDiTConfig, "qk_norm", '"layer"', "qk_norm 'layer': expected 'rms_norm'"),
    (MMDiTConfig, "qk_norm", f'"{LONG[:500_000]}"', "qk_norm is 'xxx*…; expected"),
    (VAEConfig, "layers_per_block", "1000", "is 1000; expected 1 to 8"),
    (VAEConfig, "block_out_channels", "[]", "is ..; expected tuple"),
    (VAEConfig, "block_out_channels", f"{[32] * 2000}", "expected at most 8 entries"),
    (VAEConfig, "block_out_channels", "[0, 1]", "expected 1 to 1.04858e.06"),
    (VAEConfig, "block_out_channels", '["a"]', "expected tuple"),
    (VAEConfig, "scaling_factor", "NaN", "is nan; expected -3e.38 to 3e.38"),
    (VAEConfig, "scaling_factor", "1e999", "is inf; expected -3e.38 to 3e.38"),
    (VAEConfig, "shift_factor", '"0"', "is '0'; expected float"),
    (VAEConfig, "norm_num_groups", "0", "is 0; expected 1 to"),
    (CLIPTextConfig, "num_hidden_layers", "4096", "is 4096; expected 1 to 128"),
    (CLIPTextConfig, "eos_token_id", "-1", "is -1; expected 0 to"),
    (CLIPTextConfig, "hidden_act", "5", "is 5; expected str"),
    (CLIPTextConfig, "layer_norm_eps", "-1", "is -1; expected 0 to 1"),
    (T5Config, "num_layers", "129", "is 129; expected 1 to 128"),
    (T5Config, "relative_attention_num_buckets", "0", "is 0; expected 1 to"),
    (T5Config, "layer_norm_epsilon", "Infinity", "is inf; expected 0 to 1"),
    (Scheduler, "shift", "1e300", "is 1e.300; expected 0.001 to 1000"),
    (Scheduler, "shift", "0", "is 0; expected 0.001 to 1000"),
    (Scheduler, "shift", "NaN", "is nan; expected 0.001 to 1000"),
    (Scheduler, "num_train_timesteps", "1e18", "expected int"),
]
SOUND = {
    CLIPTextConfig: "vocab_size hidden_size intermediate_size num_hidden_layers "
    "num_attention_heads",
    T5Config: "vocab_size d_model d_kv d_ff num_layers num_heads",
}


@pytest.mark.parametrize(("kind", "name", "value", "message"), CONFIGS)
def test_configurations(tmp_path, kind, name, value, message):
    needed = dict.fromkeys(SOUND.get(kind, "").split(), 8)
    file = tmp_path / "config.json"
    content = json.dumps(needed | {name: "here"}).replace('"here"', value)
    file.write_text(content)
    call = partial(layout.read_config, kind, tmp_path)
    refused(f"config.json: {name}.*{message}|config.json: .*{message}", call)


def test_the_largest_model_that_is_allowed_is_built_in_seconds():
    began = time.thread_time()
    with torch.device("meta"):
        VAE(VAEConfig(block_out_channels=(32,) * 8, layers_per_block=8))
    assert time.thread_time() - began < 10  # 2,000 levels took 120


# Safetensors: what a model of one layer (2, 2) is read from


def safetensors(header: Any, data: bytes = b"") -> bytes:
    """A file of that header, JSON or bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape: Any, dtype: str = "F32", begin: Any = 0, end: Any = None) -> dict:
    size = {"F64": 8, "I64": 8, "C64": 8, "F32": 4, "I32": 4}.get(dtype, 2)
    size = 1 if dtype in ("BOOL", "U8", "I8", "F8_E4M3") else size
    stop = begin + size * torch.Size(shape).numel() if end is None else end
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, stop]}


WEIGHT = {"weight": entry([2, 2])}
RAW = [
    (b"", "is not a whole safetensors file .0 bytes"),
    (b"\x05", "is not a whole safetensors file"),
    (b"\xff" * 8, "is not a whole safetensors file"),
    (b"version https://git-lfs", "is Git LFS's pointer to weights that are not here"),
    (safetensors(b"["), "is not a whole safetensors"),
    (safetensors(b"\xff\xfe{}"), "is not a whole safetensors"),
    (safetensors(b"null"), "is not a whole safetensors"),
    (safetensors(b'"weight"'), "is not a whole safetensors"),
    (safetensors(b'{"a":' * 50_000), "is not a whole safetensors"),
    (safetensors(b'{"a":[],' * 100_000 + b'"b":[]}'), "is not a whole safetensors"),
    (safetensors(b"{" + b" " * 10_000_000 + b"}"), "is not a whole safetensors file"),
    (safetensors({"weight": None}), "is not a whole safetensors"),
    (safetensors({"weight": {"shape": [2, 2]}}), "is not a whole safetensors"),
    (
        safetensors({"weight": WEIGHT["weight"] | {"shape": 4}}, bytes(16)),
        "is not a whole safetensors",
    ),
    (
        safetensors({"__metadata__": 5} | WEIGHT, bytes(16)),
        "is not a whole safetensors",
    ),
    (
        safetensors({"__metadata__": {"a": 5}} | WEIGHT, bytes(16)),
        "is not a whole safetensors",
    ),
    (safetensors({}), "holds no tensors; expected 1"),
    (safetensors(WEIGHT, bytes(15)), "is not a whole safetensors file"),
    (safetensors(WEIGHT, bytes(17)), "is not a whole safetensors file"),
    (
        safetensors({"weight": entry([2, 2], end=2**70)}, bytes(16)),
        "is not a whole safetensors",
    ),
    (
        safetensors({"weight": entry([2, 2], end=-1)}, bytes(16)),
        "is not a whole safetensors",
    ),
    (
        safetensors({"weight": entry([2, -2], end=16)}, bytes(16)),
        "is not a whole safetensors",
    ),
    (
        safetensors({"weight": entry([2**63], end=16)}, bytes(16)),
        "is not a whole safetensors",
    ),
    (
        safetensors({"weight": entry([2.5], end=16)}, bytes(16)),
        "is not a whole safetensors",
    ),
    (
        safetensors({"weight": entry([2], end=8)}, bytes(8)),
        r"weight has shape \[2\]; ex",
    ),
    (safetensors({"weight": entry([])}, bytes(4)), r"weight has shape \[\]; expected"),
    (safetensors({"weight": entry([1] * 9_999)}, bytes(4)), r"has shape \[1, .*…; exp"),
    (safetensors({"wait": entry([2, 2])}, bytes(16)), "lacks 1 tensors: weight"),
    (
        safetensors(WEIGHT | {LONG: entry([0], begin=16)}, bytes(16)),
        "has 1 unexpected tensors: xxx*…",
    ),
    (
        safetensors(
            WEIGHT | {f"{i}": entry([0], begin=16) for i in range(9)}, bytes(16)
        ),
        "has 9 unexpected tensors: 0, 1, 2 and 6 more",
    ),
    *(
        (
            safetensors({"weight": entry([2, 2], kind)}, bytes(size)),
            f"weight is {kind}; ",
        )
        for kind, size in (
            *(("I16", 8), ("U16", 8), ("I64", 32), ("I32", 16), ("U8", 4)),
            *(("BOOL", 4), ("C64", 32)),
        )
    ),
    (
        safetensors({"weight": entry([2, 2], LONG)}, bytes(8)),
        "is not a whole safetensors file .*: .*x*…",
    ),
    (
        safetensors({"weight": entry([2, 2], begin=4)}, bytes(20)),
        "is not a whole .*ffset",
    ),
]


@pytest.mark.parametrize(("content", "message"), RAW, ids=short)
def test_safetensors(tmp_path, content, message):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with torch.device("meta"):
        model = nn.Linear(2, 2, bias=False)

    def load() -> None:
        weights.prepare_weights(model, [file])("cpu", torch.float32)

    refused(f"model.safetensors.* {message}|{tmp_path} {message}", load)


KEPT = ["F64", "F32", "F16", "BF16", "F8_E4M3"]


@pytest.mark.parametrize("kind", KEPT)
def test_weights_of_every_floating_kind_are_read(tmp_path, kind):
    header, file = {"weight": entry([2, 2], kind)}, tmp_path / "a.safetensors"
    size = header["weight"]["data_offsets"][1]
    file.write_bytes(safetensors(header, bytes(size)))
    with torch.device("meta"):
        model = nn.Linear(2, 2, bias=False)
    read = weights.prepare_weights(model, [file])("cpu", torch.float32)
    assert torch.equal(read.weight, torch.zeros(2, 2))


@pytest.mark.parametrize("name", ["a.bin", "a.pt", "a.ckpt", "a.pkl", "a.pth"])
def test_pickled_files_are_not_opened(tmp_path, name):
    refused(f"{name} is a pickled", lambda: weights.open_tensors(tmp_path / name))


def test_each_file_is_opened_once(tmp_path, monkeypatch):
    names = [f"{i}.safetensors" for i in range(3)]
    for i, name in enumerate(names):
        save_file({f"{i}.weight": torch.ones(2, 2)}, tmp_path / name)
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(3)))
    opened = []
    original = weights.safe_open
    monkeypatch.setattr(
        weights,
        "safe_open",
        lambda file, kind: opened.append(file) or original(file, kind),
    )
    prepared = weights.prepare_weights(model, [tmp_path / name for name in names])
    for _ in range(2):
        prepared("cpu", torch.float32)
    assert opened == [tmp_path / name for name in names]


# The index of shards, and variants


def shard(name: str = "weight", shape: tuple[int, ...] = (2, 2)) -> dict:
    return {name: torch.ones(shape)}


INDEX = [
    ("{}", {}, "index.json names no files"),
    ('{"weight_map": null}', {}, "index.json names no files"),
    ('{"weight_map": ["a"]}', {}, "index.json names no files"),
    ('{"weight_map": {"a": "../b"}}', {}, "names '../b'; expected files beside it"),
    ('{"weight_map": {"a": "/etc/b"}}', {}, "names '/etc/b'; expected files beside"),
    ('{"weight_map": {"a": ""}}', {}, "names ''; expected files beside it"),
    (f'{{"weight_map": {{"a": "../{LONG}"}}}}', {}, "names '../xxx*…; expected"),
    ('{"weight_map": {"a": "b.bin"}}', {}, "b.bin is a pickled checkpoint"),
    ('{"weight_map": {"a": 5}}', {}, "5 is missing"),
    ('{"weight_map": {"a": "b\\u0000"}}', {}, "is not a file's name"),
    ('{"weight_map": {"weight": "a"}}', {}, "a is missing"),
    ('{"weight_map": {"weight": "a"}}', {"a": shard("b")}, "lacks 1 tensors: weight"),
    (
        '{"weight_map": {"weight": "a", "b": "b"}}',
        {"a": shard(), "b": shard()},
        "weight is in .*b and a; expected it in one file",
    ),
    ('{"weight_map": {"weight": "a"}}', {"a": shard()}, ""),
]


@pytest.mark.parametrize(("index", "files", "message"), INDEX, ids=short)
def test_shards(tmp_path, index, files, message):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    for name, tensors in files.items():
        save_file(tensors, tmp_path / name)
    with torch.device("meta"):
        model = nn.Linear(2, 2, bias=False)

    def load() -> nn.Linear:
        return weights.prepare_weights(model, weights.weight_files(tmp_path))(
            "cpu", None
        )

    if message:
        refused(message, load)
    else:
        assert torch.equal(load().weight, torch.ones(2, 2))


PLAIN, FP16 = "model.safetensors", "model.fp16.safetensors"
SPLIT = ["model.fp16-00001-of-00002.safetensors", "model.safetensors.index.fp16.json"]
VARIANTS = [
    ([PLAIN, FP16], None, [PLAIN]),
    ([PLAIN, FP16], "fp16", [FP16]),
    ([PLAIN], "fp16", [PLAIN]),
    ([PLAIN, *SPLIT], "fp16", SPLIT[:1]),
    ([FP16], None, "expected .* .found model.fp16.safetensors.; variant='fp16' reads"),
    (SPLIT, None, "found model.fp16-00001.*; variant='fp16' reads them"),
    (["model.fp8.safetensors"], "fp16", "no weights in .*found model.fp8.safetensors"),
    ([f"a{i}.safetensors" for i in range(16)], None, "a0.*, a1.*, a10.* and 13 more"),
]


@pytest.mark.parametrize(("names", "variant", "expected"), VARIANTS)
def test_variants(tmp_path, names, variant, expected):
    for name in names:
        (tmp_path / name).write_text(json.dumps({"weight_map": {"a": SPLIT[0]}}))
    if isinstance(expected, str):
        refused(expected, lambda: weights.weight_files(tmp_path, variant))
    else:
        found = weights.weight_files(tmp_path, variant)
        assert found == [tmp_path / name for name in expected]


@pytest.mark.slow
def test_a_variant_is_read_where_a_part_has_it(tmp_path):
    folder = shutil.copytree(weights.TINY, tmp_path / "model")
    plain = folder / "vae" / weights.WEIGHTS[0]
    plain.rename(folder / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    kept, usual = minidiff.load(folder, variant="fp16"), minidiff.load(weights.TINY)
    for name, tensor in usual.vae.state_dict().items():
        assert torch.equal(kept.vae.state_dict()[name], tensor)
    for how, message in (
        ({}, "no weights in .*vae.*; variant='fp16' reads them"),
        (
            {"variant": "fp8"},
            "variant is 'fp8'; .*model has no weights that are",
        ),
        ({"variant": "../x"}, "variant is '../x'; expected a name"),
        ({"revision": "main"}, "revision is 'main', but .*model is here; expected the"),
    ):
        refused(message, lambda how=how: minidiff.load(folder, **how))


# Tokenizers: the shipped one, something in it changed


TINY_CLIP, TINY_T5 = weights.TINY / "tokenizer", weights.TINY / "tokenizer_3"


def edited(folder: Path, name: str, change: Callable[[dict], Any]) -> None:
    """``change`` gets the JSON file's content, and may return another."""
    file = folder / name
    content = json.loads(file.read_text()) if file.exists() else {}
    changed = change(content)
    text = changed if isinstance(changed, str) else json.dumps(changed or content)
    file.write_text(text)


def put(**values: Any) -> Callable[[dict], Any]:
    return lambda content: content.update(values)


CONFIG, MAP = "tokenizer_config.json", "special_tokens_map.json"
VOCAB, WHOLE = "vocab.json", "tokenizer.json"
TWO = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}
CLIP = [
    (VOCAB, lambda c: "{}", "merge 0 .* has symbols not in the vocabulary"),
    (VOCAB, lambda c: "[]", "vocab.json holds a list; expected an object"),
    (VOCAB, put(new=3), "two pieces have the id 3"),
    (VOCAB, put(new=-1), "expected a BPE vocabulary of pieces and ids"),
    (VOCAB, put(new=2**63), "expected a BPE vocabulary of pieces and ids"),
    (VOCAB, put(new=1.5), "expected a BPE vocabulary of pieces and ids"),
    (VOCAB, put(new=True), "expected a BPE vocabulary of pieces and ids"),
    (VOCAB, put(new="7"), "expected a BPE vocabulary of pieces and ids"),
    ("merges.txt", lambda c: "a", "merge 0 is .'a'., expected two symbols"),
    ("merges.txt", lambda c: f"{LONG} a", "merge 0 .'xxx.*… has symbols not"),
    ("merges.txt", lambda c: LONG, "merge 0 is .'xxx.*…, expected two symbols"),
    ("merges.txt", lambda c: "x" * 10_000_001, "merges.txt has 10,000,001 bytes; exp"),
    (WHOLE, lambda c: "[" + "[]," * 4_000_000, "tokenizer.json has 12,000,001 bytes"),
    (WHOLE, lambda c: {}, "expected a BPE vocabulary"),
    (WHOLE, put(model=[]), "expected a BPE vocabulary"),
    (WHOLE, put(model=TWO | {"vocab": {"a": 0, "b": 0}}), "two pieces have the id 0"),
    (WHOLE, put(model=TWO | {"merges": [["a"]]}), "merge 0 is .'a'., expected two"),
    (WHOLE, put(model=TWO | {"merges": 5}), "merge 0 is 5, expected two symbols"),
    (WHOLE, put(model=TWO, normalizer={"type": "NFKD"}), "the normalizer 'NFKD'; exp"),
    (WHOLE, put(model=TWO, added_tokens="abc"), "added_tokens is 'abc'; expected a"),
    (WHOLE, put(model=TWO, added_tokens=[{"id": 1}]), "an added token with a content"),
    (CONFIG, put(model_max_length=1), "model_max_length is 1; expected a number, at"),
    (CONFIG, put(model_max_length=-5), "model_max_length is -5; expected a number"),
    (CONFIG, put(model_max_length=0), "model_max_length is 0; expected a number"),
    (CONFIG, put(model_max_length="77"), "model_max_length is '77'; expected a num"),
    (CONFIG, put(model_max_length=float("nan")), "model_max_length is nan; expected"),
    (CONFIG, put(model_max_length=None), "model_max_length is None; expected"),
    (
        CONFIG,
        put(bos_token={"content": ""}),
        "a token with a content, found|added token",
    ),
    (CONFIG, put(bos_token=5), "expected an added token with a content, found 5"),
    (CONFIG, put(added_tokens_decoder=[1]), "the tokenizer's settings: "),
    (CONFIG, put(added_tokens_decoder={"a": "b"}), "the tokenizer's settings: invalid"),
    (CONFIG, put(added_tokens_decoder={"9": {"content": ""}}), "an added token with a"),
    (
        CONFIG,
        put(added_tokens_decoder={"9": {"content": 5}}),
        "an added token with a c",
    ),
    (CONFIG, put(added_tokens_decoder={"9": {LONG: 5}}), "with a content, found .*…"),
    (
        CONFIG,
        put(added_tokens_decoder={"9": {"content": "a", "single_word": True}}),
        "added token 'a': single_word is unsupported",
    ),
    (
        CONFIG,
        put(added_tokens_decoder={str(i): f"t{i}" for i in range(10_001)}),
        "10003 added tokens; expected at most 10000",
    ),
    (CONFIG, put(additional_special_tokens="abc"), "is 'abc'; expected a list"),
    (CONFIG, put(additional_special_tokens=[""]), "an added token with a content"),
    (CONFIG, put(extra_ids=10**9), "extra_ids is 1000000000; expected a whole number"),
    (CONFIG, put(extra_ids=-1), "extra_ids is -1; expected a whole number"),
    (CONFIG, put(extra_ids="9"), "extra_ids is '9'; expected a whole number"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "change", "message"), CLIP, ids=short)
def test_clips_tokenizer(tmp_path, name, change, message):
    folder = shutil.copytree(TINY_CLIP, tmp_path / "tokenizer")
    if name == WHOLE:  # all that it says counts
        (folder / CONFIG).unlink()
    if name == "merges.txt":
        (folder / name).write_text(change({}))
    else:
        edited(folder, name, change)
    refused(f"tokenizer.*{message}", lambda: CLIPTokenizer.from_pretrained(folder))


def scores(*pieces: Any) -> Callable[[dict], Any]:
    def change(content: dict) -> None:
        content["model"]["vocab"] += pieces

    return change


def charsmap(text: Any) -> Callable[[dict], Any]:
    step = {"type": "Precompiled", "precompiled_charsmap": text}
    return put(normalizer={"type": "Sequence", "normalizers": [step]})


UNIGRAM = [
    (put(model=None), "expected a Unigram model, found "),
    (put(model={"type": "BPE"}), "expected a Unigram model, found model type 'BPE'"),
    (put(model={"type": "Unigram"}), "expected a Unigram model, found 'vocab'"),
    (put(model={"type": "Unigram", "vocab": []}), "the vocabulary is empty"),
    (put(model={"type": "Unigram", "vocab": 5}), "expected a Unigram model, found "),
    (put(model={"type": LONG}), "expected a Unigram model, found model type 'xx.*…"),
    (scores("ab"), "expected a Unigram model, found "),
    (scores(["a"]), "expected a Unigram model, found not enough values"),
    (scores(["new", "high"]), "expected a Unigram model, found could not convert"),
    (scores(["new", None]), "expected a Unigram model, found "),
    (scores(["</s>", -1.0]), "the vocabulary lists a piece twice"),
    (scores(["", -1.0]), "has an empty piece"),
    (scores(["new", float("nan")]), "the score of 'new' is nan; expected a finite"),
    (scores(["new", float("-inf")]), "the score of 'new' is -inf; expected a finite"),
    (scores(["new", 10**400]), "expected a Unigram model, found int too large"),
    (charsmap("####"), "expected a Unigram model, found Only base64|found Non-base64"),
    (charsmap("AA"), "expected a Unigram model, found Incorrect padding"),
    (charsmap(5), "expected a Unigram model, found argument should be"),
    (charsmap("AAAA"), "precompiled_charsmap is cut short"),
    (charsmap("AAAAAA=="), "precompiled_charsmap is empty"),
    (charsmap(base64.b64encode(b"\xff" * 8).decode()), "precompiled_charsmap is cut"),
    (put(normalizer={"type": "Lowercase"}), "has the normalizer 'Lowercase'; expected"),
    (put(normalizer={"type": LONG}), "has the normalizer 'xxx*…; expected"),
    (put(normalizer={"type": None}), "has the normalizer None; expected"),
]


@pytest.mark.parametrize(("change", "message"), UNIGRAM, ids=short)
def test_t5s_tokenizer(tmp_path, change, message):
    folder = shutil.copytree(TINY_T5, tmp_path / "tokenizer")
    edited(folder, WHOLE, change)
    refused(f"tokenizer.json.*{message}", lambda: T5Tokenizer.from_pretrained(folder))


def field(number: int, value: bytes | int) -> bytes:
    """A field of a protocol buffer: bytes, or a small integer."""
    if isinstance(value, int):
        return bytes([number << 3, value])
    size, length = len(value), b""
    while size > 127:
        size, length = size >> 7, length + bytes([size & 127 | 128])
    return bytes([number << 3 | 2]) + length + bytes([size]) + value


def piece(text: bytes, score: float = 0.0) -> bytes:
    return field(1, field(1, text) + b"\x15" + struct.pack("<f", score))


ENDS = piece(b"<pad>") + piece(b"</s>") + piece(b"<unk>")
SPIECE = [
    (b"", "found type 1 with 0 pieces"),
    (ENDS + field(2, field(3, 2)), "expected a Unigram model .*, found type 2"),
    (field(1, b""), "is not a readable spiece.model"),
    (piece(b"\xff"), "is not a readable spiece.model"),
    (ENDS[:-1], "is not a readable spiece.model: the file ends inside a field"),
    (b"\x0b", "is not a readable spiece.model: unknown wire type 3"),
    (b"\x08" + b"\xff" * 1_000_000, "is not a readable spiece.model: an integer of mo"),
    (bytes(10_000_001), "spiece.model has 10,000,001 bytes; expected at most"),
    (piece(b"a") * 1_001, "is not a readable spiece.model: more than 1,000 pieces"),
    (ENDS + piece(b"a") * 2, "the vocabulary lists a piece twice"),
    (ENDS + piece(b""), "has an empty piece"),
    (ENDS + piece(b"a", float("nan")), "the score of 'a' is nan; expected a finite"),
    (ENDS + field(3, field(2, b"abc")), "precompiled_charsmap is cut short"),
]


@pytest.mark.parametrize(("content", "message"), SPIECE, ids=short)
def test_spiece_model(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(sentencepiece, "MOST_PIECES", 1_000)
    (tmp_path / "spiece.model").write_bytes(content)
    refused(f"spiece.model.*{message}", lambda: T5Tokenizer.from_pretrained(tmp_path))


def test_a_character_does_not_become_a_book(tmp_path):
    """A map by which "a" becomes a million letters is refused when it is used."""
    units = [0] * 98
    units[97] = 97 | 1 << 8 | 1 << 10  # "a", a value follows at 97 ^ 1 = 96
    data = struct.pack("<I98I", 4 * 98, *units) + LONG.encode() + b"\0"
    folder = shutil.copytree(TINY_T5, tmp_path / "tokenizer")
    edited(folder, WHOLE, charsmap(base64.b64encode(data).decode()))
    tokenizer = T5Tokenizer.from_pretrained(folder)
    refused("precompiled_charsmap is damaged", lambda: tokenizer.encode("a"))


# LoRA files of one layer


PART = "transformer.transformer_blocks.0.attn.to_q"
ALPHA, PATTERN = "transformer.lora_alpha", "transformer.alpha_pattern"
A, B = f"{PART}.lora_A.weight", f"{PART}.lora_B.weight"
GOOD = {A: torch.ones(2, 32), B: torch.ones(32, 2)}
SMALL = MMDiTConfig(
    sample_size=8,
    num_layers=2,
    attention_head_dim=8,
    num_attention_heads=4,
    joint_attention_dim=24,
    pooled_projection_dim=20,
    pos_embed_max_size=6,
)
CONV = "transformer.pos_embed.proj.lora_"
LORAS = [
    ({}, None, "holds no LoRA: it has no tensors"),
    ({A: GOOD[A]}, None, "of .*to_q it has down; expected all matrices"),
    (GOOD | {f"{PART}.lora_C": torch.ones(1)}, None, "has .*lora_C; expected"),
    ({A: GOOD[A].int(), B: GOOD[B].int()}, None, "lora_A.weight is I32; expected one"),
    ({A: GOOD[A].bool(), B: GOOD[B].bool()}, None, "lora_A.weight is BOOL; expected"),
    ({A: GOOD[A].to(torch.complex64), B: GOOD[B]}, None, "is C64; expected one of F64"),
    (
        {A: torch.ones(2), B: GOOD[B]},
        None,
        r"lora_A.weight has shape \[2\]; expected a",
    ),
    ({A: torch.ones(2, 0), B: GOOD[B]}, None, r"has shape \[2, 0\]; expected a matrix"),
    (
        {A: torch.ones(3, 32), B: GOOD[B]},
        None,
        r"of shapes \[32, 2\] and \[3, 32\]; expected one rank",
    ),
    (
        {A: torch.ones(2, 31), B: GOOD[B]},
        None,
        r"of shape \[32, 31\]; expected \[32, 32",
    ),
    ({LONG: GOOD[A]}, None, "has xxx*…; expected LoRA, LoHa, LoKr or DoRA"),
    ({f"transformer.{LONG}": GOOD[A]}, None, "has transformer.xx*…; expected LoRA"),
    (
        {"lora_unet_joint_blocks_0.lora_down.weight": GOOD[A]},
        None,
        "kohya keys.: of lora_unet_joint_blocks_0 it has down",
    ),
    (
        {"base_model.model.a.lora_A.weight": GOOD[A]},
        None,
        "peft keys.: of base_model.model.a it has down",
    ),
    (
        {f"{CONV}A.weight": torch.ones(2, 16, 2, 2), f"{CONV}B.weight": GOOD[B]},
        None,
        "updates transformer.pos_embed.proj, which is a Conv2d; expected linear layers",
    ),
    (
        {k.replace("blocks.0", "blocks.9"): t for k, t in GOOD.items()},
        None,
        "was made for another model: this one has no linear layer transformer",
    ),
    (
        {k.replace("transformer.", "text_encoder_2.", 1): t for k, t in GOOD.items()},
        None,
        "updates text_encoder_2, a CLIPTextModelWithProjection, which this pipeline le",
    ),
    (
        GOOD | {f"{PART}.lora_magnitude_vector": torch.ones(1)},
        None,
        r"shape \[1\]; exp",
    ),
    (GOOD, {"transformer.use_rslora": 3, ALPHA: 4}, 2.0),  # no truth value
    (GOOD, "{", "metadata is '{'; expected a JSON object"),
    (GOOD, "null", "metadata is 'null'; expected a JSON object"),
    (GOOD, '{"a":' * 100_000, "metadata is .*; expected a JSON object"),
    (GOOD, " " * 1_000_001, "metadata has 1,000,001 characters; expected at most"),
    (GOOD, {ALPHA: float("inf")}, "α of .*to_q is inf; expected a number"),
    (GOOD, {ALPHA: 10**400}, "α of .*to_q is 10*…; expected a number"),
    (GOOD, {ALPHA: True}, "α of .*to_q is True; expected a number"),
    (GOOD, {ALPHA: "8"}, "α of .*to_q is '8'; expected a number"),
    (GOOD, {ALPHA: LONG[:9_999]}, "α of .*to_q is 'xxx*…; expected a number"),
    (GOOD, {PATTERN: {"to_q": [1]}}, "α of .*to_q is .1.; expected a number"),
    (GOOD, {PATTERN: "to_q"}, "alpha_pattern is 'to_q'; expected layers and numbers"),
    (GOOD, {PATTERN: {"((a{1000}){1000}){1000}": 4}}, "has '.*'; expected the name"),
    (GOOD, {PATTERN: {"(.|.)+[A-Z]": 4}}, "expected the name of a layer, or its end"),
    (GOOD, {PATTERN: {"|".join(map(str, range(99_999))): 4}}, "has '0.1.*…; expected"),
    (GOOD, {PATTERN: {"": 4}}, "has ''; expected the name of a layer, or its end"),
    (GOOD, {PATTERN: {"^to_q$": 4}}, "has '.to_q.'; expected the name of a layer"),
    (GOOD, {PATTERN: {f"l{i}": i for i in range(10_000)}}, 1.0),
    (GOOD, {PATTERN: {"q": 4, "o_q": 4, "ttn.to_q": 4}}, 1.0),  # not whole words
    (GOOD, {PATTERN: {"^attn.to_q": 4, "^to_q": 4}}, 1.0),  # an end, no whole name
    (GOOD, {PATTERN: {"^transformer_blocks.0.attn.to_q": 4, "to_q": 8}}, 2.0),
    (GOOD, {PATTERN: {r"^transformer_blocks\.0\.attn\.to_q": 4}}, 2.0),
    (GOOD, {PATTERN: {"^": 4}}, r"has '\^'; expected the name of a layer, or its end"),
    (GOOD, {PATTERN: {"to_q": 4}}, 2.0),
    (GOOD, {PATTERN: {"attn.to_q": 8, "to_q": 4}}, 4.0),
    (GOOD, {PATTERN: {"to_k": 8, "to_q": 4, "attn.to_q": 8}}, 2.0),
    (GOOD, {PATTERN: {r"0\.attn\.to_q": 6}, ALPHA: 1}, 3.0),
    (GOOD, {PATTERN: None, ALPHA: 1}, 0.5),
    ({k: t.half() for k, t in GOOD.items()}, None, 1.0),
]


@pytest.mark.parametrize(("tensors", "notes", "expected"), LORAS, ids=short)
def test_lora_files(tmp_path, tensors, notes, expected):
    file = tmp_path / "lora.safetensors"
    text = notes if isinstance(notes, str) else json.dumps(notes)
    save_file(tensors, file, {METADATA: text} if notes else None)
    with torch.device("meta"):
        models = {"transformer": MMDiT(SMALL)}
    if isinstance(expected, str):
        refused(f"lora.safetensors.*{expected}", lambda: lora.read_lora(file, models))
    else:
        read = lora.read_lora(file, models)["transformer"]
        assert read[PART.removeprefix("transformer.")].scale == expected


# Official single files: a transformer's, some shapes changed


PREFIX = single_file.TRANSFORMER


def shapes_of(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def write_shapes(file: Path, shapes: dict[str, list[int]]) -> None:
    """A file of zeros, which takes no room on most disks."""
    header, end = {}, 0
    for name, shape in shapes.items():
        header[name] = entry(shape, "F16", end)
        end = header[name]["data_offsets"][1]
    with file.open("wb") as stream:
        stream.write(safetensors(header))
        stream.truncate(stream.tell() + end)


SINGLES = [
    (
        {"x_embedder.proj.weight": [32]},
        "x_embedder.proj.weight has shape .32.; expected",
    ),
    (
        {"x_embedder.proj.weight": [32, 16, 0, 0]},
        "expected 4 dimensions, none of them 0",
    ),
    (
        {"x_embedder.proj.weight": [0, 16, 2, 2]},
        "expected 4 dimensions, none of them 0",
    ),
    (
        {"x_embedder.proj.weight": [30, 16, 2, 2]},
        "num_attention_heads is 0; expected 1",
    ),
    ({"x_embedder.proj.weight": None}, "it lacks .*x_embedder.proj.weight"),
    ({"x_embedder.proj.bias": None}, "lacks 1 tensors: .*x_embedder.proj.bias"),
    (
        {"x_embedder.proj.bias": [31]},
        "x_embedder.proj.bias has shape .31.; expected .64",
    ),
    ({"pos_embed": []}, "pos_embed has shape ..; expected 3 dimensions"),
    (
        {"pos_embed": [1, 0, 32]},
        "pos_embed has shape .1, 0, 32.; expected 3 dimensions",
    ),
    ({"pos_embed": [1, 37, 64]}, "pos_embed has shape .1, 37, 64.; expected .1, 36"),
    ({"final_layer.linear.weight": [0, 64]}, "expected 2 dimensions, none of them 0"),
    ({"final_layer.linear.weight": [1, 64]}, "out_channels is 0; expected 1 to"),
    (
        {"context_embedder.weight": [64]},
        "context_embedder.weight has shape .64.; expect",
    ),
    ({"y_embedder.mlp.0.weight": [64, 1, 1]}, "y_embedder.mlp.0.weight has shape"),
    ({"joint_blocks.10000.a": [0]}, "it numbers 10001 layers and has .* tensors"),
    ({"joint_blocks.999999999.a": [0]}, "it numbers 1000000000 layers and has"),
    (
        {"joint_blocks.9999999999.a": [0]},
        "has 1 unexpected tensors: .*joint_blocks.9999",
    ),
    (
        {f"joint_blocks.{i}.a": [0] for i in range(200)},
        "num_layers is 200; expected 1 to",
    ),
    ({"joint_blocks.5.a": [0]}, "lacks .* tensors: .*joint_blocks"),
    ({"joint_blocks.-1.a": [0]}, "has 1 unexpected tensors: .*joint_blocks.-1.a"),
    ({LONG: [0]}, "has 1 unexpected tensors: model.diffusion_model.xxx*…"),
]


@pytest.mark.parametrize(("changed", "message"), SINGLES, ids=short)
def test_single_files(tmp_path, changed, message):
    config = MMDiTConfig(
        num_layers=2,
        num_attention_heads=1,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        pos_embed_max_size=6,
    )
    with torch.device("meta"):
        shapes = shapes_of(MMDiT(config)) | changed
    known = {PREFIX + n: shape for n, shape in shapes.items() if shape is not None}
    file = tmp_path / "sd3.5_large.safetensors"
    write_shapes(file, known)
    call = partial(single_file.prepare_part, "transformer", MMDiT, MMDiTConfig, file)
    refused(f"sd3.5_large.safetensors.*{message}", call)


OTHERS = [
    ("vae", {"decoder.conv_in.weight": [8, 16, 3, 3]}, "is no vae: .*block_out_channe"),
    ("vae", {"decoder.up.500.a": [0]}, "is no vae: it numbers 501 layers and has"),
    ("vae", {}, "is no vae: it lacks first_stage_model.decoder.conv_in.weight"),
    ("text_encoder", {"text_model.final_layer_norm.weight": []}, "none of them 0"),
    ("text_encoder", {}, "is no text_encoder: it lacks text_model.final_layer_norm"),
    ("text_encoder_2", {"a": [3]}, "is no text_encoder_2: it lacks text_model.embedd"),
    (
        "text_encoder_3",
        {"shared.weight": [0, 0]},
        "is no text_encoder_3: it lacks enco",
    ),
]
CLASSES = {
    "vae": (VAE, VAEConfig),
    "text_encoder": (CLIPTextEncoder, CLIPTextConfig),
    "text_encoder_2": (CLIPTextEncoder, CLIPTextConfig),
    "text_encoder_3": (T5Encoder, T5Config),
}


@pytest.mark.parametrize(("part", "shapes", "message"), OTHERS)
def test_other_parts_of_single_files(tmp_path, part, shapes, message):
    prefix, file = single_file.PARTS[part][0], tmp_path / "a.safetensors"
    write_shapes(file, {prefix + name: shape for name, shape in shapes.items()})
    call = partial(single_file.prepare_part, part, *CLASSES[part], file)
    refused(f"a.safetensors.*{message}", call)


def test_whole_numbers_are_no_dtype_to_save_in(tmp_path):
    call = partial(weights.save_weights, nn.Linear(2, 2), tmp_path / "a", None)
    refused("dtype is torch.int8; expected one of floating", lambda: call(torch.int8))
    refused("dtype is 'float16'; expected one of floating", lambda: call("float16"))
    assert not list(tmp_path.iterdir())
