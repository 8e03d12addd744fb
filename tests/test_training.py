"""Chapter 7: each objective is its formula, and one loop learns them all."""

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from exercises import Desk
from regression import assert_same, regression, trained
from torch import nn

from minidiff import training
from minidiff.classroom.exercises import check
from minidiff.learning.steps import compiled, recompute
from minidiff.text_encoders import CLIPTextConfig, CLIPTextEncoder
from minidiff.training import TrainingConfig, drop_encoders, fit
from minidiff.vae import Posterior


def test_spans_are_hidden_and_listed() -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9, 1, 0, 0]])
    hidden = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 0]]).bool()
    sentinels = torch.tensor([99, 98, 97])
    source, target = training.corrupt_spans(ids, hidden, sentinels, pad=0, eos=1)
    assert source.tolist() == [[5, 99, 8, 98, 1, 0, 0, 0]]
    assert target.tolist() == [[99, 6, 7, 98, 9, 1, 0, 0]]


def test_spans_never_hide_the_end() -> None:
    ids = torch.tensor([[5, 6, 7, 1, 0, 0]]).expand(1000, -1)
    hidden = training.choose_spans(torch.rand(1000, 4), ids, pad=0)
    assert hidden.any(1).all() and not hidden[:, 3:].any()


def test_t5_writes_each_word_before_it_sees_it() -> None:
    seen = []

    def model(source: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
        seen.append(answer)
        return torch.zeros(*answer.shape, 9)

    target = torch.tensor([[5, 6, 1, 0]])
    loss = training.t5_loss(model, {"source": target, "target": target})
    assert seen[0].tolist() == [[0, 5, 6, 1]]
    assert loss.item() == pytest.approx(math.log(9))


def test_every_caption_counts_alike_in_the_loss_of_t5() -> None:
    target = torch.tensor([[5, 6, 7, 1], [5, 1, 0, 0]])

    def model(source: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
        known = 100.0 * nn.functional.one_hot(target[1], 9)
        return torch.stack([torch.zeros(4, 9), known])

    loss = training.t5_loss(model, {"source": target, "target": target})
    assert loss.item() == pytest.approx(math.log(9) / 2)


def test_the_loss_of_both_clips_is_a_sum() -> None:
    configs = CLIPTextConfig.tiny_l(), CLIPTextConfig.tiny_g()
    model = training.CLIPTraining(*map(CLIPTextEncoder, configs))
    ids, meaning = torch.randint(0, 600, (4, 2, 32)), torch.arange(4)
    batch = {"images": torch.rand(4, 3, 64, 64), "ids_l": ids, "ids_g": ids}
    found = training.clip_loss(model, batch | {"meaning": meaning}).item()
    seen, total = model.tower(batch["images"]), 0.0
    for encoder, head in zip(model.text, model.heads, strict=True):
        text, other = (encoder(x)[1] for x in ids.unbind(1))
        for pair in ((text, head(seen)), (text, other)):
            ways = map(unit, pair), map(unit, pair[::-1])
            loops = [training.contrastive_loops(*w, 1 / 0.07, meaning) for w in ways]
            total += sum(loops).item() / 2
    assert found == pytest.approx(total, rel=1e-4)


def unit(x: torch.Tensor) -> torch.Tensor:
    """Rows of length one."""
    return nn.functional.normalize(x, dim=-1)


def test_the_loss_of_the_autoencoder_is_its_formula() -> None:
    mean, logvar, noise, x = torch.randn(4, 2, 3, 6, 6)
    images, given = torch.rand(2, 3, 6, 6), []
    vae = SimpleNamespace(
        encode=lambda _: Posterior(mean, logvar),
        decode=lambda latents: given.append(latents) or x,
    )
    batch = {"images": images, "noise": noise}
    loss = training.vae_loss(vae, batch, kl_weight=0.1)
    deviation, e = (logvar / 2).exp(), x - images
    torch.testing.assert_close(given[0], mean + deviation * noise)
    edges = (e.diff(dim=2).abs().mean() + e.diff(dim=3).abs().mean()) / 2
    drawn = torch.distributions.Normal(mean, deviation)
    standard = torch.distributions.Normal(0.0, 1.0)
    kl = torch.distributions.kl_divergence(drawn, standard).mean()
    expected = e.abs().mean() + 2 * e.square().mean() + edges / 2 + 0.1 * kl
    torch.testing.assert_close(loss, expected)
    default = training.vae_loss(vae, batch) - loss
    torch.testing.assert_close(default, (5e-4 - 0.1) * kl, rtol=1e-4, atol=1e-6)


def test_the_optimiser_is_as_configured() -> None:
    task, config = regression(beta2=0.9, weight_decay=0.3, max_grad_norm=0.01)
    learner, seen = training.Learner(task, config, "cpu"), []
    (group,) = learner.optimizer.param_groups
    assert group["betas"] == (0.9, 0.9) and group["weight_decay"] == 0.3

    def look(*_: object) -> None:
        grads = [p.grad.flatten() for p in learner.model.parameters()]
        seen.append(torch.cat(grads).norm().item())

    learner.optimizer.register_step_pre_hook(look)
    learner.step(0)
    assert seen == [pytest.approx(0.01, rel=1e-3)]


def test_contrastive_loss_shares_between_equal_captions() -> None:
    features = torch.eye(3)[[0, 0, 1, 2]]  # two captions that say the same
    meaning, scale = torch.tensor([7, 7, 8, 9]), torch.tensor(50.0)
    loss = training.contrastive_loss(features, features, scale, meaning)
    # rows 0 and 1 cannot do better than half for each of their two positives
    assert loss.item() == pytest.approx(math.log(2) / 2, abs=1e-4)


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    config = TrainingConfig(100, 1, learning_rate=2.0, warmup_steps=10)
    rates = [training.learning_rate(step, config) for step in range(101)]
    assert rates[0] == 0.2 and rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0) and rates[100] == pytest.approx(0)


def test_learning_rate_stays_on_its_plateau_and_drops_from_it() -> None:
    how = {"learning_rate": 2.0, "warmup_steps": 10, "plateau": 0.5}
    whole, dropped = (
        TrainingConfig(100, 1, **how),
        TrainingConfig(100, 1, drop=0.25, **how),
    )
    for step in (0, 10, 49):
        expected = training.learning_rate(step, whole)
        assert training.learning_rate(step, dropped) == expected
        assert expected == (0.2 if step == 0 else 2.0)
    assert training.learning_rate(50, dropped) == 0.5
    assert training.learning_rate(75, dropped) == pytest.approx(0.25)
    assert training.learning_rate(75, whole) == pytest.approx(1.0)


@pytest.mark.slow
def test_schedule_is_that_of_transformers() -> None:
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 3.0)
    theirs = get_cosine_schedule_with_warmup(optimizer, 10, 100)
    config = TrainingConfig(100, 1, 3.0, warmup_steps=10)
    for step in range(10, 100):  # in the warm-up theirs begins at 0, ours one step up
        while theirs.last_epoch < step:
            optimizer.step()
            theirs.step()
        ours = training.learning_rate(step, config)
        assert ours == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)


@pytest.mark.parametrize("encoder", [0, 1, 2])
def test_a_dropped_encoder_leaves_zeros_in_its_place(encoder: int) -> None:
    """And nothing else changes: CLIP-L 2 wide, CLIP-G 3, a context 6 wide."""
    context, pooled = torch.rand(2, 8, 6) + 1, torch.rand(2, 5) + 1
    context[:, :4, 5] = 0  # the padding of CLIP's half
    keep = torch.ones(2, 3, dtype=torch.bool)
    keep[1, encoder] = False
    found = drop_encoders(context, pooled, keep, (2, 3))
    places = [(slice(0, 4), slice(0, 2)), (slice(0, 4), slice(2, 5))]
    rows, columns = [*places, (slice(4, 8), slice(0, 6))][encoder]
    expected = context.clone(), pooled.clone()
    expected[0][1, rows, columns] = 0
    if encoder < 2:
        expected[1][1, columns] = 0
    assert all(map(torch.equal, found, expected))


def test_what_comes_out_is_the_average() -> None:
    task, config = regression()
    weight = fit(task, config).layers[0].weight
    assert not torch.equal(weight, task.model.layers[0].weight)
    task, config = regression(ema_decay=0.0)
    weight = fit(task, config).layers[0].weight
    assert torch.equal(weight, task.model.layers[0].weight)


def test_compilation_does_not_hide_a_lack_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(batch: dict) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "compile", lambda module, **_: full)
    with pytest.raises(torch.OutOfMemoryError):
        compiled(nn.Identity())({})


def test_accumulated_batches_equal_one_batch() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        whole, parts = trained(), trained(accumulation=4)
    finally:
        torch.set_default_dtype(torch.float32)
    for name in whole:
        assert torch.allclose(whole[name], parts[name], rtol=0, atol=1e-9)


def test_recomputed_blocks_learn_the_same() -> None:
    def run(recomputed: bool) -> tuple[dict[str, torch.Tensor], int]:
        task, config = regression(steps=5)
        calls = []
        task.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
        if recomputed:
            recompute([task.model.layers])
        return fit(task, config).state_dict(), len(calls)

    (again, twice), (plain, once) = run(True), run(False)
    assert_same(again, plain)
    assert (once, twice) == (5, 10)


def test_training_goes_on_where_compilation_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refuse(module: nn.Module, **_: object) -> Callable:
        def fail(batch: dict) -> None:
            raise RuntimeError("no compiler")

        return fail

    monkeypatch.setattr(torch, "compile", refuse)
    call = compiled(nn.Identity())
    assert call({"x": 1}) == call({"x": 1}) == {"x": 1}
    assert capsys.readouterr().err.count("going on without: no compiler") == 1


# The chapter's exercises


@pytest.fixture(scope="module")
def desk() -> Desk:
    return Desk("07_training", training, {"check": check})


@pytest.mark.parametrize("number", ["7_1", "7_2", "7_3"])
def test_the_checks_accept_the_solutions(desk: Desk, number: str) -> None:
    assert desk.hand_in(number, desk.solution(number)) == "passed"


def cooled(line: str) -> str:
    return f"""def with_cooldown(step, config, cooldown):
    c = config
    warm = min(1.0, (step + 1) / c.warmup_steps)
    end = (c.steps - step) / cooldown
    return {line}"""


WRONG = {
    "one over 1 − d": ("7_1", "half_life = lambda: 1000"),
    "half of that": ("7_1", "half_life = lambda: 500"),
    "base 2": ("7_1", "half_life = lambda: round(1000 * math.log2(2))"),
    "the index as a level": ("7_2", "uniform_levels = lambda i, seed: i / 4000 + seed"),
    "even levels": (
        "7_2",
        "uniform_levels = lambda i, seed: (i / 4000 + 0.1 * seed) % 1",
    ),
    "the noise's own seed": (
        "7_2",
        "uniform_levels = lambda i, seed: rng.uniform(seed, i, 1)[:, 0]",
    ),
    "a number of the noise": (
        "7_2",
        "uniform_levels = lambda i, seed: "
        "torch.special.ndtr(rng.normal(seed, i, (1,))[:, 0])",
    ),
    "behind some of the noise": (
        "7_2",
        "uniform_levels = lambda i, seed: rng.uniform(seed, i, 9)[:, 8]",
    ),
    "twice round with the noise": (
        "7_2",
        "uniform_levels = lambda i, seed: "
        "2 * torch.special.ndtr(rng.normal(seed, i, (4,))[:, 3]) % 1",
    ),
    "the place in the batch": (
        "7_2",
        "uniform_levels = lambda i, seed: "
        "rng.uniform(rng.fold_in(seed, 1), torch.arange(len(i)), 1)[:, 0]",
    ),
    "no seed": (
        "7_2",
        "uniform_levels = lambda i, seed: rng.uniform(rng.fold_in(0, 1), i, 1)[:, 0]",
    ),
    "normal numbers": (
        "7_2",
        "uniform_levels = lambda i, seed: "
        "rng.normal(rng.fold_in(seed, 1), i, (1,))[:, 0].sigmoid()",
    ),
    "half of the rate throughout": ("7_3", cooled("c.learning_rate / 2")),
    "no cooldown": ("7_3", cooled("c.learning_rate * warm")),
    "no warm-up": ("7_3", cooled("c.learning_rate * min(1.0, end)")),
    "a cosine at the end": (
        "7_3",
        cooled("c.learning_rate * warm * (1 - math.cos(math.pi * min(1.0, end))) / 2"),
    ),
    "falling all the way": (
        "7_3",
        cooled("c.learning_rate * min(warm, (c.steps - step) / c.steps)"),
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_checks_refuse_wrong_answers(desk: Desk, wrong: str) -> None:
    desk.refuse(*WRONG[wrong])
