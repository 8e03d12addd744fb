"""The chapters' shape comments, against the shapes of a run at tiny sizes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import randomize
from PIL import Image
from pipelines import save_tokenizers
from shapes import Claim, Tracer, unify

from minidiff import (
    attention,
    control,
    dit,
    efficiency,
    sampling,
    text_encoders,
    tokenizer,
    training,
    vae,
)
from minidiff import flow_matching as fm
from minidiff.distillation import distribution_matching_loss
from minidiff.drawing import previews
from minidiff.drawing.image_to_image import image_to_image
from minidiff.engine import fast, tiling
from minidiff.files.pictures import to_pil

ROOT = Path(__file__).parents[1]
CHAPTERS = ("tokenizer", "text_encoders", "vae", "attention", "dit", "flow_matching")
CHAPTERS += ("training", "sampling", "distillation", "control", "efficiency")
ABOVE = ("engine/fast", "engine/tiling", "drawing/previews", "drawing/image_to_image")


def test_letters_are_solved_for() -> None:
    known: dict[str, int] = {}
    assert unify(["B", "H*d", "2*L"], (2, 12, 10), known | {"d": 4})
    assert unify(["…", "L"], (7, 7, 5), known) and known == {"L": 5}
    assert not unify(["B", "L"], (3, 4), {"L": 5})
    assert not unify(["B", "L", "D"], (3, 4), {})
    assert not unify(["B", "H*d"], (3, 7), {"H": 2, "d": 4})


@pytest.mark.parametrize("wrong", ["(B, L, H·d) → (B, L, H, d)", "(B, L) → (B, L)"])
def test_a_false_comment_is_found(tmp_path: Path, wrong: str) -> None:
    right = "(B, L, H, d) → (B, L, H·d)"
    path = tmp_path / "module.py"
    for comment in (right, wrong):
        path.write_text(
            f"def merge(x):\n    y = x.flatten(2)  # {comment}\n    return y\n"
        )
        space: dict[str, Callable] = {}
        exec(compile(path.read_text(), str(path), "exec"), space)
        tracer = Tracer([path])
        tracer.run(lambda merge=space["merge"]: merge(torch.zeros(2, 3, 4, 5)))
        assert tracer.claims[0].runs == 1
        assert bool(tracer.claims[0].problems) == (comment == wrong)


def pipeline(folder: Path) -> sampling.Pipeline:
    """The tiny pipeline with random weights, one block with dual attention."""
    save_tokenizers(folder)
    tokenizers = [
        tokenizer.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer.CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        tokenizer.T5Tokenizer.from_pretrained(folder / "tokenizer_3"),
    ]
    clips = text_encoders.CLIPTextConfig
    clips = [
        replace(c, vocab_size=600, max_position_embeddings=12, eos_token_id=e)
        for c, e in ((clips.tiny_l(), 511), (clips.tiny_g(), 2))
    ]
    encoders = [text_encoders.CLIPTextEncoder(config) for config in clips]
    encoders.append(text_encoders.T5Encoder(text_encoders.T5Config.tiny()))
    config = replace(dit.MMDiTConfig.tiny(), num_layers=3, dual_attention_layers=(0,))
    parts = [dit.MMDiT(config), vae.VAE(vae.VAEConfig.tiny())]
    for part in encoders + parts:
        randomize(part)
    return sampling.Pipeline(tokenizers, encoders, *parts, fm.Scheduler(shift=3.0))


def draw(pipe: sampling.Pipeline) -> None:
    prompts = ["a red dress", "a blue bag on a white background"]
    size = {"height": 32, "width": 48, "num_inference_steps": 2}
    with attention.record_attention(pipe.transformer, blocks=[0], queries=[0, 1]):
        pipe(prompts, guidance_scale=3.0, output_type="pt", seed=0, **size)
    pipe(prompts[0], guidance_scale=1.0, sampler="dpmpp_2m", seed=0, **size)
    pipe(prompts[0], output_type="np", **size)
    pipe.vae.encode(torch.rand(2, 3, 16, 24)).sample()


def train(pipe: sampling.Pipeline) -> None:
    clip_l, clip_g, t5 = pipe.text_encoders
    images, ids = torch.rand(2, 3, 64, 64), torch.randint(3, 60, (2, 12))
    model = training.CLIPTraining(clip_l, clip_g)
    pairs = torch.stack([ids, ids.flip(0)], 1)
    batch = {"images": images, "ids_l": pairs, "ids_g": pairs}
    batch["meaning"] = torch.arange(2)
    training.clip_loss(model, batch)
    hidden = training.choose_spans(torch.rand(2, 4), ids, 0)
    source, target = training.corrupt_spans(ids, hidden, torch.arange(90, 100), 0, 1)
    batch = {"source": source, "target": target}
    training.t5_loss(training.T5Training(t5, length=target.shape[1]), batch)
    batch = {"images": images[..., :32], "noise": torch.randn(2, 16, 16, 8)}
    training.vae_loss(pipe.vae, batch)
    context, pooled = torch.randn(2, 24, 192), torch.randn(2, 160)
    training.drop_encoders(context, pooled, torch.ones(2, 3) > 0, (64, 96))


def compare(pipe: sampling.Pipeline) -> None:
    """The naive forms that the chapters begin with."""
    q, k, v = torch.randn(3, 2, 4, 5, 8)
    attention.attend_loops(q[0, 0], k[0, 0], v[0, 0])
    attention.attend_matrices(q, k, v)
    text_encoders.attend_in_loops(q[0, 0], k[0, 0], v[0, 0], torch.zeros(5, 5), 0.3)
    text_encoders.attend_all(q, k, v, torch.zeros(5, 5), 0.3)
    text_encoders.similarity(torch.randn(5, 7))
    vae.group_norm_in_loops(torch.randn(2, 8, 4, 6), 4)
    vae.group_norm_at_once(torch.randn(2, 8, 4, 6), 4)
    dit.position_table(6, 32, 4)
    dit.patches_loops(torch.randn(2, 16, 8, 12), 2)
    x0, noise = torch.randn(2, 2, 16, 4, 4)
    fm.flow_matching_loss(lambda x, sigma: x, x0, noise, torch.rand(2))
    fm.dpmpp_2m(lambda x, sigma: x, x0, torch.tensor([1.0, 0.5, 0.0]))
    still = lambda x, sigma: x  # noqa: E731
    distribution_matching_loss(x0, still, still, noise, torch.rand(2))
    given = torch.randn(1, 5, 192), torch.randn(1, 160)
    levels, guided = torch.tensor([1.0, 0.5]), (given, given)
    sampling.denoise_naively(pipe.transformer, x0[:1], *guided, levels, 2.0)
    efficiency.attend_tiles(*torch.randn(3, 1, 2, 5, 8), tile=2)
    efficiency.restore_nf4(efficiency.quantize_nf4(torch.randn(3, 128)))
    efficiency.double(torch.randn(2, 6, 4, 5), vae.Upsample(6))
    exact = fm.exact_velocity(torch.randn(5, 2))
    fm.euler_loops(exact, torch.randn(3, 2), torch.tensor([1.0, 0.5]))


def steer(pipe: sampling.Pipeline) -> None:
    """Two drawings by one sketch, a picture and then a map of edges."""
    net = control.begin_control(pipe.transformer)
    sketch = torch.rand(1, 32, 48).round()
    for image in (to_pil(sketch.expand(1, 3, -1, -1))[0], sketch):
        one = control.Control(image, net)
        size = {"height": 32, "width": 48, "num_inference_steps": 1}
        pipe(["a red dress", "a bag"], control=one, output_type="pt", **size)
    control.canny(torch.rand(2, 3, 8, 6))
    control.encode_weighted(pipe, "a (red:1.5) dress")


def go_beyond(pipe: sampling.Pipeline) -> None:
    """What the rooms above make of a pipeline that also draws in tiles."""
    previews.fit_preview(pipe.vae)(torch.randn(2, 16, 4, 6))
    picture, mask = torch.rand(3, 32, 48), Image.new("L", (48, 32))
    pipe.vae = tiling.Tiled(pipe.vae, 8)
    pipe.transformer = fast.accelerate(pipe.transformer, pipe.vae)
    prompts = ["a red dress", "a bag"]
    for image in (picture, to_pil(picture[None])[0]):
        image_to_image(pipe, prompts, image, mask_image=mask, num_inference_steps=2)


@pytest.fixture(scope="module")
def claims(tmp_path_factory: pytest.TempPathFactory) -> list[Claim]:
    pipe = pipeline(tmp_path_factory.mktemp("tokenizers"))
    files = [ROOT / "minidiff" / f"{name}.py" for name in (*CHAPTERS, *ABOVE)]
    tracer = Tracer(files)
    for work in (draw, train, compare, steer, go_beyond):
        tracer.run(lambda work=work: work(pipe))
    return tracer.claims


def test_shape_comments_are_true(claims: list[Claim]) -> None:
    problems = [problem for claim in claims for problem in sorted(claim.problems)]
    assert not problems, "\n".join(problems)


def test_shape_comments_are_reached(claims: list[Claim]) -> None:
    missed = [str(claim) for claim in claims if not claim.runs]
    assert len(claims) > 50 and not missed, "\n".join(missed)
