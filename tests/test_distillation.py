"""Chapter 9: jumps and their names, the loss, schedules, and the stage ``turbo``."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import relative_error
from pipelines import pair
from small import small_pipeline
from torch import Tensor, nn

import minidiff
from minidiff.distillation import (
    JumpScheduler,
    discriminator_loss,
    distribution_matching_loss,
    euler_step,
    flow_map_loss,
    follow,
    grid,
    jump,
    paths,
    told,
    two_halves,
)
from minidiff.engine.loading import describe_model, read_scheduler
from minidiff.files import layout
from minidiff.files.weights import TINY
from minidiff.flow_matching import Scheduler, shift_sigma
from minidiff.judging.exam import exam
from minidiff.sampling import Pipeline

JUMPS = [(k / n, 1 / n) for n in (1, 2, 4, 8, 16, 32, 64) for k in range(n, 0, -1)]


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_each_jump_has_a_time_of_its_own(shift: float) -> None:
    place, size = torch.tensor(JUMPS, dtype=torch.float64).T
    times = told(place, size, shift)
    assert len(set(times.tolist())) == len(JUMPS) == 127
    assert (0 < times).all() and (times < shift_sigma(place, shift)).all()
    assert (times > shift_sigma(place - size, shift)).all()


@pytest.mark.parametrize("steps", range(1, 9))
def test_a_drawing_is_made_of_known_jumps(steps: int) -> None:
    places = grid(steps)
    jumps = list(zip(places[:-1].tolist(), (-places.diff()).tolist(), strict=True))
    assert len(jumps) == steps and places[0] == 1 and places[-1] == 0
    assert set(jumps) <= set(JUMPS)
    sizes = [size for _, size in jumps]
    assert sizes == sorted(sizes) and max(sizes) <= 2 * min(sizes)


def perfect(shift: float) -> Callable[[Tensor, Tensor], Tensor]:
    """A student of dx/dσ = x who knows of every name where the jump leads."""
    names = {told(*torch.tensor(j).double(), shift).item(): j for j in JUMPS}

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        means = []
        for t in time.tolist():
            place, size = names[min(names, key=lambda name: abs(name - t))]
            place, end = shift_sigma(torch.tensor([place, place - size]), shift)
            means.append((math.exp(end - place) - 1) / (end - place))
        return x * torch.tensor(means)[:, None]

    return velocity


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_a_perfect_student_arrives_in_any_number_of_jumps(
    steps: int, shift: float
) -> None:
    x = torch.randn(4, 2)
    drawn = follow(perfect(shift), x, steps, shift)
    torch.testing.assert_close(drawn, x * math.exp(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_one_jump_of_a_perfect_student_is_two_half_ones(shift: float) -> None:
    x, know = torch.randn(6, 2), perfect(shift)
    at = torch.tensor([1, 1, 0.5, 0.5, 0.25, 1]), torch.tensor([1, 0.5, 0.5] * 2) / 2
    end = two_halves(lambda *at: jump(know, *at, shift=shift), x, *at)
    assert flow_map_loss(know, x, end, *at, shift=shift) < 1e-10
    wrong = flow_map_loss(lambda x, t: 1.1 * know(x, t), x, end, *at, shift=shift)
    assert wrong > 1e-3
    steps = two_halves(lambda *at: euler_step(lambda x, s: x, *at, shift=shift), x, *at)
    assert 1e-6 < flow_map_loss(know, x, steps, *at, shift=shift) < 1e-1


def test_only_the_long_jump_learns() -> None:
    weight = nn.Parameter(torch.ones(()))
    student = lambda x, time: weight * x  # noqa: E731
    x, one = torch.ones(3, 2), torch.ones(3)
    end = two_halves(lambda *at: jump(student, *at), x, one, one)
    flow_map_loss(student, x, end, one, one).backward()
    # target: (1 − ½)² = ¼, a mean velocity of ¾; the answer is 1
    torch.testing.assert_close(weight.grad, torch.tensor(2 * (1 - 0.75)))


def test_a_teachers_step_is_told_the_level_and_a_jump_its_name() -> None:
    heard: list[float] = []
    velocity = lambda x, time: heard.append(time.item()) or x  # noqa: E731
    at = torch.ones(1), torch.tensor([0.75]), torch.tensor([0.25])
    torch.testing.assert_close(
        euler_step(velocity, *at, shift=3.0), jump(velocity, *at, shift=3.0)
    )
    level, name = shift_sigma(torch.tensor([0.75, 0.75 - 0.25 / 8]), 3.0).tolist()
    assert heard == pytest.approx([level, name])


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_paths_pass_where_the_flow_does(shift: float) -> None:
    x = torch.randn(4, 2)
    states = paths(lambda x, sigma: x, x, shift)
    levels = shift_sigma(torch.linspace(1, 0, 9), shift)
    wanted = x[:, None] * (levels - 1).exp()[:, None]
    assert torch.equal(states[:, 0], x)
    torch.testing.assert_close(states, wanted, rtol=0.03, atol=0)
    know = perfect(shift)
    at = torch.full((4,), 0.5), torch.full((4,), 0.25)
    torch.testing.assert_close(
        jump(know, states[:, 4], *at, shift=shift), states[:, 6], rtol=0.03, atol=0
    )


# Sharpening


def test_points_move_from_their_own_estimate_to_the_teachers() -> None:
    drawn = torch.tensor([[1.0, 0.0], [0.0, 2.0]], requires_grad=True)
    sigma, noise = torch.tensor([0.5, 0.25]), torch.zeros(2, 2)
    ends = {"teacher": torch.tensor([[2.0, 0], [0, 2]]), "fake": torch.ones(2, 2)}
    fields = {
        k: lambda x, s, end=end: (x - end) / s[:, None] for k, end in ends.items()
    }
    loss = distribution_matching_loss(
        drawn, fields["teacher"], fields["fake"], noise, sigma
    )
    loss.backward()
    # 4 numbers; the scales are the mean distances to the teacher's ends
    away = (ends["fake"] - ends["teacher"]) / torch.tensor([[0.5], [1e-30]])
    torch.testing.assert_close(drawn.grad[0], away[0] / 4)


def test_a_hinge_costs_nothing_beyond_it() -> None:
    right, wrong = torch.tensor([1.0, 3.0]), torch.tensor([-1.0, -2.0])
    assert discriminator_loss(right, wrong) == 0
    assert discriminator_loss(torch.tensor([0.5]), torch.tensor([0.5])) == 2.0


# The schedule, and pipelines that have it


def test_a_scheduler_of_jumps() -> None:
    scheduler = JumpScheduler(shift=3.0)
    sigmas = scheduler.sigmas(3)
    places = torch.tensor([1, 0.75, 0.5, 0])
    torch.testing.assert_close(sigmas, shift_sigma(places, 3.0))
    inside = shift_sigma(torch.tensor([31 / 32, 23 / 32, 7 / 16]), 3.0)
    torch.testing.assert_close(scheduler.told(sigmas)[:-1], inside)
    torch.testing.assert_close(scheduler.told(sigmas[1:])[:-1], inside[1:])
    assert scheduler.usual == (4, 1.0) and JumpScheduler(jumps=2).usual == (2, 1.0)
    for steps in (0, 9):
        with pytest.raises(ValueError, match=f"is {steps}; expected .* 1 to 8"):
            scheduler.sigmas(steps)
    with pytest.raises(ValueError, match="jumps is 6; expected a power of two"):
        JumpScheduler(jumps=6)
    plain = Scheduler(3.0)
    assert torch.equal(plain.told(sigmas), sigmas) and plain.usual is None


@pytest.fixture(scope="module")
def turbo(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    pipe = small_pipeline(tmp_path_factory.mktemp("turbo"))
    made = Pipeline(
        pipe.tokenizers,
        pipe.text_encoders,
        pipe.transformer,
        pipe.vae,
        JumpScheduler(shift=3.0),
    )
    made.progress = False
    return made


def test_a_pipeline_knows_by_its_scheduler(turbo: Pipeline) -> None:
    assert turbo.defaults == (4, 1.0)
    for wrong, message in (
        ({"num_inference_steps": 9}, "num_inference_steps is 9; expected .* 1 to 8"),
        ({"sampler": "heun"}, "sampler is 'heun'; expected one of euler"),
    ):
        with pytest.raises(ValueError, match=message):
            turbo("a red dress", **wrong)


def test_the_transformer_is_told_the_jumps(
    turbo: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = []
    ask = turbo.transformer.modulations
    watch = lambda times, pooled: heard.append(times[:-1, 0]) or ask(times, pooled)  # noqa: E731
    monkeypatch.setattr(turbo.transformer, "modulations", watch)
    noise = turbo.prepare_latents(1)
    drawn = turbo("a red dress", num_inference_steps=3, output_type="latent")
    names = turbo.scheduler.told(turbo.scheduler.sigmas(3))[:-1]
    torch.testing.assert_close(heard[0], names)
    monkeypatch.undo()
    text = turbo.encode_prompt("a red dress")
    velocity = lambda x, time: turbo.transformer(x, time, *text)  # noqa: E731
    with torch.no_grad():
        wanted = follow(velocity, noise, 3, shift=3.0)
    torch.testing.assert_close(drawn, wanted, rtol=1e-4, atol=1e-4)


def jumps_error(folder: Path, steps: int) -> float:
    """Of latents: diffusers' scheduler takes levels and names apart."""
    pipe, reference = pair(folder)
    scheduler = JumpScheduler(shift=3.0)
    parts = pipe.tokenizers, pipe.text_encoders, pipe.transformer, pipe.vae
    pipe = Pipeline(*parts, scheduler)
    noise, sigmas = pipe.prepare_latents(1), scheduler.sigmas(steps)
    theirs = type(reference.scheduler)(shift=1.0)
    names = 1000 * scheduler.told(sigmas)[:-1]
    theirs.set_timesteps(sigmas=sigmas[:-1].tolist(), timesteps=names.tolist())
    context, pooled = pipe.encode_prompt("a red dress")
    x = noise
    with torch.no_grad():
        for t in theirs.timesteps:
            v = reference.transformer(x, context, pooled, t[None], return_dict=False)[0]
            x = theirs.step(v, t, x, return_dict=False)[0]
    how = {"num_inference_steps": steps, "output_type": "latent"}
    return relative_error(pipe("a red dress", latents=noise, **how), x)


def test_diffusers_draws_the_same(tmp_path: Path) -> None:
    assert jumps_error(tmp_path, 5) <= 1e-5


# Folders


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    """A few-step model that holds a scheduler and an index, and lies beside tiny."""
    (tmp_path / "tiny").symlink_to(TINY)
    folder = tmp_path / "turbo"
    layout.save_scheduler(JumpScheduler(1.0), folder / "scheduler")
    index = layout.pipeline_index((*layout.MODELS, *layout.TOKENIZERS))
    (folder / "model_index.json").write_text(json.dumps(index | {"_base": "tiny"}))
    return folder


@pytest.mark.slow
def test_a_folder_shares_what_it_does_not_hold(beside: Path, tmp_path: Path) -> None:
    pipe, tiny = minidiff.load(beside), minidiff.load("tiny")
    assert pipe.defaults == (4, 1.0) and pipe.scheduler == JumpScheduler(1.0)
    assert "4 steps, guidance 1.0" in describe_model(beside)
    parts = zip(pipe.text_encoders, tiny.text_encoders, strict=True)
    for ours, theirs in (*parts, (pipe.vae, tiny.vae)):
        pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    pipe.save_pretrained(tmp_path / "whole")  # nothing is missing then
    assert read_scheduler(tmp_path / "whole" / "scheduler").usual == (4, 1.0)
    assert minidiff.load(tmp_path / "whole").defaults == (4, 1.0)


@pytest.mark.parametrize("base", ["../tiny", "/etc", "..", ".", "", 7, "a/b"])
def test_a_base_is_the_name_of_a_neighbour(beside: Path, base: object) -> None:
    index = json.loads((beside / "model_index.json").read_text())
    (beside / "model_index.json").write_text(json.dumps(index | {"_base": base}))
    with pytest.raises(ValueError, match="_base is .*; expected the name of a folder"):
        minidiff.load(beside)


@pytest.mark.parametrize(("jumps", "message"), [(6, "power of two"), ("8", "int")])
def test_jumps_of_a_folder_are_checked(
    beside: Path, jumps: object, message: str
) -> None:
    file = beside / "scheduler" / "scheduler_config.json"
    content = json.loads(file.read_text())
    assert content["_jumps"] == 8
    file.write_text(json.dumps(content | {"_jumps": jumps}))
    with pytest.raises(ValueError, match=message):
        minidiff.load(beside)


def test_diffusers_passes_over_the_jumps(beside: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler.from_pretrained(beside / "scheduler")
    assert theirs.config.shift == 1.0 and "jumps" not in theirs.config


def test_a_student_goes_without_guidance() -> None:
    with pytest.warns(UserWarning, match="distilled to draw without guidance"):
        minidiff.load("tiny-turbo")("a cat", guidance_scale=3.0, seed=0)


def test_the_student_that_ships() -> None:
    """Its jumps land nearer to the teacher's 28 steps than as few of the teacher's."""
    student, teacher = pipes = minidiff.load("tiny-turbo"), minidiff.load("tiny")
    assert student.defaults == (4, 1.0) and student.scheduler == JumpScheduler(1.0)
    prompts = exam(8)[0]
    how = {"seed": 0, "output_type": "latent"}
    wanted = teacher(prompts, **how)
    for steps in (1, 2, 4):
        few = [pipe(prompts, num_inference_steps=steps, **how) for pipe in pipes]
        missed = [relative_error(latents, wanted) for latents in few]
        assert missed[0] < 0.75 * missed[1], steps
