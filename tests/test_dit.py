"""Chapter 5: the transformer against diffusers', its sizes, and its modulations."""

import inspect
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from exercises import Desk
from helpers import randomize, relative_error
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import minidiff
from minidiff import dit
from minidiff.classroom.exercises import check
from minidiff.control import spread
from minidiff.dit import MMDiT, MMDiTConfig, position_table
from minidiff.files.layout import read_config
from minidiff.files.weights import join_stored, transformer_sources

BOUND = 1e-5
SMALL = MMDiTConfig(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    num_layers=4,
    attention_head_dim=8,
    num_attention_heads=4,
    joint_attention_dim=20,
    pooled_projection_dim=12,
    pos_embed_max_size=12,
    qk_norm="rms_norm",
)
DUAL = replace(SMALL, dual_attention_layers=(0, 1))
CONFIGS = {
    "large": SMALL,
    "medium": DUAL,
    "every block dual": replace(SMALL, dual_attention_layers=(0, 1, 2, 3)),
    "sd3": replace(SMALL, qk_norm=None, num_attention_heads=3, pos_embed_max_size=9),
    "patch 1": replace(SMALL, patch_size=1, out_channels=8, num_layers=2),
}


def official(model: MMDiT, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' tensors as ours: renamed, fused, two pairs of halves swapped."""
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    return {
        name: join_stored(stored.__getitem__, source, shapes[name], "cpu", None)
        for name, source in transformer_sources(shapes).items()
    }


def pair(config: MMDiTConfig, seed: int = 0) -> tuple[MMDiT, SD3Transformer2DModel]:
    fields = {name: getattr(config, name) for name in config.__dataclass_fields__}
    theirs = SD3Transformer2DModel(**fields, caption_projection_dim=config.width)
    randomize(theirs, seed)
    with torch.device("meta"):
        ours = MMDiT(config)
    ours.load_state_dict(official(ours, theirs.state_dict()), assign=True)
    return ours.eval(), theirs


def inputs(config: MMDiTConfig, size: tuple[int, int] = (8, 8), batch: int = 2) -> dict:
    return {
        "latents": torch.randn(batch, config.in_channels, *size),
        "sigma": torch.rand(batch),
        "context": torch.randn(batch, 5, config.joint_attention_dim),
        "pooled": torch.randn(batch, config.pooled_projection_dim),
    }


def theirs_on(
    model: SD3Transformer2DModel, given: dict, skip=None, controls=None
) -> Tensor:
    return model(
        given["latents"],
        given["context"],
        given["pooled"],
        1000 * given["sigma"],
        skip_layers=skip,
        block_controlnet_hidden_states=controls,
        return_dict=False,
    )[0]


@torch.no_grad()
def parity(
    config: MMDiTConfig,
    size: tuple[int, int] = (8, 8),
    skip: list[int] | None = None,
    controls: int = 0,
) -> float:
    ours, theirs = pair(config)
    given = inputs(config, size)
    tokens = size[0] * size[1] // config.patch_size**2
    extra = [torch.randn(2, tokens, config.width) for _ in range(controls)]
    expected = theirs_on(theirs, given, skip, extra or None)
    every = spread(extra, config.num_layers) if extra else None
    found = ours(**given, skip_layers=skip or (), controls=every)
    return relative_error(found, expected)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [(8, 8), (4, 6), (8, 2)])
def test_agrees_with_diffusers(name: str, size: tuple[int, int]) -> None:
    assert parity(CONFIGS[name], size) <= BOUND


@pytest.mark.parametrize("skip", [[1], [0, 2], [3], [0, 1, 2, 3]])
def test_skipped_layers_agree_with_diffusers(skip: list[int]) -> None:
    assert parity(DUAL, (4, 6), skip) <= BOUND


@pytest.mark.parametrize("skip", [[], [2], [0, 1, 2, 3]])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_controls_agree_with_diffusers(count: int, skip: list[int]) -> None:
    """With fewer than there are blocks, and behind blocks that are left out."""
    assert parity(DUAL, (4, 6), skip, count) <= BOUND


@pytest.mark.slow
@torch.no_grad()
def test_every_control_formula_agrees_with_diffusers() -> None:
    """Block by block, for Large's blocks and any number of controls."""
    ours, theirs = pair(replace(SMALL, num_layers=38))
    given = inputs(SMALL, (2, 2), batch=1)
    for count in (5, 6, 19, 23, 37, 38):
        extra = [torch.full((1, 1, SMALL.width), 0.1 * n) for n in range(1, count + 1)]
        expected = theirs_on(theirs, given, controls=extra)
        found = ours(**given, controls=spread(extra, 38))
        assert relative_error(found, expected) <= BOUND


@pytest.mark.parametrize(
    "line, mutant",
    [
        ("i < len(controls)", "i < len(controls) - 1"),
        ("i < len(controls)", "i < len(controls) and i not in skip_layers"),
        ("+ controls[i]", "+ controls[0]"),
        ("x = x + controls", "x = x - controls"),
    ],
)
def test_controls_catch(monkeypatch, line: str, mutant: str) -> None:
    source = textwrap.dedent(inspect.getsource(MMDiT.forward))
    assert source.count(line) == 1
    scope = dict(vars(dit))
    exec(source.replace(line, mutant), scope)
    monkeypatch.setattr(MMDiT, "forward", scope["forward"])
    assert parity(DUAL, (4, 6), [1], 2) > 1e-3


@pytest.mark.parametrize(
    "shapes, message",
    [
        ([(2, 6, 32)] * 5, "controls are 5: expected at most 4"),
        ([(2, 6, 32), (1, 6, 32)], r"controls\[1\] \(1, 6, 32\): expected \(2, 6, 32"),
        ([(2, 32)], r"controls\[0\] \(2, 32\): expected \(2, 6, 32\)"),
        ([(2, 6, 16)], r"controls\[0\] \(2, 6, 16\): expected"),
    ],
)
def test_controls_that_do_not_fit(shapes: list, message: str) -> None:
    model, given = MMDiT(SMALL), inputs(SMALL, (4, 6))
    assert SMALL.width == 32
    with pytest.raises(ValueError, match=message):
        model(**given, controls=[torch.zeros(shape) for shape in shapes])


def swap_scale_and_shift(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + shift) + scale


def erf_gelu(self: dit.MLP, x: Tensor) -> Tensor:
    return self.fc2(F.gelu(self.fc1(x)))


def other_eps(width: int) -> torch.nn.LayerNorm:
    return torch.nn.LayerNorm(width, elementwise_affine=False, eps=1e-3)


def sin_first(timestep: Tensor, width: int = 256) -> Tensor:
    return TIME(timestep, width).roll(width // 2, dims=-1)


def half_precision(timestep: Tensor, width: int = 256) -> Tensor:
    return TIME(timestep.bfloat16(), width)


def patches_last(tokens: Tensor, height: int, width: int, patch_size: int) -> Tensor:
    x = tokens.unflatten(2, (-1, patch_size, patch_size)).transpose(2, 4).flatten(2)
    return UNPATCHIFY(x, height, width, patch_size)


def corner(self: MMDiT, height: int, width: int) -> Tensor:
    size = self.config.pos_embed_max_size
    table = self.pos_embed.unflatten(1, (size, size))
    return table[:, :height, :width].flatten(1, 2)


def transposed(self: MMDiT, height: int, width: int) -> Tensor:
    return POSITIONS(self, width, height)


def dual_after(self: dit.StreamBlock, x: Tensor, modulation: Tensor):
    """The dual attention reads what joint attention was given."""
    parts = modulation.unsqueeze(1).chunk(self.chunks, dim=-1)
    given = dit.modulate(self.norm1(x), parts[0], parts[1])
    if self.chunks == 9:
        x = dit.gated(x, parts[8], self.attn2(given))
    return self.attn.heads(given), x


def last_block_halves_kept(model: MMDiT, stored: dict[str, Tensor]):
    state = OFFICIAL(model, stored)
    for end in ("weight", "bias"):
        key = f"joint_blocks.3.context_block.adaLN_modulation.1.{end}"
        state[key] = torch.cat(state[key].chunk(2)[::-1])
    return state


def image_gates_exchanged(self: dit.StreamBlock, x: Tensor, read: Tensor, m: Tensor):
    parts = list(m.chunk(self.chunks, dim=-1))
    parts[2], parts[5] = parts[5], parts[2]
    return AFTER(self, x, read, torch.cat(parts, dim=-1))


TIME, UNPATCHIFY, OFFICIAL = dit.timestep_embedding, dit.unpatchify, official
POSITIONS, AFTER = MMDiT.positions, dit.StreamBlock.after
HERE = sys.modules[__name__]


@pytest.mark.parametrize(
    "owner, name, mutant",
    [
        (dit, "modulate", swap_scale_and_shift),
        (dit.MLP, "forward", erf_gelu),
        (dit, "layer_norm", other_eps),
        (dit, "timestep_embedding", sin_first),
        (dit, "timestep_embedding", half_precision),
        (dit, "unpatchify", patches_last),
        (MMDiT, "positions", corner),
        (MMDiT, "positions", transposed),
        (dit.StreamBlock, "before", dual_after),
        (dit.StreamBlock, "after", image_gates_exchanged),
        (HERE, "official", last_block_halves_kept),
    ],
)
def test_parity_catches(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, mutant: Callable
) -> None:
    monkeypatch.setattr(owner, name, mutant)
    assert parity(DUAL, (4, 6)) > BOUND


def test_skip_parity_catches_another_block() -> None:
    ours, theirs = pair(DUAL)
    given = inputs(DUAL)
    with torch.no_grad():
        wrong = ours(**given, skip_layers=[2])
        assert relative_error(wrong, theirs_on(theirs, given, [1])) > BOUND


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_modulations_ahead_equal_inline(name: str) -> None:
    config = CONFIGS[name]
    model = randomize(MMDiT(config))
    given = inputs(config)
    sigmas = torch.tensor([1.0, 0.7, 0.2])
    ahead = model.modulations(sigmas[:, None], given["pooled"])  # (S, 1) · (B, P)
    for i, sigma in enumerate(sigmas):
        given["sigma"] = sigma.expand(2)
        expected = model(**given)
        read = given | {"sigma": None, "pooled": None}
        got = model(**read, modulations=ahead.step(i))
        assert relative_error(got, expected) <= 1e-6
        other = model(**read, modulations=ahead.step((i + 1) % 3))
        assert relative_error(other, expected) > BOUND


PUBLISHED = {  # config, weights, TFLOP of one step by text tokens: FACTS, section 1
    "sd3.5_medium": (
        MMDiTConfig.sd35_medium(),
        2_243_171_520,
        {333: (22.499, 14.034), 154: (21.565, None)},
    ),
    "sd3.5_large": (
        MMDiTConfig.sd35_large(),
        8_056_627_520,
        {333: (62.242, 47.740), 154: (59.194, None)},
    ),
}


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_and_flops(name: str) -> None:
    config, weights, tflops = PUBLISHED[name]
    with torch.device("meta"):
        model = MMDiT(config)
        assert sum(p.numel() for p in model.parameters()) == weights
        for length, (total, linear) in tflops.items():
            given = {
                "latents": torch.empty(2, 16, 128, 128),
                "sigma": torch.empty(2),
                "context": torch.empty(2, length, 4096),
                "pooled": torch.empty(2, 2048),
            }
            with FlopCounterMode(display=False) as counter:
                model(**given)
            flops = counter.get_flop_counts()["Global"]
            assert sum(flops.values()) / 1e12 == pytest.approx(total, abs=5e-4)
            if linear is not None:
                products = flops[torch.ops.aten.addmm]
                assert products / 1e12 == pytest.approx(linear, abs=6e-4)


def test_tiny_fits_the_package() -> None:
    with torch.device("meta"):
        model = MMDiT(MMDiTConfig.tiny())
    assert sum(p.numel() for p in model.parameters()) == 5_446_272


@pytest.mark.parametrize("name", ["medium", "large", "large-turbo"])
def test_configurations_are_those_of_the_hub(shared: Path, name: str) -> None:
    folder = shared / f"sd35/configs/sd3.5-{name}/transformer"
    ours = getattr(MMDiTConfig, f"sd35_{name.split('-')[0]}")()
    assert read_config(MMDiTConfig, folder) == ours


@pytest.mark.parametrize("size, width, base", [(12, 32, 4), (9, 24, 9), (5, 8, 16)])
def test_position_table_is_that_of_diffusers(size: int, width: int, base: int) -> None:
    expected = get_2d_sincos_pos_embed(width, size, base_size=base, output_type="pt")
    table = position_table(size, width, base)
    assert table.dtype == torch.float32
    assert torch.equal(table[0], expected.float())
    if size != base:
        assert relative_error(position_table(size, width, size)[0], expected) > BOUND


def test_positions_are_cropped_from_the_middle() -> None:
    model = MMDiT(SMALL)
    grid = torch.arange(144.0).view(1, 144, 1).expand(1, 144, SMALL.width)
    model.pos_embed = grid.contiguous()
    rows, columns = 1 + torch.arange(10), 4 + torch.arange(3)  # (12−10)/2, (12−3)//2
    expected = (12 * rows[:, None] + columns).flatten().float()
    assert torch.equal(model.positions(10, 3)[0, :, 0], expected)


@torch.no_grad()
def test_a_fresh_model_is_the_identity() -> None:
    model = MMDiT(DUAL)
    given = inputs(DUAL)
    assert not model(**given).any()
    context, x = torch.randn(2, 5, 32), torch.randn(2, 16, 32)
    for block in model.joint_blocks:
        modulation = block.modulation(torch.randn(2, 32))
        new_context, new_x = block(context, x, modulation)
        assert torch.equal(new_x, x)
        if not block.pre_only:
            assert torch.equal(new_context, context)


def test_time_and_prompt_steer_the_shipped_model() -> None:
    """A conditioning that has died leaves modulations that are always the same."""
    pipe = minidiff.load("tiny")
    _, pooled = pipe.encode_prompt(["a cat", "two red dresses"])
    made = pipe.transformer.modulations(torch.tensor([[0.2], [0.9]]), pooled)
    for both in (*made.blocks, (made.final,)):
        for m in both:  # (level, prompt, …)
            for a, b in (m, m.transpose(0, 1)):
                assert (a - b).norm() > 0.01 * a.norm()


@pytest.mark.slow
def test_every_parameter_learns() -> None:
    model = MMDiT(DUAL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    given, target = inputs(DUAL, batch=4), torch.randn(4, 4, 8, 8)
    losses = []
    for _ in range(40):
        loss = F.mse_loss(model(**given), target)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    still = [n for n, p in model.named_parameters() if not p.grad.any()]
    # The last block's text asks, but its answer is dropped.
    assert still == ["joint_blocks.3.context_block.attn.ln_q.weight"]


def test_nothing_is_left_on_the_meta_device() -> None:
    state = MMDiT(SMALL).state_dict()
    with torch.device("meta"):
        model = MMDiT(SMALL)
    model.load_state_dict(state, assign=True)
    tensors = [*model.parameters(), *model.buffers()]
    assert len(tensors) == len(state)
    assert not any(t.is_meta for t in tensors)
    model(**inputs(SMALL))


@torch.no_grad()
def test_bfloat16_keeps_time_in_float32() -> None:
    model, given = randomize(MMDiT(DUAL)), inputs(DUAL)
    expected = model(**given)
    model.bfloat16()
    low = {k: v if k == "sigma" else v.bfloat16() for k, v in given.items()}
    out = model(**low)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, expected) < 0.03
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(model.float()(**given), expected) < 0.03


@pytest.mark.slow
def test_compiles_without_graph_breaks_once_per_kind_of_block() -> None:
    model, given = randomize(MMDiT(DUAL)), inputs(DUAL)
    expected = model(**given)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for block in model.joint_blocks:
        block.compile(backend=backend, fullgraph=True)
    modulations = model.modulations(given["sigma"], given["pooled"])
    for _ in range(2):
        out = model(**given, modulations=modulations)
    assert relative_error(out, expected) <= 1e-6
    assert len(graphs) == 3  # dual, plain, last
    whole = torch.compile(MMDiT(DUAL), backend=backend, fullgraph=True)
    whole(**given)
    assert len(graphs) == 4


def bad(**changes: object) -> dict:
    return inputs(SMALL) | changes


@pytest.mark.parametrize(
    "given, message",
    [
        (bad(latents=torch.zeros(2, 3, 8, 8)), r"latents \(2, 3, 8, 8\).*\(B, 4, h, w"),
        (bad(latents=torch.zeros(4, 8, 8)), r"latents \(4, 8, 8\)"),
        (bad(latents=torch.zeros(2, 4, 8, 7)), "multiples of 2, from 2 to 24"),
        (bad(latents=torch.zeros(2, 4, 26, 8)), "multiples of 2, from 2 to 24"),
        (bad(latents=torch.zeros(2, 4, 0, 8)), "multiples of 2, from 2 to 24"),
        (bad(context=torch.zeros(2, 5, 21)), r"context \(2, 5, 21\).*\(2, L, 20\)"),
        (bad(context=torch.zeros(3, 5, 20)), r"context \(3, 5, 20\).*\(2, L, 20\)"),
        (bad(pooled=torch.zeros(2, 13)), r"pooled \(2, 13\).*\(B, 12\)"),
    ],
)
def test_bad_sizes_are_named(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MMDiT(SMALL)(**given)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"qk_norm": "layer_norm"}, "qk_norm 'layer_norm'"),
        ({"attention_head_dim": 7, "num_attention_heads": 2}, "width 14"),
        ({"dual_attention_layers": (0, 4)}, r"dual_attention_layers \[4\].*4 layers"),
    ],
)
def test_bad_configurations_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


# The chapter's exercises


@pytest.fixture(scope="module")
def desk() -> Desk:
    torch.manual_seed(0)
    model = MMDiT(replace(MMDiTConfig.tiny(), num_layers=5))
    for p in model.parameters():
        p.requires_grad_(False).add_(torch.randn_like(p), alpha=0.02)
    with torch.device("meta"):
        medium = MMDiT(MMDiTConfig.sd35_medium())
    sizes = {name: p.numel() for name, p in medium.named_parameters()}
    adaln = sum(n for name, n in sizes.items() if "adaLN" in name)
    known = {"model": model, "time": torch.ones(1), "pooled": torch.randn(1, 160)}
    known |= {"counts": {"Medium": {"AdaLN": adaln}}, "check": check}
    known |= {"totals": {"Medium": sum(sizes.values())}, "replace": replace}
    return Desk("05_dit", dit, known | {"FlopCounterMode": FlopCounterMode})


@pytest.mark.parametrize("number", ["5_1", "5_2", "5_3"])
def test_the_checks_accept_the_solutions(desk, number):
    assert desk.hand_in(number, desk.solution(number)) == "passed"


WRONG = {
    "Large's share": ("5_1", "part = lambda: 1 / 3"),
    "nine chunks everywhere": ("5_1", "part = lambda: 18 / (18 + 28 + 12)"),
    "the second attention uncounted": ("5_1", "part = lambda: 327 / (327 + 24 * 24)"),
    "a percentage": ("5_1", "part = lambda: 34.2"),
    "nothing changed": ("5_2", "silenced = lambda m: m"),
    "one gate alone": (
        "5_2",
        "silenced = lambda m: tuple(x * torch.tensor([1, 1, 0, 1, 1, 1])"
        ".repeat_interleave(160) for x in m)",
    ),
    "the scales instead": (
        "5_2",
        "silenced = lambda m: tuple(x * torch.tensor([1, 0, 1, 1, 0, 1])"
        ".repeat_interleave(160) for x in m)",
    ),
    "the patches alone": (
        "5_2",
        "silenced = lambda m: (m[0], torch.zeros_like(m[1]))",
    ),
    "multiply-adds counted once": (
        "5_3",
        "block_flops = lambda w, p, d: 12 * (w + p) * d**2 + 2 * (w + p)**2 * d",
    ),
    "patches read patches alone": (
        "5_3",
        "block_flops = lambda w, p, d: 24 * (w + p) * d**2 + 4 * (w**2 + p**2) * d",
    ),
    "no projection": (
        "5_3",
        "block_flops = lambda w, p, d: 22 * (w + p) * d**2 + 4 * (w + p)**2 * d",
    ),
    "one product of attention": (
        "5_3",
        "block_flops = lambda w, p, d: 24 * (w + p) * d**2 + 2 * (w + p)**2 * d",
    ),
    "fitted to one size": (
        "5_3",
        "block_flops = lambda w, p, d: round((w + p) * d**2 * 27.5)",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("wrong", WRONG)
def test_the_checks_refuse_wrong_answers(desk, wrong):
    desk.refuse(*WRONG[wrong])
