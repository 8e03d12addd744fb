import re
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

import minidiff
from minidiff.data.language import Group, Meaning, shown
from minidiff.data.scenes import COLORS, KINDS, held_out_colors
from minidiff.judging import attention_maps, distances, metrics
from minidiff.judging.distances import correlation, frechet_distance, psnr_by_picture
from minidiff.judging.judge import Judge, JudgeConfig, load_judge

SMALL = JudgeConfig((8, 8, 16), (1, 1, 1), 8)
HOW = {"num_inference_steps": 28, "guidance_scale": 2.0}


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


def test_a_comparison_does_not_depend_on_its_batch(fashion):
    judge, pipe = load_judge(), Echo()
    names = ("one garment", "all scenes")
    found = metrics.Comparison(pipe, judge, 24, folder=fashion, batch=16, **HOW)
    result = found.rows(names)
    assert list(result["rows"]) == list(names) and pipe.calls[0] == HOW
    assert result["psnr"]["all"] == pytest.approx(40, abs=0.01)
    assert result["frechet"]["model"] > result["frechet"]["floor"]
    again = metrics.Comparison(Echo(), judge, 24, folder=fashion, batch=24, **HOW)
    assert again.rows(names) == result
    table = metrics.format_table(result)
    assert "| one garment | " in table and "FID" not in table
    model, floor = (result["frechet"][k] for k in ("model", "floor"))
    assert "in the judge's last hidden layer, 24 pictures" in table
    assert f"model {model}, test scenes {floor}." in table


def test_distances_in_other_features(fashion):
    """With Inception-v3's, here means of three channels, the distances are FID."""
    seen = []

    def means(images):
        seen.append(len(images))
        return images.mean((2, 3))

    judge, sizes = Judge(SMALL).eval(), {"folder": fashion, "batch": 8}
    found = metrics.Comparison(Echo(), judge, 8, **sizes, inception=means, **HOW)
    result = found.rows(("all scenes",))
    assert sum(seen) == 3 * 8  # training scenes, test scenes, drawn pictures
    assert "in Inception-v3's last pool (FID), 8 pictures" in metrics.format_table(
        result
    )


def test_the_reference_are_training_scenes(fashion, monkeypatch):
    seen, real = [], metrics.World
    monkeypatch.setattr(
        metrics, "World", lambda s, *a, **k: seen.append(s) or real(s, *a, **k)
    )
    judge = Judge(SMALL).eval()
    found = metrics.Comparison(Echo(), judge, 8, folder=fashion, batch=8, **HOW)
    found.distances(
        {"real": torch.zeros(8, 3, 64, 64), "model": torch.ones(8, 3, 64, 64)}
    )
    assert seen == ["train"]
    seen.clear()
    found.row("one thing")
    assert seen == ["test", "test"]  # what prompts say, and its pictures


def test_pictures_that_show_the_prompt_are_right(fashion, monkeypatch):
    """The prompts are those of the real scenes, of the test split."""
    row = metrics.ROWS["two things"]
    texts, _, numbers = metrics.row_prompts(row, 40, 2)
    scenes = metrics.row_scenes(row, "test", fashion, "cpu", 2).batch(numbers)
    known = dict(zip(texts, scenes.images, strict=True))
    drawn = lambda pipe, texts, *_, **__: torch.stack([known[t] for t in texts])  # noqa: E731
    monkeypatch.setattr(metrics, "generate", drawn)
    found = metrics.Comparison(Echo(), load_judge(), 40, folder=fashion, **HOW)
    shares, _ = found.row("two things")
    assert shares["real"]["all"] > 0.85 and shares["exchanged"] <= 0.05
    assert shares["model"]["all"] == pytest.approx(shares["real"]["all"], abs=0.1)


def test_what_cannot_be_compared():
    for n, seed, message in (
        (1, 2, "n is 1"),
        (100_001, 2, "n is 100001; expected .* 2 to 100000"),
        (2, 2**63, "seed is 9223372036854775808; expected"),
    ):
        with pytest.raises(ValueError, match=message):
            metrics.Comparison(Echo(), Judge(SMALL), n, seed)
    large = Echo()
    large.vae.config.factor = 8
    with pytest.raises(ValueError, match="draws 128 × 128 pixels"):
        metrics.Comparison(large, Judge(SMALL), 2)
    with pytest.raises(ValueError, match=re.escape("rows is 'five'; expected all")):
        metrics.choose_rows("five")
    assert len(metrics.choose_rows("one")) == 5
    assert metrics.choose_rows("all") == tuple(metrics.ROWS)


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


def test_words_look_where_their_garment_is(fashion):
    pipe = minidiff.load("tiny")
    found = attention_maps.attention_correlation(pipe, 16, folder=fashion)
    assert found.keys() == {
        f"{encoder} {word}"
        for encoder in ("CLIP", "T5")
        for word in ("color", "garment", "background")
    }
    best = max(abs(x) for w in found.values() for v in w.values() for x in v)
    assert best >= 0.5
    pipe.text_encoders = (*pipe.text_encoders[:2], None)
    pipe.tokenizers = (*pipe.tokenizers[:2], None)
    found = attention_maps.attention_correlation(pipe, 2, folder=fashion)
    assert {name.split()[0] for name in found} == {"CLIP"}


def test_rows_name_the_pairs_never_trained():
    row = metrics.ROWS["one garment, colour never trained"]
    texts, meanings, numbers = metrics.row_prompts(row, 40, 2)
    assert len(texts) == len(meanings) == len(numbers) == 40
    held = held_out_colors()
    for meaning in meanings:
        (group,) = meaning.groups
        assert group.color == list(COLORS)[held[KINDS.index(group.kind)]]
    scenes = metrics.row_scenes(row, "test", None, "cpu", 2)
    shows = shown(scenes.attributes(numbers))
    pairs = zip(shows, meanings, strict=True)
    assert all(a.groups[0].kind == b.groups[0].kind for a, b in pairs)
    row = metrics.ROWS["one thing, place never trained"]
    assert all(m.place for m in metrics.row_prompts(row, 40, 2)[1])


def test_texture_is_the_roughness_inside():
    smooth = torch.full((2, 3, 64, 64), -1.0)
    smooth[:, :, 16:48, 16:48] = 1.0
    rough = smooth.clone()
    rough[:, :, 16:48, 16:48] -= 0.2 * (torch.arange(32) % 2)
    values = metrics.texture(torch.cat([smooth, rough]))
    torch.testing.assert_close(values, torch.tensor([0.0, 0.0, 0.16, 0.16]))
    assert len(metrics.texture(smooth[:, :, :, :1].expand(-1, -1, -1, 64))) == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:T5 reads 32 tokens")
def test_an_evaluation_measures_every_row(monkeypatch):
    import minidiff

    pipe = minidiff.load("tiny")
    pipe.progress = False
    options = {"num_inference_steps": 1, "guidance_scale": 2.0}
    found = metrics.Comparison(pipe, Judge(SMALL), 3, batch=3, **options)
    monkeypatch.setattr(found, "reconstruction", lambda n: {"all": 30.0})
    result = found.rows(("one garment", "all scenes"))
    assert result["rows"].keys() == {"one garment", "all scenes"}
    assert result["frechet"]["n"] == 3 and result["texture"].keys() == {"real", "model"}
    table = metrics.format_table(result)
    assert "| one garment | " in table and "30.0 dB" in table
    free = {"prompts": found.free([("a cat", Meaning((Group("cat"),)))])}
    assert free["prompts"]["n"] == 1 and free["prompts"]["rows"][0]["prompt"] == "a cat"
    assert "1 prompts: right" in metrics.format_table(free)
