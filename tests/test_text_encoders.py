"""Text encoders against transformers' classes and against their own equations."""

from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from exercises import Desk
from helpers import patch_functions, randomize, relative_error
from torch import Tensor, nn
from transformers.models.t5 import modeling_t5

from minidiff import text_encoders
from minidiff.classroom import exercises
from minidiff.text_encoders import (
    CLIPTextConfig,
    CLIPTextEncoder,
    RMSNorm,
    T5Config,
    T5Encoder,
    assemble,
    relative_buckets,
)

CLIP_CONFIGS = [
    CLIPTextConfig(99, 32, 64, 3, 4, 16, "quick_gelu", 1e-5, 24, 2),
    CLIPTextConfig(64, 48, 96, 2, 6, 77, "gelu", 1e-3, 48, 63),
    CLIPTextConfig(120, 24, 100, 5, 1, 20, "gelu", 1e-5, 40, 7),
    CLIPTextConfig(50, 40, 48, 1, 8, 12, "quick_gelu", 1e-4, 16, 2),
    CLIPTextConfig.tiny_l(),
    CLIPTextConfig.tiny_g(),
]
T5_CONFIGS = [
    T5Config(99, 32, 8, 64, 3, 4),
    T5Config(64, 48, 16, 40, 2, 2, 16, 40, 1e-3),
    T5Config(120, 24, 12, 100, 5, 1, 8, 20, 1e-5),
    T5Config(50, 40, 4, 48, 1, 6, 32, 128, 1e-6),
    T5Config.tiny(),
]


def clip_pair(config: CLIPTextConfig) -> tuple[CLIPTextEncoder, nn.Module]:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(**asdict(config))
    )
    ours = CLIPTextEncoder(config)
    ours.load_state_dict(randomize(theirs).state_dict())
    return ours.eval(), theirs


def t5_pair(config: T5Config) -> tuple[T5Encoder, nn.Module]:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.T5EncoderModel(transformers.T5Config(**asdict(config)))
    ours = T5Encoder(config)
    weights = randomize(theirs).state_dict()
    weights.pop("encoder.embed_tokens.weight", None)  # the same tensor as "shared"
    ours.load_state_dict(weights)
    return ours.eval(), theirs


def clip_ids(config: CLIPTextConfig, rows: int = 3) -> Tensor:
    """Rows that end at different places; the end token is repeated as padding."""
    length = config.max_position_embeddings
    end = config.vocab_size - 1 if config.eos_token_id == 2 else config.eos_token_id
    ids = torch.randint(0, config.vocab_size - 1, (rows, length))
    ids[ids == end] = 0
    for row, stop in enumerate(torch.randint(1, length, (rows,)).tolist()):
        ids[row, stop:] = end
    return ids


@torch.no_grad()
def clip_error(config: CLIPTextConfig, *, length: int | None = None) -> float:
    ours, theirs = clip_pair(config)
    ids = clip_ids(config)[:, :length]
    expected = theirs(ids, output_hidden_states=True)
    hidden, pooled = ours(ids)
    return max(
        relative_error(hidden, expected.hidden_states[-2]),
        relative_error(pooled, expected.text_embeds),
    )


@torch.no_grad()
def t5_error(config: T5Config, length: int = 23) -> float:
    ours, theirs = t5_pair(config)
    ids = torch.randint(0, config.vocab_size, (2, length))
    return relative_error(ours(ids), theirs(ids).last_hidden_state)


# CLIP


@pytest.mark.parametrize("config", CLIP_CONFIGS)
def test_clip_is_transformers(config):
    assert clip_error(config) <= 1e-5


def test_clip_reads_shorter_prompts():
    assert clip_error(CLIP_CONFIGS[0], length=5) <= 1e-5


def attention_without_mask(q, k, v, **kwargs):
    kwargs.pop("is_causal", None)
    return F.scaled_dot_product_attention(q, k, v, **kwargs)


def swap_activations(monkeypatch):
    acts = text_encoders.ACTIVATIONS
    swapped = {"gelu": acts["quick_gelu"], "quick_gelu": acts["gelu"]}
    monkeypatch.setattr(text_encoders, "ACTIVATIONS", swapped)


def tanh_gelu(monkeypatch):
    def act(x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")

    monkeypatch.setitem(text_encoders.ACTIVATIONS, "gelu", act)


def other_epsilon(monkeypatch):

    monkeypatch.setattr(text_encoders.CLIPLayer, "forward", clip_layer_eps)


def clip_layer_eps(self, x):
    self.layer_norm1.eps = self.layer_norm2.eps = 1e-6
    x = x + self.self_attn(self.layer_norm1(x))
    return x + self.mlp(self.layer_norm2(x))


def no_causal_mask(monkeypatch):
    patch_functions(
        monkeypatch, text_encoders, scaled_dot_product_attention=attention_without_mask
    )


def last_hidden_state(monkeypatch):
    def forward(self, ids):
        states = self.hidden_states(ids)
        return states[-1], self.pool(states[-1], ids)

    monkeypatch.setattr(CLIPTextEncoder, "forward", forward)


def normalised_penultimate(monkeypatch):
    def forward(self, ids):
        states = self.hidden_states(ids)
        hidden = self.text_model.final_layer_norm(states[-2])
        return hidden, self.pool(states[-1], ids)

    monkeypatch.setattr(CLIPTextEncoder, "forward", forward)


def pooled_before_norm(monkeypatch):
    def pool(self, last, ids):
        end = text_encoders.end_positions(ids, self.config.eos_token_id)
        return self.text_projection(last[torch.arange(len(ids)), end])

    monkeypatch.setattr(CLIPTextEncoder, "pool", pool)


def pooled_at_the_last_position(monkeypatch):
    def last(ids, eos_token_id):
        return torch.full((len(ids),), ids.shape[1] - 1)

    monkeypatch.setattr(text_encoders, "end_positions", last)


def largest_id_always(monkeypatch):
    monkeypatch.setattr(text_encoders, "end_positions", lambda ids, e: ids.argmax(-1))


def first_end_token_always(monkeypatch):
    def first(ids, eos_token_id):
        return (ids == eos_token_id).int().argmax(-1)

    monkeypatch.setattr(text_encoders, "end_positions", first)


def no_projection(monkeypatch):
    def pool(self, last, ids):
        end = text_encoders.end_positions(ids, self.config.eos_token_id)
        return self.text_model.final_layer_norm(last[torch.arange(len(ids)), end])

    monkeypatch.setattr(CLIPTextEncoder, "pool", pool)


@pytest.mark.parametrize(
    "mutant, config",
    [
        (swap_activations, CLIP_CONFIGS[0]),
        (tanh_gelu, CLIP_CONFIGS[1]),
        (other_epsilon, CLIP_CONFIGS[1]),
        (no_causal_mask, CLIP_CONFIGS[0]),
        (last_hidden_state, CLIP_CONFIGS[0]),
        (normalised_penultimate, CLIP_CONFIGS[0]),
        (pooled_before_norm, CLIP_CONFIGS[0]),
        (pooled_at_the_last_position, CLIP_CONFIGS[0]),
        (largest_id_always, CLIP_CONFIGS[2]),
        (first_end_token_always, CLIP_CONFIGS[0]),
        (no_projection, CLIP_CONFIGS[4]),
    ],
)
def test_clip_parity_catches(monkeypatch, mutant, config):
    mutant(monkeypatch)
    assert clip_error(config) > 1e-5


def test_clip_is_causal():
    ours = randomize(CLIPTextEncoder(CLIP_CONFIGS[0]))
    ids = clip_ids(CLIP_CONFIGS[0])
    hidden, _ = ours(ids)
    ids[:, 9:] = 1
    assert torch.equal(ours(ids)[0][:, :9], hidden[:, :9])
    assert not torch.equal(ours(ids)[0][:, 9:], hidden[:, 9:])


def test_end_positions():
    ids = torch.tensor([[5, 9, 9, 9], [5, 1, 2, 9]])
    assert text_encoders.end_positions(ids, 2).tolist() == [1, 3]
    assert text_encoders.end_positions(ids, 9).tolist() == [1, 3]
    assert text_encoders.end_positions(ids, 5).tolist() == [0, 0]


def test_clip_refuses():
    config = CLIP_CONFIGS[0]
    with pytest.raises(ValueError, match="'swish': expected one of quick_gelu, gelu"):
        CLIPTextEncoder(replace(config, hidden_act="swish"))
    with pytest.raises(ValueError, match="5 heads do not divide a width of 32"):
        CLIPTextEncoder(replace(config, num_attention_heads=5))
    with pytest.raises(ValueError, match="17 tokens: this CLIP reads at most 16"):
        CLIPTextEncoder(config)(torch.zeros(1, 17, dtype=torch.long))


# T5


@pytest.mark.parametrize("config", T5_CONFIGS)
def test_t5_is_transformers(config):
    assert t5_error(config) <= 1e-5


@pytest.mark.parametrize("length", [1, 2, 77, 256, 512])
def test_t5_at_other_lengths(length):
    assert t5_error(T5_CONFIGS[0], length) <= 1e-5


@pytest.mark.parametrize("buckets, distance", [(32, 128), (16, 40), (8, 20), (64, 999)])
def test_buckets_are_transformers(buckets, distance):
    position = torch.arange(600)
    offset = position[None] - position[:, None]
    theirs = modeling_t5.T5Attention._relative_position_bucket
    expected = theirs(offset, True, buckets, distance)
    assert torch.equal(relative_buckets(600, buckets, distance), expected)


def erf_gelu(monkeypatch):
    patch_functions(monkeypatch, text_encoders, gelu=lambda x, approximate: F.gelu(x))


def scaled_scores(monkeypatch):
    def attend(q, k, v, attn_mask, scale):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)

    patch_functions(monkeypatch, text_encoders, scaled_dot_product_attention=attend)


def no_bias(monkeypatch):
    def attend(q, k, v, attn_mask, scale):
        return F.scaled_dot_product_attention(q, k, v, scale=scale)

    patch_functions(monkeypatch, text_encoders, scaled_dot_product_attention=attend)


def transposed_bias(monkeypatch):
    real = T5Encoder.position_bias
    monkeypatch.setattr(T5Encoder, "position_bias", lambda s, n: real(s, n).mT)


def layer_norm(monkeypatch):
    def norm(x, shape, weight, eps):
        return F.layer_norm(x, shape, weight, eps=eps)

    patch_functions(monkeypatch, text_encoders, rms_norm=norm)


def t5_epsilon(monkeypatch):
    def norm(x, shape, weight, eps):
        return F.rms_norm(x, shape, weight, 1e-5)

    patch_functions(monkeypatch, text_encoders, rms_norm=norm)


def gate_swapped(monkeypatch):
    def forward(self, x):
        return self.wo(self.wi_0(x) * F.gelu(self.wi_1(x), approximate="tanh"))

    monkeypatch.setattr(text_encoders.T5MLP, "forward", forward)


def no_final_norm(monkeypatch):
    def forward(self, ids):
        x, bias = self.shared(ids), self.position_bias(ids.shape[1])
        for block in self.encoder.block:
            x = block(x, bias)
        return x

    monkeypatch.setattr(T5Encoder, "forward", forward)


@pytest.mark.parametrize(
    "mutant",
    [
        erf_gelu,
        scaled_scores,
        no_bias,
        transposed_bias,
        layer_norm,
        t5_epsilon,
        gate_swapped,
        no_final_norm,
    ],
)
def test_t5_parity_catches(monkeypatch, mutant):
    mutant(monkeypatch)
    assert t5_error(T5_CONFIGS[1]) > 1e-5


def test_rms_norm_takes_the_variance_in_float32():
    x = 1000 * torch.randn(4, 64).half()
    norm = RMSNorm(64, 1e-6)
    expected = norm(x.float())
    assert norm.half()(x).isfinite().all()  # 1000² overflows float16
    assert relative_error(norm(x), expected) < 1e-3


def test_t5_refuses():
    with pytest.raises(ValueError, match="'relu': expected 'gated-gelu'"):
        T5Encoder(replace(T5_CONFIGS[0], feed_forward_proj="relu"))


# Both


def test_assemble():
    clip_l, clip_g, t5 = torch.rand(2, 7, 3), torch.rand(2, 7, 4), torch.rand(2, 5, 10)
    context = assemble(clip_l, clip_g, t5)
    assert context.shape == (2, 12, 10)
    assert torch.equal(context[:, :7, :3], clip_l)
    assert torch.equal(context[:, :7, 3:7], clip_g)
    assert not context[:, :7, 7:].any()
    assert torch.equal(context[:, 7:], t5)
    narrow = assemble(clip_l, clip_g, t5[..., :6])  # as diffusers does
    assert torch.equal(narrow[:, :7, 3:], clip_g[..., :3])


@pytest.mark.parametrize(
    "kind, config",
    [(CLIPTextEncoder, CLIPTextConfig.tiny_g()), (T5Encoder, T5Config.tiny())],
)
def test_built_on_the_meta_device(kind, config):
    ids = torch.randint(0, 512, (2, 32))
    real = randomize(kind(config))
    with torch.device("meta"):
        empty = kind(config)
    assert not list(empty.buffers())
    empty.to_empty(device="cpu").load_state_dict(real.state_dict())
    for a, b in zip(outputs(real, ids), outputs(empty.eval(), ids), strict=True):
        assert torch.equal(a, b)


def outputs(model: nn.Module, ids: Tensor) -> tuple[Tensor, ...]:
    found = model(ids)
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, config",
    [(CLIPTextEncoder, CLIP_CONFIGS[0]), (T5Encoder, T5_CONFIGS[0])],
)
def test_compiles_without_a_graph_break(kind, config):
    model = randomize(kind(config))
    ids = torch.randint(0, config.vocab_size, (2, 9))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for a, b in zip(outputs(model, ids), outputs(compiled, ids), strict=True):
        assert relative_error(b, a) <= 1e-6


# The chapter's own steps


@pytest.mark.parametrize("causal", [True, False])
def test_attention_step_by_step(causal):
    q, k, v = torch.randn(3, 6, 8)
    bias = torch.full((6, 6), -torch.inf).triu(1) if causal else torch.randn(6, 6)
    for step in (text_encoders.attend_in_loops, text_encoders.attend_all):
        expected = F.scaled_dot_product_attention(q, k, v, bias, scale=0.7)
        assert relative_error(step(q, k, v, bias, 0.7), expected) <= 1e-5


def test_one_bucket_at_a_time():
    rows = relative_buckets(600, 32, 128)
    for offset in range(-300, 300):
        assert text_encoders.bucket_of(offset) == rows[300, 300 + offset], offset


def test_similarity():
    vectors = torch.tensor([[2.0, 0], [0, 3], [-1, 0], [1, 1]])
    expected = torch.tensor([1, 0, -1, 0.5**0.5])
    torch.testing.assert_close(text_encoders.similarity(vectors)[0], expected)


# The chapter's exercises


@pytest.fixture(scope="module")
def desk() -> Desk:
    known = {"check": exercises.check, "seal": exercises.seal}
    return Desk("02_text_encoders", text_encoders, known)


def test_the_checks_accept_the_solutions(desk):
    for number in ("2_1", "2_2", "2_3"):
        assert desk.hand_in(number, desk.solution(number)) == "passed"


WRONG = {
    "the pooled vectors too": ("2_1", "two_numbers = lambda: (1365216, 157696)"),
    "every row filled": ("2_1", "two_numbers = lambda: (1363968, 681984)"),
    "CLIP-G alone": ("2_1", "two_numbers = lambda: (1363968, 77 * (4096 - 1280))"),
    "a dot product": ("2_2", "nearest = lambda q, x: int((x @ q).argmax())"),
    "the distance": ("2_2", "nearest = lambda q, x: int((x - q).norm(dim=1).argmin())"),
    "the query's length alone": (
        "2_2",
        "nearest = lambda q, x: int((x @ F.normalize(q, dim=0)).argmax())",
    ),
    "either way along the line": (
        "2_2",
        "nearest = lambda q, x: int((F.normalize(x, dim=1) @ q).abs().argmax())",
    ),
    "the far rows left": (
        "2_3",
        """def mirrored(table):
    new = table.clone()
    new[1:12], new[17:28] = table[17:28], table[1:12]
    return new""",
    ),
    "distance zero moved": ("2_3", "mirrored = lambda table: table.roll(16, dims=0)"),
    "the rows reversed": ("2_3", "mirrored = lambda table: table.flip(0)"),
    "the sign turned": ("2_3", "mirrored = lambda table: -table"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_checks_refuse_wrong_answers(desk, wrong):
    desk.refuse(*WRONG[wrong])
