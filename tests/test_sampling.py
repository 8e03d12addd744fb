"""The pipeline against diffusers' own, on the same weights, in both directions."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from exercises import Desk
from helpers import relative_error
from pipelines import load_tokenizers, reference_pipeline, save_tokenizers

import minidiff
from minidiff import sampling
from minidiff.classroom.exercises import check
from minidiff.dit import MMDiT
from minidiff.files import weights
from minidiff.flow_matching import Scheduler
from minidiff.interface import checks
from minidiff.sampling import DEFAULTS, starting_noise

LONG = "a red dress and " * 30
CASES = {
    "plain": {},
    "dual attention, not square": {"dual": (0, 2), "height": 24, "width": 40},
    "two prompts, one negative each": {
        "dual": (0,),
        "prompt": ["a red dress", "an orange coat left of a pink shirt! on black"],
        "negative_prompt": ["a bag", ""],
        "height": 40,
    },
    "overlong": {"prompt": LONG, "negative_prompt": "a blue bag " * 20, "shift": 1.0},
    "no T5": {"t5": False, "prompt": [LONG, ""], "negative_prompt": ["no", "yes"]},
    "several pictures each": {
        "prompt": ["a bag", "a coat"],
        "num_images_per_prompt": 2,
    },
}
NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}
CALL = {"num_inference_steps": 8, "guidance_scale": 4.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder saved by diffusers for each case, and the pipeline that saved it."""
    made = {}

    def make(dual=(), t5=True, shift=3.0):
        key = (dual, t5, shift)
        if key not in made:
            folder = tmp_path_factory.mktemp("pipeline")
            save_tokenizers(folder / "parts", t5)
            tokenizers = load_tokenizers(folder / "parts", t5)
            reference = reference_pipeline(tokenizers, dual, t5, shift)
            reference.save_pretrained(folder / "saved")
            made[key] = folder / "saved", reference
        return made[key]

    return make


def split(case):
    model = {k: v for k, v in case.items() if k in ("dual", "t5", "shift")}
    call = {k: v for k, v in case.items() if k not in model}
    call = {
        "prompt": "a red dress on a blue background",
        "max_sequence_length": 20,
    } | call
    return model, CALL | call


def noise_for(pipe, call):
    prompts = [call["prompt"]] if isinstance(call["prompt"], str) else call["prompt"]
    count = len(prompts) * call.get("num_images_per_prompt", 1)
    return pipe.prepare_latents(count, call.get("height"), call.get("width"))


def theirs(reference, call, noise, output_type):
    return reference(**call, latents=noise, output_type=output_type).images


def ours(pipe, call, noise, output_type="latent"):
    return pipe(**call, latents=noise, output_type=output_type)


# End to end


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_same_latents_and_pictures_as_diffusers(folders, case):
    model, call = split(case)
    folder, reference = folders(**model)
    pipe = minidiff.load(folder)
    noise = noise_for(pipe, call)
    latents = ours(pipe, call, noise)
    assert relative_error(latents, theirs(reference, call, noise, "latent")) <= 1e-5
    pictures = ours(pipe, call, noise, "pt")
    assert relative_error(pictures, theirs(reference, call, noise, "pt")) <= 1e-5
    assert pictures.min() >= 0 and pictures.max() <= 1


def test_same_pil_pictures(folders):
    _, call = split({})
    folder, reference = folders()
    pipe = minidiff.load(folder)
    noise = noise_for(pipe, call)
    picture = ours(pipe, call, noise, "pil")[0]
    expected = reference(**call, latents=noise).images[0]
    assert picture.size == expected.size and picture.mode == "RGB"
    found, wanted = (np.asarray(p).astype(int) for p in (picture, expected))
    assert abs(found - wanted).max() <= 1  # a value may lie on the edge of rounding


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("model", [{}, {"dual": (0, 2)}, {"t5": False}])
def test_diffusers_draws_the_same_from_what_we_save(folders, tmp_path, model, dtype):
    from diffusers import StableDiffusion3Pipeline

    pipe = minidiff.load(folders(**model)[0])
    pipe.save_pretrained(tmp_path, dtype)
    # diffusers wants to be told that there is no T5, of its own folders too
    without = {} if model.get("t5", True) else NO_T5
    reference = StableDiffusion3Pipeline.from_pretrained(
        tmp_path, dtype=torch.float32, **without
    )
    reference.set_progress_bar_config(disable=True)
    _, call = split({"prompt": [LONG, "a bag!"], "negative_prompt": ["a coat", ""]})
    again = minidiff.load(tmp_path)
    noise = noise_for(again, call)
    expected = theirs(reference, call, noise, "pt")
    assert relative_error(ours(again, call, noise, "pt"), expected) <= 1e-5
    if dtype is None:
        assert torch.equal(ours(pipe, call, noise), ours(again, call, noise))


@pytest.mark.slow
@pytest.mark.parametrize("resaved", [False, True])
def test_the_real_tokenizers_as_published_and_as_saved_again(shared, tmp_path, resaved):
    """The hub's files are of 2024; transformers writes others today."""
    published = shared / "sd35" / "tokenizers"
    tokenizers = load_tokenizers(published)
    reference = reference_pipeline(tokenizers)
    reference.save_pretrained(tmp_path)
    if not resaved:
        for part in tokenizers:
            for file in (tmp_path / part).iterdir():
                file.unlink()
            for file in (published / part).iterdir():
                (tmp_path / part / file.name).write_bytes(file.read_bytes())
    _, call = split(
        {"prompt": ["wow! a cat, 東京 🙂", LONG], "max_sequence_length": 77}
    )
    call["negative_prompt"] = ["blurry!", "low  quality"]
    pipe = minidiff.load(tmp_path)
    noise = noise_for(pipe, call)
    expected = theirs(reference, call, noise, "latent")
    assert relative_error(ours(pipe, call, noise), expected) <= 1e-5


# What the end-to-end parity catches


def mutant_guide(v_neg, v_pos, scale):
    return v_pos + scale * (v_pos - v_neg)


def mutant_assemble(clip_l, clip_g, t5):
    return sampling_assemble(clip_g, clip_l, t5)


def mutant_sigmas(self, steps):
    return torch.linspace(1, 0, steps + 1)


def mutant_unscale(self, x):
    return x / self.config.scaling_factor - self.config.shift_factor


def mutant_positions(self, height, width):
    size = self.config.pos_embed_max_size
    table = self.pos_embed.unflatten(1, (size, size))
    return table[:, :height, :width].flatten(1, 2)


sampling_assemble = sampling.assemble
MUTANTS = {
    "guidance from the wrong end": ("minidiff.flow_matching.guide", mutant_guide),
    "CLIP-G before CLIP-L": ("minidiff.sampling.assemble", mutant_assemble),
    "a schedule without shift": (
        "minidiff.flow_matching.Scheduler.sigmas",
        mutant_sigmas,
    ),
    "the VAE's shift subtracted": ("minidiff.vae.VAE.unscale", mutant_unscale),
    "positions from the corner": ("minidiff.dit.MMDiT.positions", mutant_positions),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_parity_catches(folders, monkeypatch, mutant):
    _, call = split({"negative_prompt": "a bag"})
    folder, reference = folders()
    pipe = minidiff.load(folder)
    noise = noise_for(pipe, call)
    expected = theirs(reference, call, noise, "pt")
    assert relative_error(ours(pipe, call, noise, "pt"), expected) <= 1e-5
    monkeypatch.setattr(*mutant)
    assert relative_error(ours(pipe, call, noise, "pt"), expected) > 1e-4


# What a call does


@pytest.fixture
def pipe(folders):
    pipe = minidiff.load(folders()[0])
    pipe.progress = False
    return pipe


def draw(pipe, prompt="a bag", output_type="latent", **call):
    call = {"num_inference_steps": 2, "guidance_scale": 3.0} | call
    return pipe(prompt, output_type=output_type, **call)


def test_seeds(pipe):
    three = draw(pipe, num_images_per_prompt=3, seed=5)
    assert torch.equal(three, draw(pipe, num_images_per_prompt=3, seed=5))
    for i in range(3):
        alone = draw(pipe, seed=5 + i)
        torch.testing.assert_close(three[i : i + 1], alone, rtol=1e-4, atol=1e-5)
    assert not torch.equal(draw(pipe, seed=None), draw(pipe, seed=None))
    assert torch.equal(
        starting_noise([7], (2, 3, 4))[0], starting_noise([6, 7], (2, 3, 4))[1]
    )


def test_prompts_stand_in_order(pipe):
    both = draw(pipe, ["a bag", "a coat"], num_images_per_prompt=2, seed=0)
    for i, prompt in enumerate(["a bag", "a bag", "a coat", "a coat"]):
        torch.testing.assert_close(
            both[[i]], draw(pipe, prompt, seed=i), rtol=1e-4, atol=1e-5
        )


def test_guidance_of_one_runs_no_negative_pass(pipe, monkeypatch):
    rows = []
    forward = pipe.transformer.forward
    monkeypatch.setattr(
        pipe.transformer,
        "forward",
        lambda x, *args, **kwargs: rows.append(len(x)) or forward(x, *args, **kwargs),
    )
    plain = draw(pipe, guidance_scale=1.0)
    other = draw(pipe, guidance_scale=0.0, negative_prompt="a coat")
    assert torch.equal(plain, other)
    draw(pipe, guidance_scale=1.01)
    assert rows == [1, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("sampler", sampling.SAMPLERS)
def test_the_three_steps_alone_make_the_call(pipe, sampler):
    context, pooled = pipe.encode_prompt(["", "a bag"])
    noise = pipe.prepare_latents(1, seed=3)
    latents = pipe.denoise(noise, context, pooled, 3, 2.5, sampler)
    pictures = pipe.decode(latents)
    called = draw(
        pipe,
        output_type="pt",
        num_inference_steps=3,
        guidance_scale=2.5,
        sampler=sampler,
        seed=3,
    )
    torch.testing.assert_close(pictures, called)


def test_callback(pipe):
    seen = []

    def see(caller, step, timestep, tensors):
        assert caller is pipe
        seen.append((step, round(float(timestep), 3), tensors["latents"]))
        assert tensors["denoised"].shape == tensors["latents"].shape

    final = draw(pipe, callback_on_step_end=see, num_inference_steps=4)
    times = (1000 * pipe.scheduler.sigmas(4)[:-1]).tolist()
    assert [s[:2] for s in seen] == [(i, round(t, 3)) for i, t in enumerate(times)]
    assert torch.equal(seen[-1][2], final)
    zeros = draw(
        pipe, callback_on_step_end=lambda p, i, t, d: {"latents": 0 * d["latents"]}
    )
    assert zeros.abs().max() == 0


def test_nothing_is_printed_off_a_terminal(pipe, capfd):
    pipe.progress = True
    draw(pipe)
    assert capfd.readouterr() == ("", "")


def test_dtype(folders):
    pipe = minidiff.load(folders()[0], dtype=torch.bfloat16)
    assert pipe.dtype == torch.bfloat16
    assert all(p.dtype == torch.bfloat16 for p in pipe.vae.parameters())
    full = minidiff.load(folders()[0])
    a, b = (draw(p, output_type="pt") for p in (pipe, full))
    assert a.dtype == torch.float32
    assert relative_error(a, b) < 0.1


# What suits each model


def test_the_name_survives_saving(pipe, tmp_path):
    pipe.name = "sd3.5-large-turbo"
    pipe.save_pretrained(tmp_path)
    assert minidiff.load(tmp_path).defaults == DEFAULTS["sd3.5-large-turbo"]


def test_max_sequence_length_follows_the_tokenizer(pipe):
    assert pipe.max_sequence_length == 20
    assert pipe.encode_prompt("a")[0].shape[1] == 12 + 20
    assert pipe.encode_prompt("a", 30)[0].shape[1] == 12 + 30


# Bad input

BAD_CALLS = [
    ({"seed": 2**70}, "seed is 1180591620717411303424"),
    ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
    ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
    ({"num_inference_steps": 0}, "num_inference_steps is 0"),
    ({"num_inference_steps": -3}, "num_inference_steps is -3"),
    ({"num_inference_steps": 2.5}, "num_inference_steps is 2.5"),
    ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
    ({"height": 33}, "height is 33; expected a multiple of 8 up to 96.*nearest is 32"),
    ({"width": 104}, "width is 104; expected .*nearest is 96"),
    ({"height": -8}, "height is -8"),
    ({"height": 1}, "height is 1; expected .*nearest is 8"),
    ({"sampler": "ddim"}, "sampler is 'ddim'; expected one of euler, heun, dpmpp_2m"),
    ({"output_type": "gif"}, "output_type is 'gif'; expected one of pil, pt, np, lat"),
    ({"max_sequence_length": 0}, "max_sequence_length is 0"),
    ({"max_sequence_length": 513}, "max_sequence_length is 513"),
    ({"prompt": []}, "prompt is an empty list"),
    ({"prompt": 3}, "prompt is a int; expected a string"),
    ({"prompt": ["a", None]}, "prompt is a list; expected a string or a list"),
    ({"prompt": ["a", "b"], "negative_prompt": ["c"]}, "negative_prompt has 1 texts"),
    ({"latents": torch.zeros(1, 16, 8, 9)}, "width is 36"),
    ({"latents": torch.zeros(2, 16, 8, 8)}, r"latents have shape \(2, 16, 8, 8\)"),
    ({"latents": torch.zeros(1, 16, 8, 8), "height": 40}, "expected .1, 16, 10, 8"),
    ({"latents": torch.zeros(16, 8, 8)}, r"latents has shape .16, 8, 8.; expected .B,"),
    ({"height": "512"}, "height is '512'; expected a whole number"),
    ({"sigmas": torch.ones(1)}, "sigmas is 1 level; expected two or more"),
    ({"sigmas": torch.tensor([1, 0.5, 0.5, 0])}, "levels that fall from 1 to 0"),
    ({"sigmas": torch.tensor([1.5, 0])}, "levels that fall from 1 to 0"),
    ({"sigmas": torch.tensor([1, -0.5])}, "levels that fall from 1 to 0"),
    ({"sigmas": [1.0, 0.0]}, "sigmas is a list; expected a tensor .S . 1,."),
]


def test_t5_reads_256_tokens_unless_told(pipe, monkeypatch):
    import inspect

    import diffusers

    known = inspect.signature(diffusers.StableDiffusion3Pipeline.__call__).parameters
    monkeypatch.setattr(pipe.tokenizers[2], "model_max_length", 512)
    assert pipe.max_sequence_length == known["max_sequence_length"].default == 256
    pipe.tokenizers = (*pipe.tokenizers[:2], None)
    assert pipe.max_sequence_length == 256


def test_the_schedule_survives_saving(pipe, tmp_path):
    pipe.scheduler = Scheduler(1.5, 500)
    pipe.save_pretrained(tmp_path)
    assert minidiff.load(tmp_path).scheduler == Scheduler(1.5, 500)


@pytest.mark.parametrize("number", [0, 1])
def test_a_number_is_a_card_and_not_the_cpu(number):
    try:
        found = checks.device_and_dtype(number, None)[0]
    except ValueError as error:  # none is here
        assert f"device is {number}" in str(error)
    else:
        assert found.type != "cpu" and found.index == number


def test_targets_that_cannot_be():
    with pytest.raises(ValueError, match="device is 'tpu9'; expected cpu, cuda"):
        checks.device_and_dtype("tpu9", None)
    with pytest.raises(ValueError, match="dtype is torch.int8; expected one of"):
        checks.device_and_dtype(None, torch.int8)


def test_numpys_whole_numbers_are_whole_numbers(pipe):
    call = {"seed": 5, "height": 32, "width": 40, "num_images_per_prompt": 2}
    call |= {"num_inference_steps": 2, "output_type": "pil"}
    numbers = {k: np.int64(v) for k, v in call.items() if v != "pil"}
    numbers["guidance_scale"] = np.float32(4.5)
    expected = draw(pipe, **call, guidance_scale=4.5)
    found = draw(pipe, **call | numbers)
    for ours, known in zip(found, expected, strict=True):
        assert ours.tobytes() == known.tobytes() and ours.info == known.info


def test_the_steps_alone_refuse_too(pipe):
    context, pooled = pipe.encode_prompt(["", "a bag"])
    noise = pipe.prepare_latents(1)
    with pytest.raises(ValueError, match="sampler is 'ddim'"):
        pipe.denoise(noise, context, pooled, 2, sampler="ddim")
    with pytest.raises(TypeError, match="sigmas is a list; expected a tensor"):
        pipe.denoise(noise, context, pooled, sigmas=[1.0, 0.0])
    with pytest.raises(ValueError, match="prompt is an empty list"):
        pipe.encode_prompt([])
    with pytest.raises(ValueError, match="guidance_scale is '4.5'"):
        pipe("a bag", guidance_scale="4.5")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"pooled_projection_dim": 41}, "pooled_projection_dim is 41; .* need 40"),
        ({"in_channels": 8}, "in_channels is 8; .* need 16"),
        ({"joint_attention_dim": 64}, "joint_attention_dim is 64; .* need 48"),
    ],
)
def test_each_pair_of_parts_must_fit(pipe, change, message):
    with torch.device("meta"):
        other = MMDiT(replace(pipe.transformer.config, **change))
    parts = pipe.tokenizers, pipe.text_encoders, other, pipe.vae, Scheduler()
    with pytest.raises(ValueError, match=message):
        sampling.Pipeline(*parts)


def test_ones_own_solver_keeps_no_graph(pipe):
    context, pooled = pipe.encode_prompt(["a bag"])
    velocity = pipe.velocity(context.double(), pooled, torch.ones(1))
    v = velocity(pipe.prepare_latents(1), torch.ones(()))
    assert torch.is_grad_enabled() and not v.requires_grad


def test_another_scheduler_is_refused(folders, tmp_path):
    other = copy(folders()[0], tmp_path / "d")
    config = other / "scheduler" / "scheduler_config.json"
    found = json.loads(config.read_text())
    for name, value, message in (
        (
            "_class_name",
            "FlowMatchHeunDiscreteScheduler",
            "asks for the scheduler Flow",
        ),
        ("shift", float("nan"), "shift is nan; expected 0.001 to 1000"),
    ):
        config.write_text(json.dumps(found | {name: value}))
        with pytest.raises(ValueError, match=message):
            minidiff.load(other)


@pytest.mark.parametrize(
    "name",
    [
        "use_dynamic_shifting",
        "shift_terminal",
        "use_karras_sigmas",
        "use_exponential_sigmas",
        "use_beta_sigmas",
        "invert_sigmas",
        "stochastic_sampling",
    ],
)
def test_schedules_of_another_kind_are_refused(folders, tmp_path, name):
    other = copy(folders()[0], tmp_path / "d")
    config = other / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {name: 0.1}))
    with pytest.raises(ValueError, match=f"asks for {name}"):
        minidiff.load(other)


def test_default_dtypes():
    assert checks.device_and_dtype("cuda", None)[1] == torch.bfloat16
    assert checks.device_and_dtype(None, None) == (torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("call, message", BAD_CALLS, ids=[m for _, m in BAD_CALLS])
def test_a_bad_call_is_refused_before_any_work(pipe, monkeypatch, call, message):
    monkeypatch.setattr(pipe, "encode_prompt", lambda *_: pytest.fail("work began"))
    with pytest.raises((ValueError, TypeError), match=message):
        pipe(**{"prompt": "a bag"} | call)


def copy(folder, target, **index):
    import shutil

    shutil.copytree(folder, target, dirs_exist_ok=True)
    path = target / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | index))
    return target


def test_bad_folders(folders, tmp_path, monkeypatch):
    folder = copy(folders()[0], tmp_path / "a")
    monkeypatch.setattr(
        weights, "join_stored", lambda *_: pytest.fail("a weight was read")
    )
    (folder / "vae" / weights.WEIGHTS[0]).rename(tmp_path / "kept")
    with pytest.raises(FileNotFoundError, match="no weights in .*vae"):
        minidiff.load(folder)
    (folder / "vae" / weights.WEIGHTS[0]).write_bytes(
        (tmp_path / "kept").read_bytes()[:-9]
    )
    with pytest.raises(ValueError, match="vae.*is not a whole"):
        minidiff.load(folder)
    (folder / "model_index.json").unlink()
    with pytest.raises(FileNotFoundError, match="model_index.json is missing"):
        minidiff.load(folder)


def test_folders_of_another_kind(folders, tmp_path):
    other = copy(folders()[0], tmp_path / "b", _class_name="FluxPipeline")
    with pytest.raises(ValueError, match="is a FluxPipeline; expected a StableDiff"):
        minidiff.load(other)
    lacking = copy(folders()[0], tmp_path / "c", vae=[None, None])
    with pytest.raises(ValueError, match="model_index.json names no vae"):
        minidiff.load(lacking)


@pytest.mark.parametrize("name", ["sd4", "nowhere/at/all", ""])
def test_unknown_models(name):
    with pytest.raises(
        ValueError, match=f"model is '{name}'; expected tiny, tiny-turbo, sd3.5-medi"
    ):
        minidiff.load(name)


def test_a_file_is_not_a_model(tmp_path):
    file = tmp_path / "model.ckpt"
    file.write_bytes(b"x")
    with pytest.raises(ValueError, match="is a file; expected a folder"):
        minidiff.load(file)


def test_what_diffusers_calls_otherwise_is_told(pipe, folders, monkeypatch):
    with pytest.raises(TypeError, match="argument 'generator' .here it is seed, a who"):
        pipe("a bag", generator=torch.Generator())
    with pytest.raises(ValueError, match="seed is .3, 77.; expected a whole number"):
        pipe("a bag", seed=[3, 77])
    with pytest.raises(ValueError, match="torch_dtype is no setting; expected dtype"):
        minidiff.load(folders()[0], torch_dtype=torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="device is cuda, which PyTorch does not see"):
        minidiff.load(folders()[0], "cuda")


def test_weights_that_are_elsewhere_are_told(folders, tmp_path):
    folder = copy(folders()[0], tmp_path / "e")
    file = folder / "vae" / weights.WEIGHTS[0]
    file.write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")
    with pytest.raises(ValueError, match="is Git LFS's pointer .* run git lfs pull"):
        minidiff.load(folder)
    file.rename(file.with_suffix(".fp16.safetensors"))
    with pytest.raises(FileNotFoundError, match="found .*fp16.safetensors"):
        minidiff.load(folder)


# The chapter's exercises


@pytest.fixture(scope="module")
def desk():
    pipe = minidiff.load("tiny")
    pipe.progress = False
    steps, scale = pipe.defaults
    context, pooled = pipe.encode_prompt(["", "a red dress on a blue background"])
    noise = pipe.prepare_latents(1)
    known = {"pipe": pipe, "transformer": pipe.transformer, "check": check}
    known |= {"context": context, "pooled": pooled, "noise": noise, "scale": scale}
    known |= {"sigmas": pipe.scheduler.sigmas(steps)}
    naive = pipe.denoise(noise, context, pooled)
    return Desk("08_sampling", sampling, known | {"naive": naive, "Velocity": None})


@pytest.mark.slow
@pytest.mark.parametrize("number", ["8_1", "8_2", "8_3"])
def test_the_checks_accept_the_solutions(desk, number):
    assert desk.hand_in(number, desk.solution(number)) == "passed"


def repaint(lines):
    return f"def repaint(velocity, x0, sigmas, strength):\n    {lines}"


def between(line):
    return f"def between(a, b, t):\n    return {line}"


WRONG = {
    "one prompt": ("8_1", "samples = lambda: 4 * (27 * 2 + 1)"),
    "two calls in every step": ("8_1", "samples = lambda: 4 * 2 * 28 * 2"),
    "Euler": ("8_1", "samples = lambda: 4 * 2 * 28"),
    "calls, not samples": ("8_1", "samples = lambda: 27 * 2 + 1"),
    "no noise between 0 and 1": (
        "8_2",
        repaint(
            "rest = sigmas[int(28 - 28 * strength):]; "
            "return euler(velocity, noise if strength == 1 else x0, rest)"
        ),
    ),
    "noise of weight 1": (
        "8_2",
        repaint(
            "rest = sigmas[int(28 - 28 * strength):]; "
            "return euler(velocity, x0 + rest[0] * noise, rest)"
        ),
    ),
    "the level of the strength": (
        "8_2",
        repaint(
            "rest = sigmas[int(28 - 28 * strength):]; "
            "return euler(velocity, (1 - strength**2) * x0 + strength**2 * noise, rest)"
        ),
    ),
    "the first steps": (
        "8_2",
        repaint(
            "rest = sigmas[:int(28 * strength) + 1]; "
            "return euler(velocity, (1 - rest[0]) * x0 + rest[0] * noise, rest)"
        ),
    ),
    "the straight line": ("8_3", between("(1 - t) * a + t * b")),
    "the line, made as long as noise": (
        "8_3",
        between("((1 - t) * a + t * b) / ((1 - t)**2 + t**2) ** 0.5"),
    ),
    "a hard switch": ("8_3", between("a if t < 0.5 else b")),
    "square roots": ("8_3", between("(1 - t)**0.5 * a + t**0.5 * b")),
}


@pytest.mark.slow
@pytest.mark.parametrize("wrong", WRONG)
def test_the_checks_refuse_wrong_answers(desk, wrong):
    desk.refuse(*WRONG[wrong])
