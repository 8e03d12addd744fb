"""Flow matching against its equations, the published schedule and diffusers."""

import math
from itertools import pairwise

import pytest
import torch
from exercises import Desk
from helpers import relative_error

from minidiff import flow_matching as fm
from minidiff.classroom.exercises import check

SHAPE = (3, 4, 5, 6)


def pair(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(SHAPE, dtype=dtype), torch.randn(SHAPE, dtype=dtype)


# The path


@pytest.mark.parametrize("sigma", [0.0, 0.3, 1.0, torch.tensor([0.0, 0.4, 1.0])])
def test_path_and_its_inverses(sigma):
    x0, noise = pair(torch.float64)
    x = fm.interpolate(x0, noise, sigma)
    for i, level in enumerate(torch.as_tensor(sigma).expand(3).tolist()):
        torch.testing.assert_close(x[i], (1 - level) * x0[i] + level * noise[i])
    v = fm.velocity_target(x0, noise)
    torch.testing.assert_close(fm.denoised(x, v, sigma), x0)
    torch.testing.assert_close(fm.predicted_noise(x, v, sigma), noise)


def test_velocity_is_the_derivative_of_the_path():
    x0, noise = pair(torch.float64)
    sigma, step = 0.37, 1e-6
    ahead, behind = (fm.interpolate(x0, noise, sigma + s) for s in (step, -step))
    slope = (ahead - behind) / (2 * step)
    torch.testing.assert_close(
        slope, fm.velocity_target(x0, noise), rtol=1e-6, atol=1e-6
    )


def test_rescaled_to_ddpm():
    x0, noise = pair(torch.float64)
    sigma = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    x = fm.to_variance_preserving(fm.interpolate(x0, noise, sigma), sigma)
    bar = fm.expand(fm.alpha_bar(sigma), x0)
    torch.testing.assert_close(x, bar.sqrt() * x0 + (1 - bar).sqrt() * noise)
    ratio = ((1 - sigma) / sigma) ** 2
    torch.testing.assert_close(fm.alpha_bar(sigma) / (1 - fm.alpha_bar(sigma)), ratio)


def test_loss_is_zero_for_the_true_velocity_and_one_for_a_unit_error():
    x0, noise = pair()
    sigma = torch.rand(3)
    exact = fm.flow_matching_loss(lambda x, s: noise - x0, x0, noise, sigma)
    off = fm.flow_matching_loss(lambda x, s: noise - x0 + 1, x0, noise, sigma)
    assert exact == 0
    assert off.item() == pytest.approx(1, rel=1e-6)


# Noise levels


def test_time_sampling():
    def draw(sample, **kwargs):
        return sample(200_000, generator=torch.Generator().manual_seed(0), **kwargs)

    uniform = draw(fm.sample_sigmas_uniform)
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.005)
    assert uniform.std().item() == pytest.approx(1 / math.sqrt(12), abs=0.005)
    normal = draw(fm.sample_sigmas_logit_normal, mean=0.5, std=0.8).logit()
    assert normal.mean().item() == pytest.approx(0.5, abs=0.01)
    assert normal.std().item() == pytest.approx(0.8, abs=0.01)
    again = draw(fm.sample_sigmas_logit_normal, mean=0.5, std=0.8).logit()
    assert torch.equal(normal, again)


@pytest.mark.parametrize("mean, std", [(0, 1), (0.5, 0.8), (-1, 0.6)])
def test_logit_normal_density_integrates_to_its_distribution(mean, std):
    sigma = torch.linspace(1e-6, 1 - 1e-6, 200_001, dtype=torch.float64)
    density = fm.logit_normal_density(sigma, mean, std)
    below = torch.trapezoid(density[:100_001], sigma[:100_001]).item()
    exact = 0.5 * (1 + math.erf(-mean / std / math.sqrt(2)))
    assert torch.trapezoid(density, sigma).item() == pytest.approx(1, abs=1e-6)
    assert below == pytest.approx(exact, abs=1e-6)


def test_shift():
    sigma = torch.linspace(0, 1, 11)
    assert torch.equal(fm.shift_sigma(sigma, 1.0), sigma)
    odds = sigma[1:-1] / (1 - sigma[1:-1])
    shifted = fm.shift_sigma(sigma, 3.0)[1:-1]
    torch.testing.assert_close(shifted / (1 - shifted), 3 * odds)


def diffusers_schedule(steps, shift, heun=False):
    diffusers = pytest.importorskip("diffusers")
    name = (
        "FlowMatchHeunDiscreteScheduler" if heun else "FlowMatchEulerDiscreteScheduler"
    )
    scheduler = getattr(diffusers, name)(shift=shift)
    scheduler.set_timesteps(steps)
    return scheduler


def test_published_schedule():
    expected = torch.tensor([1, 0.857692, 0.602151, 0.00892857, 0])
    torch.testing.assert_close(fm.sigma_schedule(4), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.5])
def test_schedule_is_diffusers(shift):
    for steps in [1, 2, *range(3, 61, 7), 1000]:
        sigmas = fm.sigma_schedule(steps, shift)
        expected = diffusers_schedule(steps, shift).sigmas
        assert sigmas.shape == (steps + 1,)
        assert (sigmas - expected).abs().max() <= 1.2e-7
    assert torch.equal(fm.Scheduler(shift).sigmas(60), fm.sigma_schedule(60, shift))


def test_schedule_parity_catches_a_single_shift():
    single = torch.linspace(1, 0.001, 28)
    single = torch.cat([fm.shift_sigma(single, 3.0), torch.zeros(1)])
    assert (single - diffusers_schedule(28, 3.0).sigmas).abs().max() > 1e-3


@pytest.mark.parametrize("steps, shift", [(0, 3.0), (-1, 3.0), (4, 0.0), (4, -1.0)])
def test_schedule_refuses(steps, shift):
    wrong = f"steps is {steps}" if steps < 1 else f"shift is {shift}"
    with pytest.raises(ValueError, match=f"{wrong}; expected"):
        fm.sigma_schedule(steps, shift)


# Solvers


def curved(x, sigma):
    """A velocity that depends on both arguments."""
    return torch.sin(2 * x) + sigma * x.roll(1, -1)


def diffusers_drawing(scheduler, x):
    for t in scheduler.timesteps:
        sigma = t / 1000
        x = scheduler.step(curved(x, sigma), t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("steps", [1, 4, 11])
@pytest.mark.parametrize("name", ["euler", "heun"])
def test_solver_is_diffusers(name, steps):
    x, _ = pair()
    scheduler = diffusers_schedule(steps, 3.0, heun=name == "heun")
    ours = getattr(fm, name)(curved, x, fm.sigma_schedule(steps))
    assert relative_error(ours, diffusers_drawing(scheduler, x)) <= 1e-5


def test_solver_parity_catches_the_other_solver():
    x, _ = pair()
    expected = diffusers_drawing(diffusers_schedule(11, 3.0), x)
    assert relative_error(fm.heun(curved, x, fm.sigma_schedule(11)), expected) > 1e-3


def minus_log(sigma):
    return -math.log(sigma) if sigma > 0 else math.inf


def log_snr(sigma):
    return math.log((1 - sigma) / sigma) if 0 < sigma < 1 else -math.log(sigma + 1e-300)


def reference_dpmpp_2m(velocity, x, sigmas, time=minus_log, factor=2):
    """The reference's formula as published, with its times and its 1/(2r)."""
    t = [time(s) for s in sigmas.tolist()]
    old = None
    for i in range(len(sigmas) - 1):
        x0 = x - sigmas[i] * velocity(x, sigmas[i])
        h = t[i + 1] - t[i]
        used = x0
        if 0 < i < len(sigmas) - 2:
            r = (t[i] - t[i - 1]) / h
            used = (1 + 1 / (factor * r)) * x0 - 1 / (factor * r) * old
        x = sigmas[i + 1] / sigmas[i] * x - (math.exp(-h) - 1) * used
        old = x0
    return x


@pytest.mark.parametrize("steps", [1, 2, 4, 28])
def test_dpmpp_2m_is_the_reference(steps):
    x, _ = pair(torch.float64)
    sigmas = fm.sigma_schedule(steps).double()
    expected = reference_dpmpp_2m(curved, x, sigmas)
    assert relative_error(fm.dpmpp_2m(curved, x, sigmas), expected) <= 1e-12


@pytest.mark.parametrize("mutant", [{"time": log_snr}, {"factor": 1}])
def test_dpmpp_2m_parity_catches(mutant):
    x, _ = pair(torch.float64)
    sigmas = fm.sigma_schedule(8).double()
    expected = reference_dpmpp_2m(curved, x, sigmas, **mutant)
    assert relative_error(fm.dpmpp_2m(curved, x, sigmas), expected) > 1e-5


# For data N(μ, s²) the velocity and the solution of its ODE are known exactly.
MU, STD = 0.7, 0.4


def spread(sigma):
    return ((1 - sigma) ** 2 * STD**2 + sigma**2) ** 0.5


def gaussian_velocity(x, sigma):
    gain = STD**2 * (1 - sigma) / spread(sigma) ** 2
    return (x - (MU + gain * (x - (1 - sigma) * MU))) / sigma


def final_error(solver, steps):
    start = torch.linspace(-2, 2, 41, dtype=torch.float64)
    sigmas = torch.linspace(1, 0.05, steps + 1, dtype=torch.float64)
    exact = 0.95 * MU + spread(0.05) * start
    return (solver(gaussian_velocity, start, sigmas) - exact).abs().max().item()


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_order_of_convergence(solver, order):
    errors = [final_error(getattr(fm, solver), n) for n in (100, 200, 400, 800)]
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert orders[-1] == pytest.approx(order, abs=0.1), (errors, orders)


@pytest.mark.parametrize("solver", [fm.euler, fm.heun, fm.dpmpp_2m])
def test_straight_flow_takes_one_step(solver):
    x0, noise = pair(torch.float64)
    v = noise - x0
    drawn = solver(lambda x, sigma: v, noise, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(drawn, x0)


@pytest.mark.parametrize("solver", [fm.euler, fm.heun, fm.dpmpp_2m])
def test_callback_sees_each_step_and_may_replace_the_state(solver):
    x, _ = pair()
    sigmas, seen = fm.sigma_schedule(4), []

    def see(step, sigma, x, x0_hat):
        seen.append((step, sigma.item(), x, x0_hat))

    final = solver(curved, x, sigmas, see)
    assert [s[0] for s in seen] == [0, 1, 2, 3]
    assert [s[1] for s in seen] == sigmas[:-1].tolist()
    assert torch.equal(seen[-1][2], final)
    torch.testing.assert_close(seen[0][3], fm.denoised(x, curved(x, sigmas[0]), 1.0))
    zeros = solver(curved, x, sigmas, lambda step, sigma, x, x0: torch.zeros_like(x))
    assert torch.equal(zeros, torch.zeros_like(x))


# Guidance


def test_guidance():
    v_neg, v_pos = pair()
    assert torch.equal(fm.guide(v_neg, v_pos, 0.0), v_neg)
    torch.testing.assert_close(fm.guide(v_neg, v_pos, 1.0), v_pos)
    expected = v_neg + 4.5 * (v_pos - v_neg)
    torch.testing.assert_close(fm.guide(v_neg, v_pos, 4.5), expected)
    x, sigma = pair()[0], 0.6
    on_data = fm.guide(fm.denoised(x, v_neg, sigma), fm.denoised(x, v_pos, sigma), 4.5)
    on_velocity = fm.denoised(x, fm.guide(v_neg, v_pos, 4.5), sigma)
    torch.testing.assert_close(on_data, on_velocity, rtol=1e-5, atol=1e-5)


# The plane


def test_exact_velocity_has_the_least_loss_and_ends_at_the_data():
    points = torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.2, -1.0]], dtype=torch.float64)
    exact = fm.exact_velocity(points)
    data = points.repeat(20_000, 1)
    noise = torch.randn_like(data)
    best = fm.flow_matching_loss(exact, data, noise, torch.tensor(0.6))
    for change in (0.95, 1.05):
        other = fm.flow_matching_loss(
            lambda x, s, c=change: c * exact(x, s), data, noise, torch.tensor(0.6)
        )
        assert other > best
    drawn = fm.euler(exact, noise[:50], fm.sigma_schedule(60, 1.0).double())
    assert torch.cdist(drawn, points).amin(1).max() < 1e-6


def test_the_naive_solver_is_euler():
    x, velocity = torch.randn(4, 2), fm.exact_velocity(torch.randn(6, 2))
    sigmas = fm.sigma_schedule(9)
    naive = fm.euler_loops(velocity, x, sigmas)
    torch.testing.assert_close(naive, fm.euler(velocity, x, sigmas))


def test_the_score_is_the_slope_of_the_density():
    """Of one Gaussian around (1 − σ)·μ, and of a batch with a level each."""
    mean, x = torch.tensor([0.7, -0.2]), torch.randn(3, 2)
    for sigma in (0.4, torch.tensor([0.2, 0.5, 0.9])):
        level = torch.as_tensor(sigma).expand(3)[:, None]
        slope = -(x - (1 - level) * mean) / level**2
        v = (x - mean) / level
        torch.testing.assert_close(fm.score(x, v, sigma), slope, rtol=1e-4, atol=1e-4)


# The chapter's exercises


@pytest.fixture(scope="module")
def desk():
    return Desk("06_flow_matching", fm, {"check": check})


@pytest.mark.parametrize("number", ["6_1", "6_2", "6_3"])
def test_the_checks_accept_the_solutions(desk, number):
    assert desk.hand_in(number, desk.solution(number)) == "passed"


def midpoint(line):
    """The midpoint method with another line."""
    return f"""def midpoint(velocity, x, sigmas):
    for sigma, sigma_next in pairwise(sigmas):
        h = sigma_next - sigma
        {line}
    return x"""


def renoise(line):
    return f"def renoise(x, fresh, sigma, higher):\n    return {line}"


WRONG = {
    "levels instead of odds": ("6_1", "needed = lambda: 0.9 / 0.5"),
    "a difference": ("6_1", "needed = lambda: 0.9 - 0.5"),
    "one over the data's weight": ("6_1", "needed = lambda: 1 / (1 - 0.9)"),
    "SD3.5's": ("6_1", "needed = lambda: 3.0"),
    "Euler": ("6_2", "midpoint = euler"),
    "Heun": ("6_2", "midpoint = heun"),
    "half-way, at the old level": (
        "6_2",
        midpoint("x = x + h * velocity(x + h / 2 * velocity(x, sigma), sigma)"),
    ),
    "the old place, half-way": (
        "6_2",
        midpoint("x = x + h * velocity(x, sigma + h / 2)"),
    ),
    "two half steps": (
        "6_2",
        midpoint(
            "x = x + h / 2 * velocity(x, sigma); "
            "x = x + h / 2 * velocity(x, sigma + h / 2)"
        ),
    ),
    "each step as long as the first": (
        "6_2",
        midpoint(
            "h = sigmas[1] - sigmas[0]; "
            "x = x + h * velocity(x + h / 2 * velocity(x, sigma), sigma + h / 2)"
        ),
    ),
    "a mixture of state and noise": (
        "6_3",
        renoise("(1 - higher) * x + higher * fresh"),
    ),
    "noise added, nothing shrunk": (
        "6_3",
        renoise("x + (higher**2 - sigma**2) ** 0.5 * fresh"),
    ),
    "deviations added": (
        "6_3",
        renoise(
            "(1 - higher) / (1 - sigma) * x + "
            "(higher - (1 - higher) / (1 - sigma) * sigma) * fresh"
        ),
    ),
    "the old noise forgotten": (
        "6_3",
        renoise("(1 - higher) / (1 - sigma) * x + higher * fresh"),
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_checks_refuse_wrong_answers(desk, wrong):
    desk.refuse(*WRONG[wrong])
