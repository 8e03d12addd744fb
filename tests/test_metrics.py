from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

import minidiff
from minidiff.data.garments import Attributes, Scenes, prompts
from minidiff.judging import attention_maps, distances, metrics
from minidiff.judging.distances import correlation, frechet_distance, psnr_by_picture
from minidiff.judging.judge import Judge, JudgeConfig, load_judge, score


def published(a: np.ndarray, b: np.ndarray) -> float:
    """The formula as Heusel et al. published it: the root of the plain product."""
    root = scipy.linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False))
    spread = np.trace(np.cov(a, rowvar=False) + np.cov(b, rowvar=False) - 2 * root.real)
    return float(np.sum((a.mean(0) - b.mean(0)) ** 2) + spread)


@pytest.mark.parametrize(("n", "m", "d"), [(500, 400, 8), (300, 300, 64), (80, 90, 50)])
def test_frechet_distance_is_the_published_one(n, m, d):
    torch.manual_seed(n)
    a = torch.randn(n, d) @ torch.randn(d, d) + 1
    b = (torch.randn(m, d) @ torch.randn(d, d)).relu()
    expected = published(a.double().numpy(), b.double().numpy())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("n", "m", "d", "given"),
    [(90, 70, 6, 5.567797821466401), (40, 50, 24, 26.140074763456326)],
)
def test_frechet_distance_that_pytorch_fid_gave(n, m, d, given):
    """Of these waves, by ``calculate_frechet_distance`` of pytorch-fid 0.3.0."""
    row, column = (torch.arange(1, k + 1).double() for k in (max(n, m), d))
    a = torch.sin(row[:n, None] * column) + column / d
    b = 2 * torch.cos(row[:m, None] * column.sqrt())
    assert frechet_distance(a, b) == pytest.approx(given, rel=1e-9)


def exact(mean: torch.Tensor, covariance: torch.Tensor, n: int = 64) -> torch.Tensor:
    """Rows whose sample mean and covariance are exactly the ones given."""
    x = torch.randn(n, len(mean), dtype=torch.float64)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T
    return x @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_known_gaussians():
    one, zero = torch.eye(3).double(), torch.zeros(3).double()
    a, far = exact(zero, one), exact(zero + 2, one)
    assert frechet_distance(a, far) == pytest.approx(12)  # 3 · 2²
    wide = exact(zero, torch.diag(torch.tensor([4.0, 9, 1]).double()))
    assert frechet_distance(a, wide) == pytest.approx(5)  # (2 − 1)² + (3 − 1)²
    assert frechet_distance(wide, a) == pytest.approx(5)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_where_the_plain_root_is_unstable():
    """Fewer rows than dimensions, dead features, one feature repeated."""
    torch.manual_seed(0)
    a, b = torch.randn(40, 100), torch.randn(40, 100)
    a[:, :50], b[:, :50] = 0, 0
    b[:, 99] = b[:, 98]
    found = frechet_distance(a, b)
    left, right = (distances.square_root(x.double().T.cov()) for x in (a, b))
    nuclear = torch.linalg.svdvals(left @ right).sum()  # tr (C₁ C₂)^½, another way
    a, b = a.double(), b.double()
    expected = (a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum()
    assert found == pytest.approx((expected - 2 * nuclear).item(), rel=1e-6)


def test_frechet_distance_of_one_feature():
    a, b = torch.randn(50, 1), 2 * torch.randn(60, 1) + 3
    known = (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2
    assert frechet_distance(a, b) == pytest.approx(known.item(), rel=1e-4)


def test_frechet_distance_refuses():
    with pytest.raises(ValueError, match=r"\(3, 2\) and \(3, 4\)"):
        frechet_distance(torch.zeros(3, 2), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="1 and 3 rows"):
        frechet_distance(torch.zeros(1, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(torch.full((3, 2), torch.nan), torch.zeros(3, 2))


def test_psnr_of_known_errors():
    a = torch.zeros(2, 3, 8, 8)
    b = a + torch.tensor([0.02, 0.2])[:, None, None, None]
    assert psnr_by_picture(a, b).tolist() == pytest.approx([40, 20])


def test_correlation():
    a = torch.randn(4, 50)
    expected = [np.corrcoef(x, x**2 + x)[0, 1] for x in a.numpy()]
    assert correlation(a, a**2 + a).tolist() == pytest.approx(expected, rel=1e-4)
    assert correlation(a, -2 * a + 1).tolist() == pytest.approx([-1] * 4)


def logits_of(attributes: Attributes) -> Attributes:
    """Certain logits of what the attributes say."""
    sizes = (3, 10, 8, 8)
    hot = (
        nn.functional.one_hot(a.clamp(min=0), n)
        for a, n in zip(attributes, sizes, strict=True)
    )
    return Attributes(*(h.float() for h in hot))


@pytest.mark.parametrize("kind", ["one", "two"])
def test_score_counts_each_attribute(kind):
    _, wanted = prompts(100, kind)
    assert all(v.all() for v in score(logits_of(wanted), wanted).values())
    column = 0 if kind == "one" else 1
    wrong = wanted.colors.clone()
    wrong[:30, column] = (wrong[:30, column] + 1) % 8
    found = score(logits_of(wanted._replace(colors=wrong)), wanted)
    means = {k: round(v.float().mean().item(), 4) for k, v in found.items()}
    assert means == {
        "layout": 1, "garments": 1, "colors": 0.7, "background": 1, "all": 0.7,
        "colors and background": 0.7,
    }  # fmt: skip
    # What is said of a second garment that is not there does not count.
    if kind == "one":
        other = wanted._replace(garments=wanted.garments + torch.tensor([0, 4]))
        assert score(logits_of(other), wanted)["all"].all()


class Echo:
    """A pipeline whose pictures are the noise that it is given, enlarged."""

    def __init__(self) -> None:
        config = SimpleNamespace(in_channels=16, sample_size=16)
        self.transformer = nn.Linear(1, 1)
        self.transformer.config = config
        self.vae = nn.Linear(1, 1)
        self.vae.config = SimpleNamespace(factor=4)
        self.vae.encode = lambda x: SimpleNamespace(mode=lambda: x)
        self.vae.decode = lambda z: z - 0.02 * z.sign()  # 40 dB
        self.calls: list[dict] = []

    def __call__(self, texts, latents, output_type, **options):
        assert len(texts) == len(latents) and output_type == "pt"
        self.calls.append(options)
        return nn.functional.interpolate(latents[:, :3].sigmoid(), scale_factor=4)


@pytest.mark.slow
def test_evaluate(fashion):
    torch.manual_seed(0)
    judge, pipe = Judge(JudgeConfig((8, 8, 8), (1, 1, 1), 12)).eval(), Echo()
    judge.window.weight.data *= 100  # untrained features hardly differ
    found = metrics.assess(
        pipe, judge, 24, guidance_scale=2.0, folder=fashion, batch=16
    )
    assert list(found["rows"]) == list(metrics.ROWS)
    assert pipe.calls[0] == {"num_inference_steps": 28, "guidance_scale": 2.0}
    assert found["vae_psnr"] == pytest.approx(40, abs=0.01)
    assert found["frechet"]["n"] == 48
    assert found["frechet"]["model"] > found["frechet"]["floor"]
    again = metrics.assess(
        Echo(), judge, 24, guidance_scale=2.0, folder=fashion, batch=24
    )
    assert again["rows"] == found["rows"]  # whatever the batch
    table = metrics.format_table(found)
    assert "two garments, one never trained" in table and "FID" not in table
    model, floor, vae = (found["frechet"][k] for k in ("model", "floor", "vae"))
    assert "in the judge's last hidden layer, 48 pictures" in table
    assert f"model {model}, test scenes {floor}, VAE reconstructions {vae}." in table


@pytest.mark.slow
def test_evaluate_with_other_features(fashion):
    """With Inception-v3's, here means of three channels, the distances are FID."""
    judge, seen = Judge(JudgeConfig((8, 8, 8), (1, 1, 1), 12)).eval(), []

    def means(images):
        seen.append(len(images))
        return images.mean((2, 3))

    rows = metrics.choose_rows("all")[::2]  # those with seen pairs
    options = {"folder": fashion, "batch": 8, "rows": rows, "inception": means}
    found = metrics.assess(Echo(), judge, 8, guidance_scale=1.0, **options)
    assert sum(seen) == 2 * (8 + 8) + 16 + 16  # rows, then training, then the VAE's
    assert 0 < found["frechet"]["floor"] < found["frechet"]["model"]
    assert "in Inception-v3's last pool (FID), 16 pictures" in metrics.format_table(
        found
    )


def test_evaluate_refuses():
    with pytest.raises(ValueError, match="n is 1"):
        metrics.assess(Echo(), Judge(), 1)
    with pytest.raises(ValueError, match="n is 100001; expected .* 2 to 100000"):
        metrics.assess(Echo(), Judge(), 100_001)
    with pytest.raises(ValueError, match="seed is 9223372036854775808; expected"):
        metrics.assess(Echo(), Judge(), 2, seed=2**63)
    large = Echo()
    large.vae.config.factor = 8
    with pytest.raises(ValueError, match="draws 128 × 128 pixels"):
        metrics.assess(large, Judge(), 2)
    with pytest.raises(ValueError, match="garments is 'three'"):
        metrics.choose_rows("three")
    assert len(metrics.choose_rows("one")) == 2 and len(metrics.choose_rows("all")) == 4


class Words:
    """A tokenizer that gives a word as many tokens as it has letters."""

    model_max_length = 32

    def __init__(self, start: bool) -> None:
        self.start = start

    def encode(self, text: str) -> list[int]:
        return [0] * self.start + [1] * len(text.replace(" ", "")) + [2]


def test_rows_of_words_in_the_context():
    pipe = SimpleNamespace(tokenizers=[Words(True), Words(True), Words(False)])
    rows = attention_maps.word_rows(pipe, "a red ankle boot on a sea background")
    assert rows["T5 color"] == [33, 34, 35] and rows["CLIP color"] == [2, 3, 4]
    assert rows["T5 garment"] == list(range(36, 45))
    assert rows["T5 background"] == [48, 49, 50]


@pytest.mark.slow
def test_pictures_that_show_the_prompt_are_right(fashion, monkeypatch):
    """The prompts are those of the real scenes, and of the test split."""
    known = {}
    for two in (0.0, 1.0):
        for held in (False, True):
            how = {"seed": 2, "two_garments": two, "held_out": held}
            scenes = Scenes("test", fashion, **how).batch(torch.arange(40))
            known |= dict(zip(scenes.captions, scenes.images, strict=True))
    drawn = lambda pipe, texts, *_, **__: torch.stack([known[t] for t in texts])  # noqa: E731
    monkeypatch.setattr(metrics, "generate", drawn)
    how = {"guidance_scale": 1.0, "folder": fashion, "batch": 16}
    for row in metrics.assess(Echo(), load_judge(), 40, **how)["rows"].values():
        assert row["real"]["colors and background"] > 0.95
        assert row["model"]["all"] == pytest.approx(row["real"]["all"], abs=0.1)


@pytest.mark.slow
def test_words_look_where_their_garment_is(fashion):
    pipe = minidiff.load("tiny")
    found = attention_maps.attention_correlation(pipe, 16, folder=fashion)
    assert found.keys() == {
        f"{encoder} {word}"
        for encoder in ("CLIP", "T5")
        for word in ("color", "garment", "background")
    }
    best = max(abs(x) for w in found.values() for v in w.values() for x in v)
    assert best >= 0.8
    pipe.text_encoders = (*pipe.text_encoders[:2], None)
    pipe.tokenizers = (*pipe.tokenizers[:2], None)
    found = attention_maps.attention_correlation(pipe, 2, folder=fashion)
    assert {name.split()[0] for name in found} == {"CLIP"}


@pytest.mark.slow
def test_what_is_compared_with_what(fashion, monkeypatch):
    """Training scenes are the reference, all others are the test set's."""
    seen, real = [], metrics.Scenes
    monkeypatch.setattr(metrics, "Scenes", lambda s, *a: seen.append(s) or real(s, *a))
    judge, pipe = Judge(JudgeConfig((8, 8, 8), (1, 1, 1), 12)).eval(), Echo()
    how = {"guidance_scale": 1.0, "folder": fashion}
    every = metrics.assess(pipe, judge, 8, **how)
    assert sorted(seen) == ["test"] * 6 + ["train"] * 2
    known = metrics.assess(pipe, judge, 8, rows=list(metrics.ROWS)[::2], **how)
    assert known["frechet"] == every["frechet"]  # never-trained pairs do not count


def test_rows_alone_and_the_usual_guidance(fashion):
    judge, pipe = Judge(JudgeConfig((8, 8, 8), (1, 1, 1), 12)).eval(), Echo()
    pipe.defaults = SimpleNamespace(guidance_scale=3.0)
    rows = metrics.choose_rows("one")
    found = metrics.assess(pipe, judge, 2, folder=fashion, rows=rows)
    assert pipe.calls[0]["guidance_scale"] == 3 and "frechet" not in found
    assert "Fréchet" not in metrics.format_table(found)
