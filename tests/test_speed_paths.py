"""The fused and the compiled forms compute what the chapters' classes compute."""

import copy
import gc
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import randomize, relative_error
from small import AUTOENCODER, TRANSFORMER, inputs, transformer
from torch import nn
from torch.nn.attention import SDPBackend

import minidiff
from benchmarks import full_size_cpu, gpu
from minidiff import efficiency
from minidiff.attention import JointAttention, record_attention
from minidiff.dit import MMDiT
from minidiff.engine import fast, kernels, memory
from minidiff.engine.fast import FastDecoder, FastMMDiT, attention_backend
from minidiff.engine.loading import TOKENIZERS, read_tokenizers
from minidiff.engine.memory import to_float8
from minidiff.files.weights import TINY
from minidiff.learning.run import read_log
from minidiff.lora import add_lora
from minidiff.vae import VAE, Decoder, VAEConfig

CONFIGS = {
    "dual": TRANSFORMER,
    "no dual, five blocks": replace(
        TRANSFORMER, num_layers=5, dual_attention_layers=()
    ),
    "three heads, all but the last dual": replace(
        TRANSFORMER,
        num_attention_heads=3,
        attention_head_dim=8,
        dual_attention_layers=(0, 1),
    ),
}


# The transformer


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(
    "sizes",
    [{}, {"batch": 1, "height": 2, "width": 2}, {"batch": 3, "length": 1}],
    ids=["two", "one", "three"],
)
@torch.no_grad()
def test_fast_transformer(config, sizes):
    model, given = transformer(config), inputs(config, **sizes)
    run = FastMMDiT.of(model)
    assert relative_error(run(*given), model(*given)) < 1e-5
    skipped = {"skip_layers": (1,)}
    assert relative_error(run(*given, **skipped), model(*given, **skipped)) < 1e-5
    latents, _, context, _ = given
    ahead = model.modulations(given[1], given[3])
    out = run(latents, None, context, None, modulations=ahead)
    assert relative_error(out, model(*given)) < 1e-5


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("skip", [(), (1, 2), (0, 1, 2, 3, 4)])
@torch.no_grad()
def test_fast_blocks_take_controls(count, skip):
    """Behind skipped blocks too, where more than two updates come together."""
    config = CONFIGS["no dual, five blocks"]
    model, given = transformer(config), inputs(config)
    controls = [torch.randn(2, 24, config.width) for _ in range(count)]
    expected = model(*given, skip_layers=skip, controls=controls)
    kept = [control.clone() for control in controls]
    found = FastMMDiT.of(model)(*given, skip_layers=skip, controls=controls)
    assert relative_error(found, expected) < 1e-5
    assert relative_error(found, FastMMDiT.of(model)(*given, skip_layers=skip)) > 1e-2
    assert all(map(torch.equal, kept, controls))


@torch.no_grad()
def test_a_fast_form_shares_the_layers():
    model, given = transformer(), inputs(TRANSFORMER)
    quick = FastMMDiT.of(model)
    assert quick.state_dict().keys() == model.state_dict().keys()
    quick.final_layer.linear.weight.mul_(2)
    assert relative_error(quick(*given), model(*given)) < 1e-5
    with torch.device("meta"):  # as an MMDiT it is built from a configuration too
        assert FastMMDiT(TRANSFORMER).state_dict().keys() == model.state_dict().keys()


@torch.no_grad()
def test_one_modulation_serves_every_sample():
    model, (x, sigma, context, pooled) = transformer(), inputs(TRANSFORMER)
    ahead = model.modulations(sigma[:1], pooled[:1])
    call = (x, None, context, None)
    expected = model(*call, modulations=ahead)
    found = FastMMDiT.of(model)(*call, modulations=ahead)
    assert relative_error(found, expected) < 1e-5


@torch.no_grad()
def test_fast_in_bfloat16_is_as_exact_as_the_chapters():
    model, (x, sigma, context, pooled) = transformer(), inputs(TRANSFORMER)
    exact = model(x, sigma, context, pooled)
    low = x.bfloat16(), sigma, context.bfloat16(), pooled.bfloat16()
    model.bfloat16()
    plain = relative_error(model(*low), exact)
    assert relative_error(FastMMDiT.of(model)(*low), exact) < 1.3 * plain


@torch.no_grad()
def test_the_fast_decoder_in_bfloat16_is_as_exact_as_the_chapters():
    vae, latents = randomize(VAE(AUTOENCODER)), torch.randn(2, 16, 12, 12)
    exact, low = vae.decoder(latents), latents.bfloat16()
    vae.bfloat16()
    plain = relative_error(vae.decoder(low), exact)
    assert relative_error(FastDecoder.of(vae.decoder)(low), exact) < 1.03 * plain


@torch.no_grad()
def test_faint_tokens_are_normed_as_others():
    """Below 1e-3 the ε of a norm counts: 1e-6, not PyTorch's 1e-5."""
    model, (x, sigma, context, pooled) = transformer(), inputs(TRANSFORMER)
    for weight in (
        *model.x_embedder.parameters(),
        *model.context_embedder.parameters(),
    ):
        weight *= 1e-3
    model.pos_embed *= 1e-3
    expected = model(x, sigma, context, pooled)
    found = FastMMDiT.of(model)(x, sigma, context, pooled)
    assert relative_error(found, expected) < 1e-5


def swapped(x, updates, modulations, fp8=False):
    return kernels.residual_norm(x, updates, [(b, a) for a, b in modulations], fp8)


def ungated(x, updates, modulations, fp8=False):
    ones = [(y, torch.ones_like(gate)) for y, gate in updates]
    return kernels.residual_norm(x, ones, modulations, fp8)


def one_stream(qkv, weight, heads, boundary=0):
    kernels.norm_heads(qkv, weight, heads, 0)


@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("residual_norm", swapped),
        ("residual_norm", ungated),
        ("norm_heads", one_stream),
    ],
)
@torch.no_grad()
def test_a_mistake_would_show(monkeypatch, name, mutant):
    model, given = transformer(), inputs(TRANSFORMER)
    monkeypatch.setattr(fast, name, mutant)
    assert relative_error(FastMMDiT.of(model)(*given), model(*given)) > 1e-3


def test_gradients_and_recording_take_the_models_own_way():
    model, given = transformer(), inputs(TRANSFORMER)
    with torch.no_grad(), record_attention(model) as expected:
        model(*given)
    quick = FastMMDiT.of(model)
    with torch.no_grad(), record_attention(quick) as maps:
        quick(*given)
    assert all(torch.equal(maps[i][0], expected[i][0]) for i in range(3))
    given[0].requires_grad_()
    quick(*given).sum().backward()
    assert given[0].grad.abs().sum() > 0


@torch.no_grad()
def test_lora_that_is_not_fused_runs():
    from minidiff import lora

    model, given = transformer(), inputs(TRANSFORMER)
    before = FastMMDiT.of(model)(*given)
    updates = lora.add_lora(model, rank=2, names=("to_q", "ff.net.0.proj"))
    for update in updates.values():
        randomize(update)
    after = FastMMDiT.of(model)(*given)
    assert relative_error(after, before) > 1e-3
    assert relative_error(after, model(*given)) < 1e-5


@torch.no_grad()
def test_fp8_products_stay_close():
    model, given = transformer(), inputs(TRANSFORMER)
    exact = model(*given)
    to_float8(model)
    stored = model(*given)
    assert fast.multiplies_in_fp8(model)
    assert relative_error(FastMMDiT.of(model)(*given), stored) < 1e-5
    error = relative_error(FastMMDiT.of(model, fp8=True)(*given), exact)
    assert relative_error(stored, exact) < error < 0.15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_gpu_multiplies_in_fp8_beside_bfloat16_alone(monkeypatch, dtype):
    model, tried = on_a_gpu(monkeypatch, (9, 0), dtype), []
    monkeypatch.setattr(fast, "float8_product", lambda *given: tried.append(given))
    assert fast.multiplies_in_fp8(model) == (dtype == torch.bfloat16)
    assert len(tried) == (dtype == torch.bfloat16)
    assert not fast.multiplies_in_fp8(on_a_gpu(monkeypatch, (9, 0), dtype, width=24))


def on_a_gpu(monkeypatch, capability, dtype=torch.bfloat16, width=32):
    """A stand-in for a model in fp8 on a GPU of some capability."""
    weight = SimpleNamespace(dtype=fast.FLOAT8, is_cuda=True, device="cpu")
    bias = torch.zeros(1, dtype=dtype)
    layer = SimpleNamespace(weight=weight, bias=bias, in_features=width)
    block = SimpleNamespace(x_block=SimpleNamespace(mlp=SimpleNamespace(fc1=layer)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    return SimpleNamespace(joint_blocks=[block])


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_a_gpu_that_fails_at_fp8_products_does_without(monkeypatch, kind):
    def fail(*_):
        raise kind("no kernel")

    monkeypatch.setattr(fast, "float8_product", fail)
    assert not fast.multiplies_in_fp8(on_a_gpu(monkeypatch, (12, 0)))

    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(fast, "float8_product", full)
    with pytest.raises(torch.OutOfMemoryError):
        fast.multiplies_in_fp8(on_a_gpu(monkeypatch, (12, 0)))


def test_compilation_needs_a_gpu_that_knows_fp8(folder, monkeypatch):
    """Told before a weight is read."""
    assert not fast.multiplies_in_fp8(on_a_gpu(monkeypatch, (8, 6)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(memory, "free_memory", lambda *_: 1e12)
    monkeypatch.setattr(memory, "place_part", lambda *_: pytest.fail("work began"))
    with pytest.raises(ValueError, match="this GPU does not know; expected compute"):
        minidiff.load(folder, "cuda", compile=True, fp8=True)


@pytest.mark.parametrize("major", [8, 9, 10, 12])
def test_attention_asks_for_what_is_best_on_the_card(monkeypatch, major):
    weight = on_a_gpu(monkeypatch, (major, 0)).joint_blocks[0].x_block.mlp.fc1.weight
    for version, right in ((None, False), (91500, False), (91501, True)):
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda v=version: v)
        expected = "cudnn" if right and major in (9, 10) else None
        assert fast.preferred_attention(weight) == expected
    assert fast.preferred_attention(torch.zeros(1)) is None


def test_the_wanted_backend_is_tried_first(monkeypatch):
    asked = []

    def kernel(backends, set_priority=False):
        asked.append((backends, set_priority))
        return nullcontext()

    monkeypatch.setattr(fast, "sdpa_kernel", kernel)
    with attention_backend("flash"):
        ((backends, in_order),) = asked
    assert in_order and backends[0] == SDPBackend.FLASH_ATTENTION
    assert len(set(backends)) == 4


def test_quantization_keeps_a_sixteenth():
    x = torch.randn(5, 300) * torch.logspace(-4, 4, 5)[:, None]
    rows = kernels.quantize(x)
    restored = rows.values.float() * rows.scale
    assert ((restored - x).abs() <= x.abs() / 16 + rows.scale / 512).all()
    assert (rows.values.float().abs().amax(1) == 448).all()
    zeros = kernels.quantize(torch.zeros(1, 4))
    assert not zeros.values.float().any() and zeros.scale.isfinite().all()


def test_models_without_head_norms_are_refused():
    with pytest.raises(ValueError, match="qk_norm None; fast expects 'rms_norm'"):
        FastMMDiT.of(MMDiT(replace(TRANSFORMER, qk_norm=None)))
    with pytest.raises(ValueError, match="backend is 'quick'; expected one of cudnn"):
        with attention_backend("quick"):
            pass


# The decoder


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("config", [VAEConfig.tiny(), AUTOENCODER], ids=["tiny", "32"])
@torch.no_grad()
def test_fast_decoder(config, fold):
    vae, latents = randomize(VAE(config)), torch.randn(2, 16, 3, 5)
    expected = vae.decode(latents)
    assert relative_error(FastDecoder.of(vae.decoder, fold)(latents), expected) < 1e-5


@torch.no_grad()
def test_a_wrong_fold_would_show(monkeypatch):
    vae, latents = randomize(VAE(AUTOENCODER)), torch.randn(1, 16, 4, 4)
    expected = vae.decode(latents)
    right = efficiency.folded_kernel
    monkeypatch.setattr(efficiency, "folded_kernel", lambda u: right(u).flip(0))
    assert relative_error(FastDecoder.of(vae.decoder)(latents), expected) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("how", ["loaded", "learned"])
def test_weights_that_change_later_are_seen(how):
    model, given = transformer(), inputs(TRANSFORMER)
    vae, latents = randomize(VAE(AUTOENCODER)), torch.randn(1, 16, 4, 4)
    quick, decode = FastMMDiT.of(model), FastDecoder.of(vae.decoder)
    for part in (model, vae):
        if how == "loaded":
            part.load_state_dict({n: 1.5 * x for n, x in part.state_dict().items()})
        else:
            for weight in part.parameters():
                weight.mul_(1.5)
    assert relative_error(quick(*given), model(*given)) < 1e-5
    assert relative_error(decode(latents), vae.decode(latents)) < 1e-5


# Whole pictures


@pytest.fixture
def folder(small):
    return small


def draw(pipe, **settings):
    pipe.progress = False
    call = {"prompt": "a red dress", "num_inference_steps": 3, "output_type": "pt"}
    return pipe(**call | {"guidance_scale": 3.0} | settings)


@pytest.mark.parametrize("knobs", [{}, {"modulation": "streamed"}, {"vae_tile": 8}])
def test_fast_pictures(folder, knobs):
    sizes = {"height": 48, "width": 32}
    plain = minidiff.load(folder, fast=False, **knobs)
    assert type(plain.transformer) is MMDiT and type(plain.vae.decoder) is Decoder
    expected = draw(plain, **sizes)
    pipe = minidiff.load(folder, fast=True, **knobs)
    assert isinstance(pipe.transformer, FastMMDiT)
    assert isinstance(pipe.vae.decoder, FastDecoder)
    assert relative_error(draw(pipe, **sizes), expected) < 1e-5


@pytest.mark.slow
def test_what_load_gives_on_a_cpu(folder, monkeypatch):
    """The fused forms, where nothing but the order of sums changes."""
    monkeypatch.setattr(fast, "keep_freed_memory", lambda: 1 / 0)
    pipe = minidiff.load(folder)
    assert isinstance(pipe.transformer, FastMMDiT) and not pipe.transformer.fp8
    assert isinstance(pipe.vae.decoder, FastDecoder) and "fast" not in pipe.settings
    expected = draw(minidiff.load(folder, fast=False))
    assert relative_error(draw(pipe), expected) < 1e-5
    stored = minidiff.load(folder, fp8=True)
    exact = draw(minidiff.load(folder, fp8=True, fast=False))
    assert relative_error(draw(stored), exact) < 1e-5
    half = minidiff.load(folder, dtype=torch.bfloat16)
    assert type(half.transformer) is MMDiT and type(half.vae.decoder) is Decoder
    with pytest.raises(ZeroDivisionError):
        minidiff.load(folder, fast=True)


@torch.no_grad()
def test_without_head_norms_load_takes_the_chapters_blocks():
    model = MMDiT(replace(TRANSFORMER, qk_norm=None))
    vae = VAE(AUTOENCODER)
    assert fast.accelerate(model, vae, fast=None) is model
    assert isinstance(vae.decoder, FastDecoder)


@torch.no_grad()
def test_another_layer_in_a_fused_form_is_heard():
    """A reader's class, or a forward of its own, in place of a chapter's."""

    class Apart(JointAttention):
        def forward(self, context, image):
            return context.v.flatten(2), image.v.flatten(2)

    model, given = transformer(), inputs(TRANSFORMER)
    quick, before = FastMMDiT.of(model), model(*given)
    model.joint_blocks[1].attention = Apart()
    assert relative_error(quick(*given), model(*given)) < 1e-6
    assert relative_error(quick(*given), before) > 1e-3
    vae, latents = randomize(VAE(AUTOENCODER)), torch.randn(1, 16, 4, 4)
    decode = FastDecoder.of(vae.decoder)
    vae.decoder.mid["attn_1"].forward = lambda x: x
    assert relative_error(decode(latents), vae.decoder(latents)) < 1e-6


@torch.no_grad()
def test_a_lora_that_has_not_learned_changes_no_bit():
    model, given = transformer(), inputs(TRANSFORMER)
    quick = FastMMDiT.of(model)
    before = quick(*given)
    assert add_lora(model, rank=2)
    assert torch.equal(quick(*given), before)


@torch.no_grad()
def test_hooks_see_the_layers_of_a_fused_form():
    model, given = transformer(), inputs(TRANSFORMER)
    quick, seen = FastMMDiT.of(model), []
    for layer in (model.joint_blocks[1].x_block.mlp.fc1, model.final_layer):
        layer.register_forward_hook(lambda *_: seen.append(1))
    vae = randomize(VAE(AUTOENCODER))
    decode = FastDecoder.of(vae.decoder)
    decode.up[0]["block"][0].conv1.register_forward_pre_hook(lambda *_: seen.append(1))
    quick(*given)
    decode(torch.randn(1, 16, 4, 4))
    assert len(seen) == 3


@pytest.fixture
def compiles(monkeypatch):
    """Compile for the test's backend, which counts and changes nothing."""
    counted = []

    def backend(graph, _):
        counted.append(graph)
        return graph.forward

    original = nn.Module.compile

    def compile(module, **settings):
        original(module, backend=backend, **settings)

    monkeypatch.setattr(nn.Module, "compile", compile)
    torch._dynamo.reset()
    yield counted
    torch._dynamo.reset()


@pytest.mark.slow
@torch.no_grad()
def test_blocks_of_a_kind_share_what_is_compiled(compiles):
    config = replace(TRANSFORMER, num_layers=5, dual_attention_layers=(0, 1))
    model = transformer(config)
    given = {batch: inputs(config, batch) for batch in (2, 1)}
    expected = {batch: model(*given[batch]) for batch in given}
    model = fast.CompiledMMDiT.of(model)
    for batch, kinds in ((2, 3), (1, 6)):
        assert relative_error(model(*given[batch]), expected[batch]) < 1e-5
        assert len(compiles) == kinds  # with dual attention, without, and the last


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:T5 reads")
def test_each_kind_of_block_is_compiled_once_for_all_sizes(folder, compiles):
    expected = minidiff.load(folder)
    pipe = minidiff.load(folder, compile=True)
    assert relative_error(draw(pipe), draw(expected)) < 1e-5
    assert len(compiles) == 3  # with dual attention, without, and the last
    for settings in (
        {"height": 48, "width": 32},
        {"max_sequence_length": 9},
        {"num_images_per_prompt": 3, "num_inference_steps": 2},
    ):
        again = relative_error(draw(pipe, **settings), draw(expected, **settings))
        assert again < 1e-5
    assert len(compiles) == 3
    assert torch.fx.experimental._config.use_duck_shape  # as it was for others


@pytest.mark.slow
def test_a_copy_of_a_compiled_model_has_weights_of_its_own(compiles):
    model, given = transformer(), inputs(TRANSFORMER)
    model = fast.CompiledMMDiT.of(model)
    copied, before = copy.deepcopy(model), model(*given)
    copied.final_layer.linear.weight.mul_(2)
    copied.final_layer.linear.bias.mul_(2)
    assert relative_error(copied(*given), 2 * before) < 1e-5
    assert torch.equal(model(*given), before)


# The Triton kernels, interpreted and as machine code

LEAN = """
import sys
import minidiff
pipe = minidiff.load("tiny")
pipe("a bag", num_inference_steps=1)
print([name for name in ("triton", "torch._dynamo", "sympy") if name in sys.modules])
"""


@pytest.mark.slow
def test_a_drawing_imports_neither_triton_nor_the_compiler():
    """They cost seconds, and serve a card or ``compile`` alone."""
    command = [sys.executable, "-c", LEAN]
    assert subprocess.check_output(command, text=True).strip() == "[]"


needs_triton = pytest.mark.skipif(
    not importlib.util.find_spec("triton"), reason="no Triton here"
)


def run_with_triton(script, *given, **environment):
    folder = Path(__file__).parent
    paths = os.pathsep.join([str(folder), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths} | environment
    command = [sys.executable, folder / script, *given]
    subprocess.run(command, env=environment, check=True)


@pytest.mark.slow
@needs_triton
def test_triton_kernels_compute_the_plain_forms():
    run_with_triton("interpreted_kernels.py", TRITON_INTERPRET="1")


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("capability", ["80", "90"], ids=["A100", "H100"])
def test_triton_kernels_become_machine_code(tmp_path, capability):
    run_with_triton("machine_code.py", capability, TRITON_CACHE_DIR=str(tmp_path))


# The benchmark for a GPU, rehearsed at tiny size


def test_the_gpu_benchmark_leaves_out_other_models():
    found = gpu.chosen(["card", "step-medium", "step-large"], ["large"])
    assert found == ["card", "step-large"]
    assert gpu.chosen(list(gpu.STAGES), list(gpu.MODELS)) == list(gpu.STAGES)


def test_the_gpu_benchmark_goes_on_with_what_it_has_not_begun(tmp_path):
    log = tmp_path / "results.jsonl"
    records = {"stage": "card", "done": True}, {"stage": "t5", "begun": True}
    log.write_text("".join(f"{json.dumps(r)}\n" for r in records))
    assert gpu.waiting(log, ["card", "t5", "decode"]) == ["decode", "t5"]


def test_the_gpu_benchmark_lets_tokenizers_read_more(tmp_path):
    for tokenizer in read_tokenizers(TINY, TOKENIZERS):
        gpu.longer(tokenizer, 77).save_pretrained(tmp_path)
        again = type(tokenizer).from_pretrained(tmp_path)
        assert again(["a"]).shape == tokenizer(["a"]).shape == (1, 77)


@pytest.mark.slow
def test_the_gpu_benchmark_runs_and_goes_on(tmp_path, monkeypatch):
    output = tmp_path / "results.jsonl"
    words = ["--tiny", "--no-compile", "--output", output]
    words += ["--folder", tmp_path / "weights", "--stages", *gpu.STAGES]
    output.write_text('{"stage": "card", "done": true}\n{"stage": "ca\n')  # a kill
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, words)])
    gpu.main()
    gc.unfreeze()
    found = read_log(output)
    assert {r["stage"] for r in found if r.get("done")} == {*gpu.STAGES}
    assert not [r for r in found if r.get("failed") or r.get("skipped")]
    assert len([r for r in found if r["stage"] == "card"]) == 1
    steps = [r for r in found if r["stage"] == "step" and "fp8" not in r["rung"]]
    exact = [r["error"] for r in steps if r.get("error") is not None]
    assert len(exact) > 8 and max(exact) < 1e-5


def test_the_gpu_benchmark_measures_nothing_twice(tmp_path):
    asked, end = [], math.inf

    def draw(what):
        asked.append(what)
        time.sleep(1e-3)
        return torch.ones(3)

    for _ in range(2):  # but the first call, whose result the others are compared with
        device, output = torch.device("cpu"), tmp_path / "results.jsonl"
        bench = gpu.Bench(output, end, device, True, 1, tmp_path)
        compare = gpu.Compare(bench, stage="t5")
        for what in ("diffusers", "fast"):
            compare(what, partial(draw, what))
        assert compare.seconds.keys() == {"diffusers", "fast"}
        bench.emit(stage="t5", done=False, seconds=1.0)
    kinds = [what for what, _ in itertools.groupby(asked)]
    assert kinds == ["diffusers", "fast", "diffusers"]


# What is asked of ``load``


@pytest.mark.slow
def test_what_load_turns_on(folder, compiles):
    pipe = minidiff.load(folder, fast=True, fp8=True)
    assert isinstance(pipe.transformer, FastMMDiT)
    assert pipe.transformer.fp8
    pipe = minidiff.load(folder, fast=True, compile=True)
    assert not isinstance(pipe.transformer, FastMMDiT)
    assert isinstance(pipe.vae.decoder, FastDecoder)


@torch.no_grad()
def test_pixels_are_read_in_several_parts():
    vae, latents = randomize(VAE(VAEConfig.tiny())), torch.randn(1, 16, 48, 44)
    assert latents[0, 0].numel() > 2048  # at a time
    found = FastDecoder.of(vae.decoder)(latents)
    assert relative_error(found, vae.decode(latents)) < 1e-5


@pytest.mark.slow
def test_the_full_size_benchmark_rehearsed(tmp_path, monkeypatch, capsys):
    """In one process: each drawing's own takes seconds to start."""
    pytest.importorskip("diffusers")
    monkeypatch.setattr(full_size_cpu, "alone", full_size_cpu.draw)
    full_size_cpu.main(
        ["--folder", str(tmp_path / "model"), "--tiny", "--threads", "1"]
    )
    lines = capsys.readouterr().out.splitlines()
    found = {line[:15].strip(): float(line.split()[-1]) for line in lines[-3:]}
    assert tuple(found) == full_size_cpu.TURNS
    assert all(1e-4 < far < 1.5 * found["diffusers"] for far in found.values())
    kept = (tmp_path / "model" / "model_index.json").stat().st_mtime_ns
    full_size_cpu.write(tmp_path / "model", True)
    assert (tmp_path / "model" / "model_index.json").stat().st_mtime_ns == kept
