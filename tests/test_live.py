"""The model in the browser: every component, and whole pictures, against Python's."""

import base64
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomize, relative_error
from pipelines import halved
from tokenizer_strings import strings
from torch import Tensor

import minidiff
from minidiff.attention import record_attention
from minidiff.control import Control, ControlNet, begin_control, canny, load_control
from minidiff.data.samples import sample_scenes
from minidiff.distillation import JumpScheduler
from minidiff.files.sentencepiece import case_folding
from minidiff.files.tokenizer_files import unknown_words
from minidiff.live import kernel
from minidiff.live.exporting import export_pipeline, runtime, tokenizer_table
from minidiff.sampling import Pipeline, starting_noise
from minidiff.tokenizer import T5Tokenizer

LIVE = Path(minidiff.__file__).parent / "live"
PROMPT = "a red dress on a blue background"
GROUNDS = ("blue", "pink", "white", "black", "green")
THINGS = "dress shirt coat bag sneaker boot sandal pullover t-shirt trousers".split()
OPEN = """
async ([name, kernel]) => {
  const about = minidiff.models[name];
  const parts = Object.entries(about.parts).map(([part, { file }]) =>
    [part, toBuffer(minidiff.weights[file])]);
  model = await makeModel(about, toBuffer(minidiff.runtime.kernels[kernel]),
    Object.fromEntries(parts));
}
"""
PACKED = """
function packed(values) {
  const bytes = new Uint8Array(Float32Array.from(values).buffer);
  return btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
}
"""
IDS = """
(texts) => JSON.stringify(texts.map((text) => model.tokenizers.map((tokenizer, i) =>
  tokenizer.encode(text, model.about.lengths[i]))))
"""
VELOCITY = """
({ prompt, latents, sigma }) => scratch(() => {
  const { about, weights } = model, { transformer } = about;
  const text = encodeTexts(model, Array(3).fill(prompt));
  const width = text.context.length / text.rows;
  const said = { context: Matrix.from(text.rows, width, text.context),
    modulations: modulations([sigma], text.pooled, weights.transformer, transformer) };
  const maps = [];
  const v = velocity(Float32Array.from(latents), 0, said, weights.transformer,
    transformer, {}, (block, head, map) => {
      const rows = Array.from({ length: map.rows }, (_, i) =>
        [...map.data.subarray(i * map.columns, i * map.columns + map.rows)]);
      (maps[block] ??= []).push(...rows.flat());
    });
  return [text.context, text.pooled, v, ...maps].map(packed);
})
"""
DRAW = """
(requests) => requests.map((request) => {
  let last;
  for (const state of draw(model, request)) last = state.x;
  return [last, decodeLatents(model, last)].map(packed);
})
"""


def opened(
    chromium: Any, pipe: Pipeline, folder: Path, net: ControlNet | None = None
) -> Any:
    """A page in which the runtime's functions are, and ``pipe`` as ``model``."""
    export_pipeline(pipe, folder, "model", net)
    page = chromium.new_page()
    page.add_script_tag(content="var minidiff = { models: {}, weights: {} };")
    for file in sorted(folder.glob("*.js")):
        if file.name != "page.js":
            page.add_script_tag(path=file)
    page.add_script_tag(content=runtime()["script"] + PACKED)
    page.evaluate(OPEN, ["model-edges" if net else "model", 0])
    return page


def unpacked(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32)


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    pipe = minidiff.load("tiny")
    pipe.progress = False
    return pipe


@pytest.fixture(scope="module")
def small_pipe(small: Path) -> Pipeline:
    """Of other sizes, with dual attention; weights that half precision holds."""
    return halved(small)


@pytest.fixture(scope="module")
def page(
    chromium: Any, pipe: Pipeline, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    page = opened(chromium, pipe, tmp_path_factory.mktemp("live"))
    yield page
    page.context.close()


@pytest.fixture(scope="module")
def small_page(
    chromium: Any, small_pipe: Pipeline, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    page = opened(chromium, small_pipe, tmp_path_factory.mktemp("small-live"))
    yield page
    page.context.close()


@pytest.mark.slow
def test_the_kernels_bytes_are_those_of_its_text() -> None:
    pytest.importorskip("wasmtime", reason="wasmtime assembles the kernel")
    for form in kernel.FORMS:
        assert form.read_bytes() == kernel.assemble_kernel(form)


def test_both_forms_of_the_kernel_draw_the_same(page: Any) -> None:
    request = {"prompt": PROMPT, "seed": 5, "steps": 2, "guidance": 2.5}
    drawn = []
    for form in (1, 0):  # the page keeps the first form
        page.evaluate(OPEN, ["model", form])
        drawn.append(unpacked(page.evaluate(DRAW, [request])[0][1]))
    assert 0 < (drawn[0] - drawn[1]).abs().max() < 1e-4


def of_every_plane(count: int) -> list[str]:
    """Strings for the tokenizers, seventeen of them from one plane each.

    "constructor" is a property of every object in JavaScript.
    """
    rng = random.Random(0)
    planes = [
        "".join(chr((p << 16) + rng.randrange(0x20, 0xD800)) for _ in range(9))
        for p in range(17)
    ]
    some = random.Random(1).sample(strings(4000, 2), count - 18)
    return [*planes, "a constructor", *some]


@pytest.mark.slow
@pytest.mark.parametrize("which", ["", "small_"])
def test_ids_of_texts_of_every_plane(
    which: str, request: pytest.FixtureRequest
) -> None:
    page = request.getfixturevalue(f"{which}page")
    python = request.getfixturevalue(f"{which}pipe")
    texts = of_every_plane(200)
    found = json.loads(page.evaluate(IDS, texts))
    lengths = [t.model_max_length for t in python.tokenizers[:2]]
    lengths.append(python.max_sequence_length)
    for i, tokenizer in enumerate(python.tokenizers):
        expected = tokenizer(texts, lengths[i]).tolist()
        wrong = [t for t, a, b in zip(texts, found, expected, strict=True) if a[i] != b]
        assert not wrong, f"{wrong[0]!r}"


# Texts, and their words but for "a" and "red"
UNSEEN = {
    "A RED zebra, a Zebra-hat_1": ["zebra", "hat_1"],
    "a red: \"a\" (red); 'a' - red? a! red. a & red / #a": [],
    "a 🐱 red🐱a": ["🐱"],
    "👩‍🚀 🇫🇷 ❤️ 👍🏽 1️⃣": ["👩‍🚀", "🇫🇷", "❤️", "👍🏽", "1️⃣"],
    "a → red + a 5 € ©": ["→", "+", "5", "€", "©"],
    "बिल्ली, می‌خواهم": ["बिल्ली", "می‌خواهم"],
    "cafe\u0301 CAFÉ": ["café"],
    "pig\u0301 ΣΊΣΥΦΟΣ İ": ["pi\u01f5", "σίσυφος", "i\u0307"],
    "\u0301 a\ufe0f": ["a\ufe0f"],
}


@pytest.mark.parametrize("text, expected", UNSEEN.items())
def test_words_never_seen_are_named_alike(
    chromium: Any, text: str, expected: list[str]
) -> None:
    page = chromium.new_page()
    page.add_script_tag(content="var minidiff = {};")
    page.add_script_tag(path=LIVE / "line.js")
    found = page.evaluate("(text) => minidiff.unseen(text, ['a', 'red'])", text)
    named = list(dict.fromkeys(word["word"] for word in found))
    page.context.close()
    line = f"the small model has not seen: {', '.join(expected)}" if expected else ""
    assert (named, unknown_words([text], {"a", "red"})) == (expected, line)


def test_a_character_map_is_followed(page: Any, pipe: Pipeline) -> None:
    """The world's T5 reads capitals as small letters, as a SentencePiece map tells."""
    shipped = pipe.tokenizers[2]
    folded, plain = (
        T5Tokenizer(shipped.scores, charsmap, shipped.settings)
        for charsmap in (case_folding(), b"")
    )
    page.evaluate(
        "(table) => { window.folded = makeTokenizer(table, model.about.unicode); }",
        tokenizer_table(folded),
    )
    texts = ["A Red DRESS", "É E\u0301 A\u0301B", "ÀA 👗 A\u200dB", *of_every_plane(60)]
    found = page.evaluate("(texts) => texts.map((t) => folded.encode(t, 32))", texts)
    assert found == folded(texts, 32).tolist()
    assert found != plain(texts, 32).tolist()


@pytest.mark.parametrize("count", [1, 5, 16, 37, 4096])
@pytest.mark.parametrize("seed", [0, 7, 2**32 + 1, 2**53 - 1])
def test_a_seed_means_the_same_noise(page: Any, count: int, seed: int) -> None:
    found = page.evaluate(f"Array.from(randn({count}, {seed}))")
    expected = starting_noise([seed], [count])[0]
    assert relative_error(torch.tensor(found), expected) < 1e-6


@pytest.mark.parametrize("steps", [1, 2, 7, 28])
def test_levels_are_pythons(
    page: Any, pipe: Pipeline, small_page: Any, small_pipe: Pipeline, steps: int
) -> None:
    for where, python in ((page, pipe), (small_page, small_pipe)):
        found = where.evaluate(f"sigmaSchedule({steps}, model.about.scheduler)")
        expected = python.scheduler.sigmas(steps)
        assert (torch.tensor(found) - expected).abs().max() < 1e-7


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("which", ["", "small_"])
def test_each_component(which: str, request: pytest.FixtureRequest) -> None:
    page = request.getfixturevalue(f"{which}page")
    python = request.getfixturevalue(f"{which}pipe")
    sigma = python.scheduler.sigmas(7)[3:4]
    x = python.prepare_latents(1, seed=3)
    given = {"prompt": "a green coat!", "latents": x.flatten().tolist()}
    found = page.evaluate(VELOCITY, given | {"sigma": sigma.item()})
    context, pooled = python.encode_prompt([given["prompt"]])
    with record_attention(python.transformer) as maps:
        v = python.transformer(x, sigma, context, pooled)
    expected = [context, pooled, v, *(recorded[0] for recorded in maps.values())]
    for ours, value in zip(map(unpacked, found), expected, strict=True):
        assert relative_error(ours, value.flatten()) < 1e-5, tuple(value.shape)


def drawn(page: Any, requests: list[dict[str, Any]]) -> list[tuple[Tensor, Tensor]]:
    return [tuple(map(unpacked, both)) for both in page.evaluate(DRAW, requests)]


def differences(
    python: Pipeline, page: Any, requests: list[dict], net: ControlNet | None = None
) -> list[float]:
    """Of latents and pictures, relative."""
    errors = []
    for asked, (latents, picture) in zip(requests, drawn(page, requests), strict=True):
        options = {"num_inference_steps": asked["steps"], "seed": asked["seed"]}
        options |= {"guidance_scale": asked["guidance"]}
        options |= {"sampler": asked.get("sampler", "euler")}
        if net:
            side = round(len(asked["sketch"]) ** 0.5)
            lines = torch.tensor(asked["sketch"]).view(1, side, side).float()
            options["control"] = Control(lines, net, asked.get("strength", 1.0))
        expected = python(asked["prompt"], output_type="latent", **options)
        errors.append(relative_error(latents, expected.flatten()))
        pixels = python.decode(expected)[0].permute(1, 2, 0)
        errors.append(relative_error(picture, pixels.flatten()))
    return errors


@pytest.mark.slow
def test_pictures_of_fifty_prompts(page: Any, pipe: Pipeline) -> None:
    prompts = [f"a {t} on a {g} background" for t in THINGS for g in GROUNDS]
    requests = [
        {"prompt": p, "seed": i, "steps": 1, "guidance": 1 + (i % 5 == 0)}
        for i, p in enumerate(prompts)
    ]
    requests[0] |= {"steps": 12, "guidance": 2.5}
    assert max(differences(pipe, page, requests)) < 1e-3


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.filterwarnings("ignore:CLIP-L and CLIP-G read")
def test_solvers(small_page: Any, small_pipe: Pipeline, sampler: str) -> None:
    asked = {"prompt": PROMPT, "seed": 5, "steps": 5, "guidance": 2.0}
    asked |= {"sampler": sampler}
    assert max(differences(small_pipe, small_page, [asked])) < 1e-4


@pytest.mark.filterwarnings("ignore:CLIP-L and CLIP-G read")
def test_a_distilled_model_jumps(chromium: Any, small: Path, tmp_path: Path) -> None:
    python = halved(small)
    python.scheduler = JumpScheduler(shift=3.0)
    page = opened(chromium, python, tmp_path)
    for steps in range(1, 9):
        found = page.evaluate(f"schedule({steps}, model.about.scheduler)")
        sigmas = python.scheduler.sigmas(steps)
        times = python.scheduler.told(sigmas)[:-1]  # of levels unshifted in float32
        assert (torch.tensor(found["sigmas"]) - sigmas).abs().max() < 1e-7
        assert (torch.tensor(found["times"]) - times).abs().max() < 5e-7
    requests = [
        {"prompt": PROMPT, "seed": n, "steps": n, "guidance": 1} for n in (1, 3, 8)
    ]
    assert max(differences(python, page, requests)) < 1e-4
    page.context.close()


def square(side: int) -> list[int]:
    """A sketch of a frame, a quarter of the picture wide."""
    lines = torch.zeros(side, side, dtype=torch.long)
    a, b = side // 4, side // 2
    lines[a : b + 1, a : b + 1] = 1
    lines[a + 1 : b, a + 1 : b] = 0
    return lines.flatten().tolist()


@pytest.mark.filterwarnings("ignore:CLIP-L and CLIP-G read")
@pytest.mark.parametrize("which", ["tiny", "small"])
def test_a_sketch_steers(
    chromium: Any, which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    python = request.getfixturevalue("pipe" if which == "tiny" else "small_pipe")
    net = begin_control(python.transformer)
    net = load_control("tiny-edges") if which == "tiny" else randomize(net, 3)
    net = net.half().float()  # what is exported
    page = opened(chromium, python, tmp_path, net)
    side = python.transformer.config.sample_size * python.vae.config.factor
    asked = {"prompt": PROMPT, "seed": 2, "steps": 3, "guidance": 2.0}
    assert max(differences(python, page, [asked])) < 1e-3
    asked["sketch"] = square(side)
    assert max(differences(python, page, [asked], net)) < 1e-3
    blank = asked | {"sketch": [0] * side**2, "strength": 0.5}
    assert max(differences(python, page, [blank], net)) < 1e-3
    others = [x[0] for x in drawn(page, [asked, blank])]
    assert relative_error(*others) > 0.02
    page.context.close()


def test_edges_of_a_picture_are_the_chapters(chromium: Any) -> None:
    """But where brightness lies just between two whole numbers."""
    page = chromium.new_page()
    page.add_script_tag(content="var minidiff = {};")
    page.add_script_tag(path=LIVE / "edges.js")
    scenes = (255 * (sample_scenes()[0] + 1) / 2).round()
    whole = torch.cat([scenes, torch.full_like(scenes[:, :1], 255)], 1)
    bytes_ = whole.permute(0, 2, 3, 1).flatten(1).long().tolist()
    found = page.evaluate("(all) => all.map((x) => [...minidiff.canny(x, 64)])", bytes_)
    expected = canny(scenes / 255).flatten(1)
    assert (torch.tensor(found) != expected).float().mean() < 1e-3
    assert expected.mean() > 0.03
    page.context.close()


def test_a_net_that_the_runtime_does_not_read(pipe: Pipeline, tmp_path: Path) -> None:
    depth = begin_control(pipe.transformer)
    depth.kind = "depth"
    with pytest.raises(ValueError, match="the net reads depth; expected edges"):
        export_pipeline(pipe, tmp_path / "live", "odd", depth)
    assert not (tmp_path / "live").exists()


def test_heads_that_the_kernel_cannot_take(pipe: Pipeline, tmp_path: Path) -> None:
    odd = minidiff.load("tiny")
    odd.transformer.config = replace(odd.transformer.config, attention_head_dim=20)
    with pytest.raises(ValueError, match="heads of 20 channels; expected"):
        export_pipeline(odd, tmp_path / "live", "odd")
    assert not (tmp_path / "live").exists()


def test_memory_that_the_browser_does_not_give(page: Any) -> None:
    tell = "openMemory(null, 2 ** 34).catch((error) => error.message)"
    assert "gives no 65600 MB of memory" in page.evaluate(tell)


@pytest.mark.slow
def test_models_share_the_parts_that_are_equal(pipe: Pipeline, tmp_path: Path) -> None:
    for name in ("one", "two"):
        export_pipeline(pipe, tmp_path, name)
    assert len(list(tmp_path.glob("*.bin"))) == 5
    assert '{"one":' in (tmp_path / "models.js").read_text()
    assert '"two":' in (tmp_path / "models.js").read_text()


# The bench: each switch is what a chapter's Python gives


def follow(python: Pipeline, text: tuple[Tensor, Tensor], **changes: Any) -> Tensor:
    """Euler's three steps, the transformer called as chapter 5 has it."""
    sigmas, x = python.scheduler.sigmas(3), python.prepare_latents(1, seed=9)
    for now, after in itertools.pairwise(sigmas):
        v = python.transformer(x, now[None], *text, **changes)
        x = x + (after - now) * v
    return x


def bench(page: Any, **changes: Any) -> Tensor:
    asked = {"prompt": PROMPT, "seed": 9, "steps": 3, "guidance": 1}
    return drawn(page, [asked | {"changes": changes}])[0][0]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:CLIP-L and CLIP-G read")
def test_the_bench_takes_away_what_python_would(
    small_page: Any, small_pipe: Pipeline
) -> None:
    python, transformer = small_pipe, small_pipe.transformer
    text, other = (python.encode_prompt([p]) for p in (PROMPT, "a green boot"))
    cases = [
        ({"skip": [1]}, follow(python, text, skip_layers=[1])),
        ({"pooled": "a green boot"}, follow(python, (text[0], other[1]))),
        (
            {"texts": [PROMPT, "", ""]},
            follow(python, python.encode_prompt([(PROMPT, "", "")])),
        ),
        ({}, follow(python, text)),
    ]
    head = transformer.config.attention_head_dim

    def silence(module: Any, given: Any, read: tuple[Tensor, Tensor]) -> None:
        for stream in read:
            stream[..., head : 2 * head] = 0

    layer = transformer.joint_blocks[1].attention
    handle = layer.register_forward_hook(silence)
    cases.append(({"silence": {"block": 1, "head": 1}}, follow(python, text)))
    handle.remove()
    for changes, expected in cases:
        found = bench(small_page, **changes)
        assert relative_error(found, expected.flatten()) < 1e-4, changes
    found = [bench(small_page, **changes) for changes, _ in cases]
    for a, b in itertools.combinations(found, 2):
        assert relative_error(a, b) > 1e-3, "a switch does nothing"
