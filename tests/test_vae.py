"""The autoencoder against diffusers' AutoencoderKL and its own equations."""

import math
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from exercises import Desk
from helpers import patch_functions, randomize, relative_error
from torch import Tensor, nn

from minidiff import vae
from minidiff.classroom import exercises
from minidiff.files.weights import vae_sources
from minidiff.vae import VAE, Posterior, VAEConfig

CONFIGS = [
    VAEConfig(3, 3, 16, (8, 16, 16), 2, 4),
    VAEConfig(3, 3, 4, (12,), 1, 3, 0.7, -0.2),
    VAEConfig(1, 3, 8, (8, 12, 16, 16), 1, 4),
    VAEConfig(3, 3, 16, (16, 8), 3, 8, 1.3, 0.4),
    VAEConfig(4, 2, 6, (6, 6, 12), 2, 1),
    VAEConfig.tiny(),
]


def pair(config: VAEConfig) -> tuple[VAE, nn.Module]:
    diffusers = pytest.importorskip("diffusers")
    levels = len(config.block_out_channels)
    theirs = diffusers.AutoencoderKL(
        **asdict(config),
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    ours = VAE(config)
    weights = randomize(theirs).state_dict()
    sources = vae_sources(ours.state_dict())
    assert {name for s in sources.values() for name in s.names} == weights.keys()
    for name, parameter in ours.named_parameters():
        (stored,) = sources[name].names
        parameter.data = weights[stored].view(parameter.shape)
    return ours.eval(), theirs


def pictures(config: VAEConfig, height: int = 4, width: int = 6) -> Tensor:
    sides = height * config.factor, width * config.factor
    return torch.rand(2, config.in_channels, *sides) * 2 - 1


@torch.no_grad()
def encode_error(config: VAEConfig) -> float:
    ours, theirs = pair(config)
    images = pictures(config)
    found, expected = ours.encode(images), theirs.encode(images).latent_dist
    seeds = [torch.Generator().manual_seed(3) for _ in range(2)]
    return max(
        relative_error(found.mean, expected.mean),
        relative_error(found.logvar, expected.logvar),
        relative_error(found.mode(), expected.mode()),
        relative_error(found.sample(seeds[0]), expected.sample(seeds[1])),
    )


@torch.no_grad()
def decode_error(config: VAEConfig) -> float:
    ours, theirs = pair(config)
    latents = torch.randn(2, config.latent_channels, 5, 3)
    return relative_error(ours.decode(latents), theirs.decode(latents).sample)


@pytest.mark.parametrize("config", CONFIGS)
def test_encoder_is_diffusers(config):
    assert encode_error(config) <= 1e-5


@pytest.mark.parametrize("config", CONFIGS)
def test_decoder_is_diffusers(config):
    assert decode_error(config) <= 1e-5


def test_tokens_lie_as_fused_attention_wants_them():
    tokens = vae.pixels_to_tokens(torch.randn(2, 3, 4, 5))
    assert tokens.shape == (2, 1, 20, 3) and tokens.is_contiguous()


def other_epsilon(monkeypatch):
    def norm(config, channels):
        return nn.GroupNorm(config.norm_num_groups, channels, eps=1e-3)

    monkeypatch.setattr(vae, "group_norm", norm)


def other_groups(monkeypatch):
    def norm(config, channels):
        return nn.GroupNorm(config.norm_num_groups // 2, channels, eps=1e-6)

    monkeypatch.setattr(vae, "group_norm", norm)


def relu(monkeypatch):
    patch_functions(monkeypatch, vae, silu=F.relu)


def unscaled_attention(monkeypatch):
    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, scale=1.0)

    patch_functions(monkeypatch, vae, scaled_dot_product_attention=attend)


def bilinear(monkeypatch):
    def interpolate(x, scale_factor):
        return F.interpolate(x, scale_factor=scale_factor, mode="bilinear")

    patch_functions(monkeypatch, vae, interpolate=interpolate)


def symmetric_border(monkeypatch):
    patch_functions(monkeypatch, vae, pad=lambda x, border: F.pad(x, (1, 0, 1, 0)))


def logvar_first(monkeypatch):
    real = VAE.encode

    def encode(self, images):
        posterior = real(self, images)
        return Posterior(posterior.logvar, posterior.mean)

    monkeypatch.setattr(VAE, "encode", encode)


def deviation_not_halved(monkeypatch):
    def sample(self, generator=None):
        noise = torch.randn(self.mean.shape, generator=generator)
        return self.mean + torch.exp(self.logvar) * noise

    monkeypatch.setattr(Posterior, "sample", sample)


def transposed_picture(monkeypatch):
    def tokens(x):
        return x.mT.flatten(2).transpose(1, 2)[:, None]

    monkeypatch.setattr(vae, "pixels_to_tokens", tokens)


@pytest.mark.parametrize(
    "mutant, error",
    [
        (other_epsilon, encode_error),
        (other_groups, encode_error),
        (relu, encode_error),
        (symmetric_border, encode_error),
        (logvar_first, encode_error),
        (deviation_not_halved, encode_error),
        (other_epsilon, decode_error),
        (relu, decode_error),
        (unscaled_attention, decode_error),
        (bilinear, decode_error),
        (transposed_picture, decode_error),
    ],
)
def test_parity_catches(monkeypatch, mutant, error):
    mutant(monkeypatch)
    assert error(CONFIGS[0]) > 1e-5


def test_log_variance_is_clamped():
    model = randomize(VAE(CONFIGS[0]))
    with torch.no_grad():
        model.encoder.conv_out.bias += 1000
        assert model.encode(pictures(CONFIGS[0])).logvar.max() == 20
        model.encoder.conv_out.bias -= 2000
        assert model.encode(pictures(CONFIGS[0])).logvar.min() == -30


def test_posterior_samples_follow_it():
    mean, deviation = torch.tensor(0.7), torch.tensor(0.3)
    shape = 2, 4, 100, 100
    posterior = Posterior(mean.expand(shape), 2 * deviation.log().expand(shape))
    draws = posterior.sample(torch.Generator().manual_seed(0))
    assert draws.mean().item() == pytest.approx(0.7, abs=0.005)
    assert draws.std().item() == pytest.approx(0.3, abs=0.005)
    assert torch.equal(draws, posterior.sample(torch.Generator().manual_seed(0)))
    assert torch.equal(posterior.mode(), posterior.mean)


def test_scale_and_its_inverse():
    model = VAE(replace(CONFIGS[0], scaling_factor=1.5305, shift_factor=0.0609))
    z = torch.randn(2, 16, 3, 3)
    torch.testing.assert_close(model.scale(z), (z - 0.0609) * 1.5305)
    torch.testing.assert_close(model.unscale(model.scale(z)), z)


def test_published_names_and_shapes(shared):
    lines = (shared / "sd35/manifests/keymap.vae.tsv").read_text().splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    keys = {old.removeprefix("first_stage_model."): new for old, new, _ in rows}
    with torch.device("meta"):
        model = VAE(VAEConfig.sd35())
    assert keys.keys() == model.state_dict().keys()
    sources = vae_sources(model.state_dict())
    assert all(sources[old].names == (new,) for old, new in keys.items())
    assert sum(p.numel() for p in model.parameters()) == 83_819_683
    assert sum(p.numel() for p in model.decoder.parameters()) == 49_545_475


@torch.no_grad()
def test_built_on_the_meta_device():
    real = randomize(VAE(CONFIGS[0]))
    with torch.device("meta"):
        empty = VAE(CONFIGS[0])
    assert not list(empty.buffers())
    empty.to_empty(device="cpu").load_state_dict(real.state_dict())
    images = pictures(CONFIGS[0])
    found, expected = empty.eval().encode(images), real.encode(images)
    assert torch.equal(found.mean, expected.mean)


@torch.no_grad()
def test_channels_last_gives_the_same_without_changing_layout():
    model = randomize(VAE(CONFIGS[0]))
    latents = torch.randn(2, 16, 4, 6)
    expected = model.decode(latents)
    model = model.to(memory_format=torch.channels_last)
    layouts = []

    def see(module, inputs, output):
        layouts.append(output.is_contiguous(memory_format=torch.channels_last))

    for module in model.decoder.modules():
        module.register_forward_hook(see)
    found = model.decode(latents.to(memory_format=torch.channels_last))
    assert all(layouts)
    assert relative_error(found, expected) <= 1e-5


@pytest.mark.slow
@torch.no_grad()
def test_compiles_without_a_graph_break():
    model = randomize(VAE(CONFIGS[0]))
    latents = torch.randn(1, 16, 4, 4)
    compiled = torch.compile(model.decode, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(latents), model.decode(latents)) <= 1e-6


def test_refuses():
    config = CONFIGS[0]
    with pytest.raises(ValueError, match="5 norm groups do not divide 8 channels"):
        VAE(replace(config, norm_num_groups=5))
    with pytest.raises(ValueError, match="must not be empty"):
        VAE(replace(config, block_out_channels=()))
    for shape in ((1, 3, 8, 9), (1, 4, 8, 8), (3, 8, 8), (8,)):
        with pytest.raises(ValueError, match=r"expected \(B, 3, H, W.*multiples of 4"):
            VAE(config).encode(torch.zeros(shape))


# The chapter's own steps


@pytest.mark.parametrize("groups", [1, 3, 12])
def test_group_norm_step_by_step(groups):
    x = 5 + 3 * torch.randn(2, 12, 4, 6)
    expected = F.group_norm(x, groups, eps=1e-6)
    for step in (vae.group_norm_in_loops, vae.group_norm_at_once):
        assert relative_error(step(x, groups), expected) <= 1e-5


def test_psnr():
    black = torch.full((1, 3, 4, 4), -1.0)
    assert vae.psnr(black, -black) == pytest.approx(0, abs=1e-4)
    assert vae.psnr(black, black + 0.02) == pytest.approx(40, abs=1e-3)


# The chapter's exercises


@pytest.fixture(scope="module")
def desk() -> Desk:
    known = {"check": exercises.check, "seal": exercises.seal, "math": math}
    return Desk("03_vae", vae, known)


def test_the_checks_accept_the_solutions(desk):
    for number in ("3_1", "3_2", "3_3"):
        assert desk.hand_in(number, desk.solution(number)) == "passed"
    divided = "latent_of = lambda: ((16, 768 / 8, 1344 / 8), 12)"
    assert desk.hand_in("3_1", divided) == "passed"


BITS = """def channel_bits(posterior):
    mean, logvar = posterior.mean, posterior.logvar
    return ({}).sum({}) / {}"""
NATS = "0.5 * (mean.square() + logvar.exp() - 1 - logvar)"
WRONG = {
    "width before height": ("3_1", "latent_of = lambda: ((16, 168, 96), 12)"),
    "the side alone": ("3_1", "latent_of = lambda: ((16, 96, 168), 8)"),
    "f² without the channels": ("3_1", "latent_of = lambda: ((16, 96, 168), 64)"),
    "four channels": ("3_1", "latent_of = lambda: ((4, 96, 168), 48)"),
    "nats": ("3_2", BITS.format(NATS, (2, 3), 1)),
    "one number a picture": ("3_2", BITS.format(NATS, (1, 2, 3), "math.log(2)")),
    "no half": ("3_2", BITS.format(f"2 * {NATS}", (2, 3), "math.log(2)")),
    "a variance for its logarithm": (
        "3_2",
        BITS.format("0.5 * (mean**2 + logvar**2 - 1 - 2 * logvar)", (2, 3), "0.69"),
    ),
    "the mean over places": (
        "3_2",
        BITS.format(NATS, (2, 3), "math.log(2) * mean[0, 0].numel()"),
    ),
    "256 steps, cut": (
        "3_3",
        "to_bytes = lambda x: ((x + 1) * 128).clamp(0, 255).to(torch.uint8)",
    ),
    "decimals cut off": (
        "3_3",
        "to_bytes = lambda x: ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8)",
    ),
    "not clamped": (
        "3_3",
        "to_bytes = lambda x: ((x + 1) * 127.5).round().to(torch.int32)"
        ".to(torch.uint8)",
    ),
    "in place": (
        "3_3",
        "to_bytes = lambda x: x.add_(1).mul_(127.5).clamp_(0, 255).round_()"
        ".to(torch.uint8)",
    ),
    "still numbers": (
        "3_3",
        "to_bytes = lambda x: ((x + 1) * 127.5).clamp(0, 255).round()",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_checks_refuse_wrong_answers(desk, wrong):
    desk.refuse(*WRONG[wrong])
