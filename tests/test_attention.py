"""Chapter 4: joint attention against diffusers', and the recording of its maps."""

import weakref

import pytest
import torch
from diffusers.models.attention_processor import Attention as DiffusersAttention
from diffusers.models.attention_processor import JointAttnProcessor2_0
from exercises import Desk
from helpers import randomize, relative_error
from torch import Tensor, nn

from minidiff import attention
from minidiff.attention import (
    Attention,
    Heads,
    JointAttention,
    attend,
    attention_map,
    record_attention,
)
from minidiff.classroom import exercises

BOUND = 1e-5


def reference(dim: int, heads: int, qk_norm: str | None, pre_only: bool, joint: bool):
    return randomize(
        DiffusersAttention(
            query_dim=dim,
            added_kv_proj_dim=dim if joint else None,
            dim_head=dim // heads,
            heads=heads,
            out_dim=dim,
            context_pre_only=pre_only if joint else None,
            bias=True,
            processor=JointAttnProcessor2_0(),
            qk_norm=qk_norm,
            eps=1e-6,
        ),
        seed=1,
    )


def stream(ref: DiffusersAttention, context: bool, pre_only: bool = False) -> Attention:
    """One stream of diffusers' module as ours, through our parameter names."""
    names = ("add_q_proj", "add_k_proj", "add_v_proj") if context else "to_q to_k to_v"
    parts = [getattr(ref, n) for n in (names if context else names.split())]
    norms = ("norm_added_q", "norm_added_k") if context else ("norm_q", "norm_k")
    state = {
        f"qkv.{p}": torch.cat([getattr(part, p) for part in parts])
        for p in ("weight", "bias")
    }
    for ours, theirs in zip(("ln_q", "ln_k"), norms, strict=True):
        if (norm := getattr(ref, theirs)) is not None:
            state[f"{ours}.weight"] = norm.weight
    proj = ref.to_add_out if context else ref.to_out[0]
    if not pre_only:
        state |= {"proj.weight": proj.weight, "proj.bias": proj.bias}
    qk_norm = None if ref.norm_q is None else "rms_norm"
    ours = Attention(parts[0].out_features, ref.heads, qk_norm, pre_only)
    ours.load_state_dict(state)
    return ours.eval()


def joint(image: Attention, text: Attention, x: Tensor, c: Tensor) -> list[Tensor]:
    read_c, read_x = JointAttention()(text.heads(c), image.heads(x))
    out = [image.proj(read_x)]
    return [*out, text.proj(read_c)] if hasattr(text, "proj") else out


def joint_error(qk_norm: str | None = "rms_norm", pre_only: bool = False) -> float:
    ref = reference(32, 4, qk_norm, pre_only, joint=True)
    x, c = torch.randn(2, 9, 32), torch.randn(2, 5, 32)
    theirs = ref(x, c)
    ours = joint(stream(ref, False), stream(ref, True, pre_only), x, c)
    return max(
        relative_error(a, b) for a, b in zip(ours, theirs[: len(ours)], strict=True)
    )


def self_error(dim: int, heads: int, qk_norm: str | None) -> float:
    ref = reference(dim, heads, qk_norm, False, joint=False)
    x = torch.randn(3, 7, dim)
    return relative_error(stream(ref, False)(x), ref(x))


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", ["rms_norm", None])
@pytest.mark.parametrize("pre_only", [False, True])
def test_joint_attention_agrees_with_diffusers(
    qk_norm: str | None, pre_only: bool
) -> None:
    assert joint_error(qk_norm, pre_only) <= BOUND


@torch.no_grad()
@pytest.mark.parametrize("dim, heads", [(32, 4), (24, 1), (64, 2)])
@pytest.mark.parametrize("qk_norm", ["rms_norm", None])
def test_self_attention_agrees_with_diffusers(
    dim: int, heads: int, qk_norm: str | None
) -> None:
    assert self_error(dim, heads, qk_norm) <= BOUND


class OtherEps(attention.RMSNorm):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__(dim, eps=1e-3)


class NormOfAllHeads(attention.RMSNorm):
    """Takes the root mean square over heads and channels together."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.pow(2).mean((-2, -1), keepdim=True)
        return x * torch.rsqrt(mean + self.eps) * self.weight


def unscaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q * q.shape[-1] ** 0.5, k, v)


def heads_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Joins the channels of all heads in the wrong order."""
    out = attend(q, k, v).unflatten(-1, q.shape[2:])
    return out.transpose(2, 3).flatten(2)


@torch.no_grad()
@pytest.mark.parametrize(
    "name, mutant",
    [
        ("RMSNorm", OtherEps),
        ("RMSNorm", NormOfAllHeads),
        ("attend", unscaled),
        ("attend", heads_last),
    ],
)
def test_parity_catches(monkeypatch: pytest.MonkeyPatch, name: str, mutant) -> None:
    monkeypatch.setattr(attention, name, mutant)
    assert joint_error() > BOUND
    assert self_error(32, 4, "rms_norm") > BOUND


@torch.no_grad()
def test_parity_catches_swapped_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = JointAttention.forward

    def split_at_the_image(self, context: Heads, image: Heads):
        both = torch.cat(forward(self, context, image), dim=1)
        return both[:, -context.q.shape[1] :], both[:, : image.q.shape[1]]

    monkeypatch.setattr(JointAttention, "forward", split_at_the_image)
    assert joint_error() > BOUND


def heads(b: int = 2, length: int = 4, h: int = 3, d: int = 8) -> Heads:
    return Heads(*(torch.randn(b, length, h, d) for _ in range(3)))


def test_attend_is_a_weighted_mean_of_values() -> None:
    context, image = heads(length=4), heads(length=6)
    weights = attention_map(context, image)
    v = torch.cat([context.v, image.v], dim=1)
    expected = torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)
    out = torch.cat(JointAttention()(context, image), dim=1)
    assert relative_error(out, expected) <= BOUND


class Model(nn.Module):
    """Three joint attentions that read the same heads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(JointAttention() for _ in range(3))

    def forward(self, context: Heads, image: Heads) -> None:
        for layer in self.layers:
            layer(context, image)


def test_record_attention_keeps_the_chosen_tokens() -> None:
    model, context, image = Model(), heads(length=4), heads(length=6)
    full = attention_map(context, image)
    with record_attention(model, [0, 2], slice(4, 10), [1, 3]) as maps:
        model(context, image)
        model(context, image)
    assert sorted(maps) == [0, 2] and [len(m) for m in maps.values()] == [2, 2]
    assert torch.equal(maps[2][1], full[:, :, 4:10][..., [1, 3]])
    model(context, image)
    assert len(maps[0]) == 2, "recording goes on after the context manager"
    with record_attention(model) as maps:
        model(context, image)
    assert torch.allclose(maps[1][0].sum(-1), torch.ones(2, 3, 10))
    with record_attention(model, average_heads=True, keys=[0]) as maps:
        model(context, image)
    assert torch.allclose(maps[1][0], full.mean(1)[..., :1])


def test_record_attention_holds_one_matrix_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alive: list[weakref.ref] = []
    softmax = Tensor.softmax

    def watched(x: Tensor, dim: int) -> Tensor:
        assert not any(ref() is not None for ref in alive), "an earlier matrix is held"
        out = softmax(x, dim)
        alive.append(weakref.ref(out))
        return out

    monkeypatch.setattr(Tensor, "softmax", watched)
    model, context, image = Model(), heads(length=4), heads(length=6)
    with record_attention(model, keys=slice(0, 2)) as maps:
        model(context, image)
    assert len(alive) == 3
    for block in maps.values():  # a view would keep its whole matrix
        assert block[0].untyped_storage().nbytes() == 2 * 3 * 10 * 2 * 4


@pytest.mark.parametrize("block", [-1, 3])
def test_record_attention_names_an_unknown_block(block: int) -> None:
    with (
        pytest.raises(ValueError, match=rf"\[{block}\].*0 to 2"),
        record_attention(Model(), [block]),
    ):
        pass


def test_attention_names_bad_sizes() -> None:
    with pytest.raises(ValueError, match="dim 30 .* num_heads 4"):
        Attention(30, 4)
    with pytest.raises(ValueError, match="qk_norm 'layer_norm'"):
        Attention(32, 4, "layer_norm")


# The chapter's exercises


@pytest.fixture(scope="module")
def desk() -> Desk:
    known = {"check": exercises.check, "seal": exercises.seal}
    return Desk("04_attention", attention, known)


def test_the_checks_accept_the_solutions(desk):
    for number in ("4_1", "4_2", "4_3"):
        assert desk.hand_in(number, desk.solution(number)) == "passed"


MASKED = """def masked(context, image, keep):
    q, k, v = (torch.cat(t, dim=1).transpose(1, 2) for t in zip(context, image))
    keep = F.pad(keep, (0, image.k.shape[1]), value=True)
    mask = {}
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)"""
ENTROPY = "entropy = lambda a: {}"
WRONG = {
    "words forgotten": ("4_1", "growth = lambda: 16"),
    "not squared": ("4_1", "growth = lambda: (333 + 16384) / (333 + 4096)"),
    "four times as many words": ("4_1", "growth = lambda: 4 * 4"),
    "patches read words alone": ("4_1", "growth = lambda: 4"),
    "nothing at zero": ("4_2", ENTROPY.format("-(a * a.log()).sum(-1)")),
    "bits": ("4_2", ENTROPY.format("-torch.xlogy(a, a).sum(-1) / 0.6931")),
    "the sign": ("4_2", ENTROPY.format("torch.xlogy(a, a).sum(-1)")),
    "all rows in one": ("4_2", ENTROPY.format("-torch.xlogy(a, a).sum()")),
    "the columns": ("4_2", ENTROPY.format("-torch.xlogy(a, a).sum(-2)")),
    "hidden rows too": ("4_3", MASKED.format("keep[None] & keep[:, None]")),
    "hidden rows for columns": ("4_3", MASKED.format("keep[:, None]")),
    "the mask inverted": ("4_3", MASKED.format("~keep[None]")),
    "nothing hidden": ("4_3", MASKED.format("None")),
    "keys of zero": (
        "4_3",
        """def masked(context, image, keep):
    context = Heads(*(t * keep[:, None, None] for t in context))
    return torch.cat(JointAttention()(context, image), dim=1)""",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_checks_refuse_wrong_answers(desk, wrong):
    desk.refuse(*WRONG[wrong])
