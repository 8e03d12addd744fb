"""What a careless or hostile caller gives: the right result, or one clear line."""

import math
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from small import small_pipeline

import minidiff
from minidiff.drawing import image_to_image as module
from minidiff.drawing.image_to_image import image_to_image
from minidiff.files import weights
from minidiff.files.layout import recognize
from minidiff.interface.request import Request
from minidiff.sampling import Pipeline
from minidiff.text_encoders import T5Config, T5Encoder

NAN, INF, HUGE = math.nan, math.inf, 10**30
LATENTS = torch.zeros(1, 16, 8, 8)
CONTEXT, POOLED = torch.zeros(1, 32, 48), torch.zeros(1, 40)
EMBEDS = {"prompt_embeds": CONTEXT, "pooled_prompt_embeds": POOLED}
NEGATIVE_EMBEDS = {f"negative_{name}": embeds for name, embeds in EMBEDS.items()}
FAST = {"num_inference_steps": 2, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory) -> Pipeline:
    """A small model; its CLIPs read 12 tokens, its T5 20."""
    return small_pipeline(tmp_path_factory.mktemp("tokenizers"))


# A call's arguments, and the error's line
CALLS = [
    ({"prompt": None}, "prompt is a NoneType; expected a string or a list"),
    ({"prompt": 3}, "prompt is a int; expected a string"),
    ({"prompt": b"a"}, "prompt is a bytes; expected a string"),
    ({"prompt": {"a": 1}}, "prompt is a dict; expected a string"),
    ({"prompt": []}, "prompt is an empty list"),
    ({"prompt": ()}, "prompt is an empty list"),
    ({"prompt": ["a", None]}, "prompt is a list; expected a string"),
    ({"prompt": [["a"]]}, "prompt is a list; expected a string"),
    ({"prompt": "bad \udcff byte"}, "prompt is not a text in UTF-8"),
    ({"prompt_2": ["a", "b"]}, "prompt_2 has 2 texts; expected one string, or 1"),
    ({"prompt_3": 7}, "prompt_3 is a int"),
    ({"negative_prompt": 7}, "negative_prompt is a int"),
    ({"negative_prompt": ["a", "b"]}, "negative_prompt has 2 texts"),
    ({"negative_prompt_2": ["a", "b"]}, "negative_prompt_2 has 2 texts"),
    ({"num_inference_steps": 0}, "num_inference_steps is 0; expected .* 1 to 1000"),
    ({"num_inference_steps": 1001}, "num_inference_steps is 1001"),
    ({"num_inference_steps": HUGE}, "num_inference_steps is 1000000000"),
    ({"num_inference_steps": 2.5}, "num_inference_steps is 2.5"),
    ({"num_inference_steps": True}, "num_inference_steps is True"),
    ({"num_inference_steps": "28"}, "num_inference_steps is '28'"),
    ({"num_inference_steps": [28]}, r"num_inference_steps is \[28\]"),
    ({"guidance_scale": NAN}, "guidance_scale is nan; expected a finite number"),
    ({"guidance_scale": -INF}, "guidance_scale is -inf"),
    ({"guidance_scale": "4"}, "guidance_scale is '4'"),
    ({"guidance_scale": [4.0]}, r"guidance_scale is \[4.0\]"),
    ({"guidance_scale": 10**400}, "guidance_scale is 1000"),
    ({"guidance_scale": torch.ones(1)}, "guidance_scale is tensor"),
    ({"height": 0}, "height is 0; expected a multiple of 8 up to 96"),
    ({"height": -8}, "height is -8"),
    ({"height": 33}, "height is 33.*the nearest is 32"),
    ({"height": 64.0}, "height is 64.0; expected a whole number"),
    ({"width": "64"}, "width is '64'; expected a whole number"),
    ({"width": HUGE}, "width is 1000000000"),
    ({"width": 10**400}, "width is 1000.*the nearest is 96"),
    ({"height": -(10**400)}, "height is -1000.*the nearest is 8"),
    ({"width": True}, "width is True"),
    ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
    ({"num_images_per_prompt": -1}, "num_images_per_prompt is -1"),
    ({"num_images_per_prompt": 1.5}, "num_images_per_prompt is 1.5"),
    ({"num_images_per_prompt": 10**9}, "num_images_per_prompt is 1000000000; expected"),
    (
        {"prompt": ["a", "b"], "num_images_per_prompt": 60_000},
        "2 × 60,000 pictures are asked for; expected at most 100,000",
    ),
    ({"num_images_per_prompt": None}, "num_images_per_prompt is None"),
    ({"seed": -1}, "seed is -1"),
    ({"seed": 2**64}, "seed is 18446744073709551616"),
    ({"seed": 1.5}, "seed is 1.5"),
    ({"seed": [3, 77]}, r"seed is \[3, 77\]; expected a whole number"),
    ({"seed": "7"}, "seed is '7'"),
    ({"generator": torch.Generator()}, "no argument 'generator' .here it is seed"),
    ({"generator": None}, "no argument 'generator' .here it is seed"),
    ({"torch_dtype": 1}, "no argument 'torch_dtype'; expected prompt, prompt_2"),
    ({"latents": [0]}, "latents is a list; expected a tensor .B, C, h, w."),
    ({"latents": np.zeros((1, 16, 8, 8))}, "latents is a ndarray; expected a tensor"),
    ({"latents": LATENTS[0]}, r"latents has shape \(16, 8, 8\); expected \(B, C,"),
    (
        {"latents": LATENTS[:, :4]},
        r"latents have shape \(1, 4, 8, 8\); expected \(1, 16",
    ),
    ({"latents": LATENTS[..., :0]}, "latents has shape"),
    (
        {"latents": LATENTS * NAN},
        "latents is a tensor of torch.float32; expected",
    ),
    ({"latents": LATENTS.int()}, "latents is a tensor of torch.int32"),
    ({"latents": LATENTS.to("meta")}, "meta; expected dense real numbers, not on meta"),
    ({"latents": LATENTS.to_sparse()}, "torch.sparse_coo, cpu; expected dense real"),
    ({"latents": LATENTS.cfloat()}, "latents is a tensor of torch.complex64"),
    ({"latents": LATENTS.repeat(2, 1, 1, 1)}, r"latents have shape \(2, 16"),
    (
        {"latents": LATENTS, "height": 40},
        r"latents have shape .*; expected \(1, 16, ",
    ),
    ({"sigmas": [1.0, 0.0]}, "sigmas is a list; expected a tensor"),
    ({"sigmas": torch.ones(1)}, "sigmas is 1 level; expected two or more"),
    ({"sigmas": torch.ones(2, 2)}, "sigmas has shape"),
    (
        {"sigmas": torch.tensor([1.0, NAN, 0.0])},
        "sigmas is a tensor .* finite",
    ),
    ({"sigmas": torch.tensor([1, 0])}, "sigmas is a tensor of torch.int64"),
    (
        {"sigmas": torch.tensor([0.0, 1.0])},
        "sigmas are 0, 1; expected levels that",
    ),
    ({"sigmas": torch.tensor([1.5, 0.0])}, "sigmas are 1.5, 0"),
    ({"sigmas": torch.tensor([1.0, -0.5])}, "sigmas are 1, -0.5"),
    ({"sampler": "ddim"}, "sampler is 'ddim'; expected one of euler, heun, dpmpp_2m"),
    ({"sampler": None}, "sampler is None; expected one of"),
    ({"sampler": ["euler"]}, "sampler is .*; expected one of"),
    (
        {"output_type": "numpy"},
        "output_type is 'numpy'; expected one of pil, pt, np",
    ),
    ({"output_type": None}, "output_type is None; expected one of"),
    ({"max_sequence_length": 0}, "max_sequence_length is 0; expected .* 1 to 512"),
    ({"max_sequence_length": 513}, "max_sequence_length is 513"),
    ({"max_sequence_length": 77.0}, "max_sequence_length is 77.0"),
    ({"callback_on_step_end": 3}, "callback_on_step_end is a int; expected a function"),
    ({"guidance": 4.0}, "guidance is 4.0; expected an object of chapter 6"),
    ({"guidance": "none"}, "guidance is 'none'; expected an object of chapter 6"),
    (EMBEDS, "prompt_embeds and prompt are given; expected one of them"),
    ({"prompt": None, **EMBEDS, "prompt_2": "x"}, "prompt_embeds and prompt_2 are"),
    ({"prompt": None, **EMBEDS, "prompt_3": "x"}, "prompt_embeds and prompt_3 are"),
    (
        {**NEGATIVE_EMBEDS, "negative_prompt_2": "x"},
        "negative_prompt_embeds and negative_prompt_2 are given; expected one of them",
    ),
    ({"prompt": None, "prompt_embeds": CONTEXT}, "one of prompt_embeds and pooled_…"),
    ({"pooled_prompt_embeds": POOLED}, "one of prompt_embeds and pooled_…"),
    (
        {"prompt": None, **EMBEDS, "prompt_embeds": CONTEXT[0]},
        "prompt_embeds has shape",
    ),
    ({"prompt": None, **EMBEDS, "prompt_embeds": [1]}, "prompt_embeds is a list"),
    (
        {"prompt": None, **EMBEDS, "prompt_embeds": CONTEXT[..., :9]},
        r"prompt_embeds have shape \(1, 32, 9\); expected \(1, 32, 48\)",
    ),
    (
        {"prompt": None, **EMBEDS, "pooled_prompt_embeds": POOLED[:, :9]},
        r"prompt_embeds have shape \(1, 9\); expected \(1, 40",
    ),
    (
        {"prompt": None, **EMBEDS, "pooled_prompt_embeds": POOLED.repeat(2, 1)},
        "prompt_embeds has 1 rows, pooled_… 2; expected 1",
    ),
    (
        {"prompt": None, **EMBEDS, "max_sequence_length": 5},
        r"prompt_embeds have shape \(1, 32, 48\); expected \(1, 17, 48\)",
    ),
    (
        {
            "negative_prompt_embeds": CONTEXT.repeat(2, 1, 1),
            "negative_pooled_prompt_embeds": POOLED.repeat(2, 1),
        },
        "negative_prompt_embeds has 2 rows, negative_pooled_… 2; expected 1",
    ),
]


@pytest.mark.parametrize("call, line", CALLS, ids=[line for _, line in CALLS])
def test_a_call_is_refused_in_one_line(pipe, monkeypatch, call, line):
    monkeypatch.setattr(pipe, "encode_prompt", lambda *_: pytest.fail("work began"))
    with pytest.raises((ValueError, TypeError), match=line) as refused:
        pipe(**{"prompt": "a bag"} | call)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600


# Arguments that are unusual and right, and what they are equal to
SAME = [
    ({"num_inference_steps": np.int64(2)}, {}),
    ({"seed": np.int32(0)}, {}),
    ({"guidance_scale": np.float32(3)}, {"guidance_scale": 3.0}),
    ({"guidance_scale": 3}, {"guidance_scale": 3.0}),
    ({"negative_prompt": None}, {}),
    ({"negative_prompt": [""]}, {}),
    ({"prompt": ("a bag",)}, {}),
    ({"prompt_2": ""}, {}),
    ({"prompt_2": "a bag", "prompt_3": ["a bag"]}, {}),
    ({"height": np.int64(32), "width": 32}, {}),
    ({"sigmas": torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)}, None),
]


@pytest.mark.parametrize("call, other", SAME, ids=[str(c)[:60] for c, _ in SAME])
def test_unusual_arguments_are_right(pipe, call, other):
    found = pipe(**{"prompt": "a bag"} | FAST | call)
    assert found.isfinite().all()
    if other is not None:
        assert torch.equal(found, pipe("a bag", **FAST | other))


def test_embeddings_draw_what_their_texts_draw(pipe):
    texts, no = ["a bag", "a red dress"], ["a coat", ""]
    context, pooled = pipe.encode_prompt(texts)
    against, pooled_against = pipe.encode_prompt(no)
    given = {"prompt_embeds": context, "pooled_prompt_embeds": pooled}
    negative = {"negative_prompt_embeds": against}
    negative |= {"negative_pooled_prompt_embeds": pooled_against}
    more = FAST | {"num_images_per_prompt": 2, "guidance_scale": 3.0}
    expected = pipe(texts, negative_prompt=no, **more)
    for found in (
        pipe(**given, **negative, **more),
        pipe(**given, negative_prompt=no, **more),
        pipe(texts, **negative, **more),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_arrays_are_the_tensors(pipe):
    found = pipe("a bag", num_inference_steps=2, output_type="np")
    expected = pipe("a bag", num_inference_steps=2, output_type="pt")
    assert isinstance(found, np.ndarray) and found.shape == (1, 32, 32, 3)
    assert np.array_equal(found, expected.permute(0, 2, 3, 1).numpy())


# Pictures and masks to begin from, and the error's line
PICTURE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
GRAY = Image.new("L", (32, 32), 128)
STARTS = [
    ({"image": None}, "image is a NoneType; expected a PIL picture, a file, a tensor"),
    ({"image": 3}, "image is a int"),
    ({"image": []}, "image is an empty list; expected at least one picture"),
    ({"image": [GRAY, 3]}, "image is a int"),
    ({"image": "no/such.png"}, "no/such.png"),
    ({"image": __file__}, "is not a picture that can be read"),
    ({"image": PICTURE[0, 0, 0]}, r"image has shape \(32,\); expected \(…, H, W\)"),
    ({"image": PICTURE[0, 0]}, r"image has shape \(32, 32\); expected \(B, 3, H, W\)"),
    ({"image": PICTURE[:, :2]}, "image has shape"),
    ({"image": PICTURE[None]}, "image has shape"),
    ({"image": PICTURE[:0]}, r"image has shape \(0, 3, 32, 32\); expected"),
    ({"image": PICTURE * 255}, "image has values from .*; expected 0 to 1"),
    ({"image": PICTURE - 0.5}, "image has values from -0"),
    ({"image": PICTURE * NAN}, "image has values from nan to nan; expected 0 to 1"),
    ({"image": PICTURE.cfloat()}, "image is a tensor of torch.complex64.*; expected"),
    ({"image": PICTURE.to("meta")}, "image is a tensor of .*, meta; expected"),
    ({"image": PICTURE.repeat(3, 1, 1, 1)}, "image has 3 pictures; expected 1"),
    (
        {"image": np.zeros((32, 32, 3), int)},
        "image is an array of int64; expected",
    ),
    ({"image": np.zeros((32, 32, 3), object)}, "image is an array of object"),
    ({"image": np.zeros((32, 32, 3), complex)}, "image is an array of complex128"),
    ({"image": np.zeros((32, 32))}, r"image has shape \(32, 32\); expected \(B, 3"),
    ({"image": np.zeros((32, 32, 4))}, r"image has shape \(4, 32, 32\)"),
    ({"image": np.full((32, 32, 3), 255.0)}, "image has values from 255 to 255"),
    ({"image": [GRAY, GRAY.resize((40, 40))]}, "the picture is 40×40 pixels; expected"),
    ({"image": Image.new("RGB", (30, 32))}, "width is 30; .* resize a PIL picture"),
    ({"image": Image.new("F", (32, 32), 7.0)}, "holds values of 32 bits from 7 to 7"),
    ({"mask_image": 3}, "mask_image is a int"),
    ({"mask_image": GRAY.resize((40, 32))}, "the mask is 40×32 pixels; .* 32×32"),
    ({"mask_image": PICTURE[0, 0].cfloat()}, "mask_image is a tensor of torch.complex"),
    ({"mask_image": torch.full((32, 32), 2.0)}, "mask_image has values from 2 to 2"),
    ({"mask_image": PICTURE}, r"mask_image has shape .*; expected \(B, 1, H, W\)"),
    ({"mask_image": Image.new("I", (32, 32), 70_000)}, "holds values of 32 bits"),
    ({"strength": 0}, "strength is 0; expected above 0, at most 1"),
    ({"strength": -1}, "strength is -1"),
    ({"strength": 1.1}, "strength is 1.1"),
    ({"strength": NAN}, "strength is nan"),
    ({"strength": "0.6"}, "strength is '0.6'"),
    ({"strength": None}, "strength is None"),
    ({"strength": 1e-9, "num_inference_steps": 1}, None),
    ({"height": 33}, "height is 33; .* resize a PIL picture or a file"),
    ({"height": 40}, "image is a tensor of 32×32 pixels; expected 32×40"),
    ({"latents": LATENTS}, "takes no argument 'latents'; expected prompt"),
    ({"sigmas": torch.ones(2)}, "takes no argument 'sigmas'"),
    ({"generator": 1}, "takes no argument 'generator' .here it is seed"),
    ({"strenght": 0.5}, "takes no argument 'strenght'"),
]


@pytest.mark.parametrize("call, line", STARTS, ids=[str(line) for _, line in STARTS])
def test_a_picture_is_refused_in_one_line(pipe, monkeypatch, call, line):
    call = {"image": PICTURE, "num_inference_steps": 2} | call
    if line is None:
        assert len(image_to_image(pipe, "a bag", **call)) == 1
        return
    monkeypatch.setattr(module, "encode", lambda *_: pytest.fail("work began"))
    with pytest.raises((ValueError, TypeError, OSError), match=line) as refused:
        image_to_image(pipe, "a bag", **call)
    assert "\n" not in str(refused.value)


# Names set on a pipeline
NAMES = [
    "_guidance_scale",
    "guidance_scale",
    "interrupt",
    "_callback_tensor_inputs",
    "loras",
    "watermark",
    "safety_checker",
    "unet",
]


@pytest.mark.parametrize("name", NAMES)
def test_what_would_do_nothing_cannot_be_set(pipe, name):
    expected = f"has no '{name}' that could be set; expected .*adapters, .*progress"
    with pytest.raises(AttributeError, match=expected):
        setattr(pipe, name, 1)


@pytest.mark.parametrize("how", ["_interrupt", "StopIteration"])
def test_a_callback_ends_the_drawing(pipe, how):
    seen = []

    def stop(pipe, step, timestep, tensors):
        seen.append(step)
        if step == 1 and how == "_interrupt":
            pipe._interrupt = True
        elif step == 1:
            raise StopIteration
        return {"latents": tensors["latents"]}

    call = {"num_inference_steps": 5, "output_type": "latent"}
    ended = pipe("a bag", callback_on_step_end=stop, **call)
    assert seen == [0, 1]
    whole = pipe("a bag", **call)  # and the next drawing is not ended
    assert not torch.equal(ended, whole)


@pytest.mark.parametrize("more", [{}, {"mask_image": torch.ones(32, 32)}], ids=str)
def test_what_a_callback_returns_is_a_dict(pipe, more):
    call = FAST | {"image": PICTURE, "callback_on_step_end": lambda *_: 5} | more
    line = "callback_on_step_end returned a int; expected {'latents': …}, or None"
    with pytest.raises(TypeError, match=line):
        image_to_image(pipe, "a bag", **call)


# What ``load`` is given, and the error's line
LOADS = [
    ({"model": ""}, "model is ''; expected tiny, tiny-turbo, sd3.5-medium"),
    ({"model": "sd4"}, "model is 'sd4'; expected tiny"),
    ({"model": "nowhere/at/all"}, "model is 'nowhere/at/all'"),
    ({"model": "gone.safetensors"}, "gone.safetensors is missing"),
    ({"device": "tpu"}, "device is 'tpu'; expected cpu, cuda"),
    ({"device": 3.5}, "device is 3.5"),
    ({"device": "meta"}, "device is 'meta'; expected one of cpu, cuda, mps"),
    ({"device": "xla"}, "device is 'xla'; expected one of cpu"),
    ({"device": "hpu"}, "device is 'hpu'; expected one of cpu"),
    ({"device": "cuda:99"}, "device is cuda:99, which PyTorch does not see"),
    ({"dtype": "float16"}, "dtype is 'float16'; expected one of torch.float32"),
    ({"dtype": torch.int8}, "dtype is torch.int8"),
    ({"memory": "lots"}, "memory is 'lots'; expected 8GB, 12GB"),
    ({"memory": "nanGB"}, "memory is 'nanGB'; expected 8GB"),
    ({"memory": "infGB"}, "memory is 'infGB'; expected 8GB"),
    ({"memory": -1}, "memory is -1; expected 8GB"),
    ({"memory": [8]}, r"memory is \[8\]; expected 8GB"),
    ({"memory": "0.01GB"}, "memory is 0.01GB; this model needs about"),
    ({"t5": "gone"}, "t5 is 'gone'; expected one of resident, streamed, none"),
    ({"clip": "none"}, "clip is 'none'; expected one of resident, streamed"),
    ({"modulation": 3}, "modulation is 3; expected one of"),
    ({"fp8": "no"}, "fp8 is 'no'; expected True or False"),
    ({"vae_tile": 2}, "vae_tile is 2; expected a whole number, at least 8"),
    ({"vae_tile": True}, "vae_tile is True; expected a whole number"),
    ({"vae_slicing": 1}, "vae_slicing is 1; expected True or False"),
    ({"torch_dtype": 1}, "torch_dtype is no setting; expected dtype, .* t5, clip"),
    ({"text_encoders": "x"}, "text_encoders is 'x', but tiny is no single file"),
    ({"variant": "../x"}, "variant is '../x'; expected a name"),
    ({"variant": "fp16"}, "variant is 'fp16'; .* has no weights that are called so"),
    ({"revision": "main"}, "revision is 'main', but tiny is here; expected the name"),
]


@pytest.mark.parametrize("how, line", LOADS, ids=[str(line) for _, line in LOADS])
def test_load_refuses_in_one_line(monkeypatch, how, line):
    monkeypatch.setattr(
        weights, "join_stored", lambda *_: pytest.fail("a weight was read")
    )
    with pytest.raises((ValueError, OSError), match=line) as refused:
        minidiff.load(**{"model": "tiny"} | how)
    assert "\n" not in str(refused.value)


# Models recognised by what they are: the origin, a change of the configuration, a name
MODELS = [
    ("", "sd35_medium", {}, "sd3.5-medium"),
    ("/models/my-turbo-style", "sd35_medium", {}, "sd3.5-medium"),
    ("/models/sd3.5-large-turbo", "sd35_medium", {}, "sd3.5-medium"),
    ("", "sd35_large", {}, "sd3.5-large"),
    ("/turbo/large", "sd35_large", {}, "sd3.5-large"),
    ("/models/my-turbo-style", "sd35_large", {}, "sd3.5-large"),
    ("stabilityai/stable-diffusion-3.5-large-turbo", "sd35_large", {}, "…-turbo"),
    ("/m/folder/sd3.5-large-turbo", "sd35_large", {}, "…-turbo"),
    ("sd3.5_large_turbo", "sd35_large", {}, "…-turbo"),
    ("", "sd35_large", {"sample_size": 64}, "sd3.5-large"),
    ("", "sd35_large", {"qk_norm": None}, None),
    ("", "sd35_large", {"num_layers": 24}, None),
    ("", "sd35_medium", {"qk_norm": None, "dual_attention_layers": ()}, None),
    ("", "tiny", {}, "tiny"),
    ("somewhere", "tiny", {"num_layers": 3}, None),
]


@pytest.mark.parametrize("origin, base, change, name", MODELS)
def test_models_are_known_by_what_they_are(pipe, origin, base, change, name):
    kind = type(pipe.transformer.config)
    found = recognize(replace(getattr(kind, base)(), **change), origin)
    expected = name and name.replace("…", "sd3.5-large")
    assert (found.name if found else None) == expected


def test_an_unknown_model_draws_with_the_defaults_of_none(pipe):
    assert pipe.name == "sd3" and tuple(pipe.defaults) == (28, 7.0)


# What is told, and drawn all the same
WARNED = [
    ({"negative_prompt": "x", "guidance_scale": 1.0}, "does nothing without guidance"),
    ({"max_sequence_length": 389}, "context has 401 rows, 389 of them T5's"),
    ({"prompt": "red " * 40}, "CLIP-L and CLIP-G read 12 tokens; not seen"),
]


@pytest.mark.parametrize("call, told", WARNED, ids=[told for _, told in WARNED])
def test_what_is_told_once(pipe, call, told):
    with pytest.warns(UserWarning, match=told) as warned:
        pipe(**{"prompt": "a bag"} | FAST | call)
    assert sum(bool(re.search(told, str(w.message))) for w in warned) == 1


def test_words_never_seen_are_named(small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "model")
    (folder / "words.txt").write_text("a\nbag\nred\n")
    pipe, line = minidiff.load(folder), "^the small model has not seen: lighthouse$"
    with pytest.warns(UserWarning, match=line):
        pipe.encode_prompt(["a red bag", "A lighthouse"])


def test_a_context_of_400_rows_is_told_nothing(pipe, recwarn):
    Request("a bag")
    pipe.check(Request("a bag", max_sequence_length=388))
    assert not recwarn.list


# T5 in half precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_t5_does_not_overflow(small, tmp_path, dtype):
    """Weights so large that its states leave float16's range: 65,504."""
    folder = shutil.copytree(small, tmp_path / "large")
    encoder = weights.load_component(T5Encoder, T5Config, folder / "text_encoder_3")
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            if name.endswith(("wi_1.weight", "wo.weight")):
                weight.mul_(3000)
    weights.save_component(encoder, folder / "text_encoder_3", "T5EncoderModel")
    with torch.no_grad():
        ids = torch.arange(12)[None]
        assert not encoder.half()(ids).isfinite().all()
    pipe = minidiff.load(folder, dtype=dtype)
    context, _ = pipe.encode_prompt("a red dress on a blue background")
    assert context.dtype == dtype and context.isfinite().all()
    exact, _ = minidiff.load(folder).encode_prompt("a red dress on a blue background")
    assert (context.float() - exact).norm() / exact.norm() < 0.02
