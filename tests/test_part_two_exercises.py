"""The checks of chapters 9 to 12 accept their solutions and refuse wrong answers."""

from functools import cache

import pytest
import torch
from exercises import Desk
from torch import Tensor

import minidiff
from minidiff import control, distillation, efficiency, lora
from minidiff.classroom.exercises import check, seal
from minidiff.classroom.journey import PROMPT
from minidiff.judging.edges import agreement

pytestmark = pytest.mark.slow


def cut(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """As chapter 10 has it."""
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    return u[:, :rank] * s[:rank], v[:rank]


def error(approximate: Tensor, exact: Tensor) -> float:
    """As chapter 12 has it."""
    return ((approximate - exact).norm() / exact.norm()).item()


@cache
def desk(chapter: str) -> Desk:
    torch.manual_seed(0)
    told = {"check": check, "seal": seal}
    if chapter == "9":
        jumps = [(k / n, 1 / n) for n in (1, 2, 4, 8) for k in range(n, 0, -1)]
        return Desk("09_distillation", distillation, told | {"jumps": jumps})
    if chapter == "10":
        return Desk("10_lora", lora, told | {"cut": cut})
    if chapter == "11":
        scenes = torch.zeros(6, 3, 64, 64)
        for i in range(6):
            scenes[i, :, 14 + i : 40, 16 : 44 - i] = 1
        known = {"scenes": scenes, "edges": control.canny(scenes), "PROMPT": PROMPT}
        known |= {"pipe": minidiff.load("tiny"), "agreement": agreement}
        return Desk("11_control", control, told | known)
    known = {"matrix": torch.randn(40, 16) * torch.rand(40, 1), "error": error}
    return Desk("12_efficiency", efficiency, told | known)


SOLVED = "9_1 9_2 9_3 10_1 10_2 10_3 11_1 11_2 11_3 12_1 12_2 12_3".split()


@pytest.mark.parametrize("number", SOLVED)
@torch.no_grad()
def test_the_checks_accept_the_solutions(number: str) -> None:
    at = desk(number.split("_")[0])
    assert at.hand_in(number, at.solution(number)) == "passed"


MET = "(a * F.max_pool2d(b, {k}, 1, {k} // 2)).sum({d}) / {by}.sum({d})"
MET += ".clamp(min={least})"
OVERLAP = """
def overlap(drawn, wanted, reach):
    def met(a, b):
        return {met}
    p, r = met(drawn, wanted), met(wanted, drawn)
    return {value}
"""
BOTH = "p * r / (p + r - p * r).clamp(min=1e-12)"


def overlap(
    k: str = "(2 * reach + 1)", value: str = BOTH, by: str = "a", least: int = 1
) -> str:
    met = MET.format(k=k, d="(1, 2, 3)", by=by, least=least)
    return OVERLAP.format(met=met, value=value)


FRO = """
def to_and_fro(end, x, places, fresh):
    x = end(x, places[0])
    for place, z in zip(places[1:], fresh):
        x = {jump}
    return {last}
"""


def fro(jump: str = "end(interpolate(x, z, place), place)", last: str = "x") -> str:
    return FRO.format(jump=jump, last=last)


MERGE = """
def merge(one, two, w1, w2):
    pairs = ((one, {w1}), (two, {w2}))
    up = torch.cat([update.up.weight * w for update, w in pairs], 1)
    return torch.cat([{down} for update, w in pairs]), up
"""


def merge(w1: str, w2: str, down: str = "update.down.weight") -> str:
    return MERGE.format(w1=w1, w2=w2, down=down)


EXTRACT = """
def extract(before, after, rank):
    update = LowRank(before.shape[1], before.shape[0], rank)
    up, down = {cut}
    update.up.weight.copy_(up)
    update.down.weight.copy_(down)
    return update
"""
HALVES = "merge = lambda a, log_a, b, log_b: "
INT8 = """
def quantize_int8(x):
    scale = {scale}
    return Rows({values}.to(torch.int8), scale)
"""
ROW = "x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127"

WRONG = {
    "no guidance counted": ("9_1", "asked = lambda: (112, 8)"),
    "a guided student": ("9_1", "asked = lambda: (224, 16)"),
    "one picture": ("9_1", "asked = lambda: (56, 2)"),
    "the time is the place": ("9_2", "jump_of = lambda time: (time, 1.0)"),
    "always the whole way": ("9_2", "jump_of = lambda time: (time + 1 / 8, 1.0)"),
    "ahead by the size": (
        "9_2",
        "def jump_of(time):\n    n = 1\n    while 8 * n * time % 2 != 1:\n"
        "        n *= 2\n    return time + 1 / n, 1 / n",
    ),
    "noise at the end": ("9_3", fro(last="interpolate(x, z, place)")),
    "the same noise again": ("9_3", fro("end(interpolate(x, fresh[0], place), place)")),
    "no fresh noise": ("9_3", fro("end(x, place)")),
    "noise is added": ("9_3", fro("end(x + place * z, place)")),
    "always from the end": (
        "9_3",
        fro().replace("end(x, places[0])", "end(x, 0 * places[0])"),
    ),
    "the first place again": ("9_3", fro("end(interpolate(x, z, place), places[0])")),
    "one of the two matrices": ("10_1", "break_even = lambda: 2432"),
    "a quarter": ("10_1", "break_even = lambda: 608"),
    "one too many": ("10_1", "break_even = lambda: 1217"),
    "no direction": ("10_1", "break_even = lambda: 0"),
    "half a direction": ("10_1", "break_even = lambda: 1216.5"),
    "scales forgotten": ("10_2", merge("w1", "w2")),
    "weights forgotten": ("10_2", merge("one.scale", "two.scale")),
    "weights at both sides": (
        "10_2",
        merge("w1 * one.scale", "w2 * two.scale", "w * update.down.weight"),
    ),
    "exchanged": ("10_2", merge("w2 * one.scale", "w1 * two.scale")),
    "one full matrix": (
        "10_2",
        "merge = lambda one, two, w1, w2: (torch.eye(16), "
        "w1 * one.matrix() + w2 * two.matrix())",
    ),
    "the weights, not the change": ("10_3", EXTRACT.format(cut="cut(after, rank)")),
    "backwards": ("10_3", EXTRACT.format(cut="cut(before - after, rank)")),
    "without singular values": (
        "10_3",
        EXTRACT.format(
            cut="(lambda u, s, v: (u[:, :rank], v[:rank]))"
            "(*torch.linalg.svd(after - before, full_matrices=False))"
        ),
    ),
    "the last directions": (
        "10_3",
        EXTRACT.format(
            cut="(lambda u, s, v: (u[:, -rank:] * s[-rank:], v[-rank:]))"
            "(*torch.linalg.svd(after - before, full_matrices=False))"
        ),
    ),
    "answers in turn": ("11_1", "heard = lambda: [0, 1, 2, 0, 1, None]"),
    "the last block too": ("11_1", "heard = lambda: [0, 0, 1, 1, 2, 2]"),
    "every second block": ("11_1", "heard = lambda: [0, None, 1, None, 2, None]"),
    "counted from 1": ("11_1", "heard = lambda: [1, 1, 2, 2, 3, None]"),
    "no reach": ("11_2", overlap("1")),
    "always a reach of 1": ("11_2", overlap("3")),
    "at most a reach of 1": ("11_2", overlap("(2 * min(reach, 1) + 1)")),
    "nothing by nothing": ("11_2", overlap(least=0)),
    "the mean of both shares": ("11_2", overlap(value="(p + r) / 2")),
    "Dice's coefficient": (
        "11_2",
        overlap(value="2 * p * r / (p + r).clamp(min=1e-12)"),
    ),
    "one share alone": ("11_2", overlap(value="p")),
    "shares exchanged": ("11_2", overlap(by="b")),
    "the weight itself": ("11_3", "apart = lambda w: w"),
    "without the amount": ("11_3", "apart = lambda w: abs(w - 1) ** 2"),
    "of the word": (
        "11_3",
        "def apart(w):\n    empty, full = pipe.encode_prompt(['', PROMPT])[0][:, 2]\n"
        "    return ((w - 1) * full).norm().item() / empty.norm().item() * 1.5",
    ),
    "two bytes forgotten": ("12_1", "intensity = lambda: (512.0, 'products')"),
    "one operation": ("12_1", "intensity = lambda: (128.0, 'memory')"),
    "the other roof": ("12_1", "intensity = lambda: (256.0, 'products')"),
    "the mean": ("12_2", f"{HALVES}(a + b) / 2"),
    "the other's share": (
        "12_2",
        f"{HALVES}b + torch.sigmoid(log_b - log_a) * (a - b)",
    ),
    "exponentials that overflow": (
        "12_2",
        f"{HALVES}(log_a.exp() * a + log_b.exp() * b) / (log_a.exp() + log_b.exp())",
    ),
    "logarithms as weights": (
        "12_2",
        f"{HALVES}(log_a * a + log_b * b) / (log_a + log_b)",
    ),
    "cut off": ("12_3", INT8.format(scale=ROW, values="(x / scale)")),
    "one scale for all": (
        "12_3",
        INT8.format(
            scale="(x.abs().max().clamp(min=1e-12) / 127).expand(len(x), 1)",
            values="(x / scale).round()",
        ),
    ),
    "no zeros": (
        "12_3",
        INT8.format(
            scale="x.abs().amax(-1, keepdim=True) / 127", values="(x / scale).round()"
        ).replace(
            "return", "scale = torch.where(scale == 0, torch.inf, scale)\n    return"
        ),
    ),
    "zeros over zero": (
        "12_3",
        INT8.format(
            scale="x.abs().amax(-1, keepdim=True) / 127", values="(x / scale).round()"
        ),
    ),
    "a row as scales": (
        "12_3",
        INT8.format(scale=f"({ROW})", values="(x / scale).round()") + "\n"
        "first = quantize_int8\n"
        "quantize_int8 = lambda x: Rows(first(x).values, first(x).scale[:, 0])",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
@torch.no_grad()
def test_the_checks_refuse_wrong_answers(wrong: str) -> None:
    number, answer = WRONG[wrong]
    desk(number.split("_")[0]).refuse(number, answer)
