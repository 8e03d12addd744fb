"""Careless controls, guidance and adapters: one clear error each, or the right result.

A line a case: what is given, and how the error begins or the words it must have.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from small import TRANSFORMER
from torch import Tensor, nn

from minidiff import lora
from minidiff.dit import MMDiT
from minidiff.drawing.guidance import SkipLayer
from minidiff.engine.fast import FastMMDiT
from minidiff.flow_matching import ClassifierFree, NoGuidance
from minidiff.interface.checks import check_number

FREE, NUMBER = ClassifierFree(4.0), "expected a finite number"
WHOLE, TENSORS = "expected whole numbers: \\[7, 8, 9\\]", "expected a list of tensors"
CONTROL = torch.ones(2, 6, 32)


@pytest.mark.parametrize(
    "value",
    [None, "4", "", [4.0], (1,), {}, math.nan, math.inf, -math.inf, 10**400, 1j],
)
def test_what_is_no_number(value: object) -> None:
    with pytest.raises(ValueError, match=f"^size is .*; {NUMBER}$"):
        check_number("size", value)


@pytest.mark.parametrize("value", [0, -1, 2.5, 1e300, np.float32(4.5), np.int64(3)])
def test_what_is_one(value: object) -> None:
    check_number("size", value)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ClassifierFree(None), f"guidance_scale is None; {NUMBER}"),
        (lambda: ClassifierFree("4.5"), f"guidance_scale is '4.5'; {NUMBER}"),
        (lambda: ClassifierFree(math.nan), f"guidance_scale is nan; {NUMBER}"),
        (lambda: ClassifierFree([4.5]), rf"guidance_scale is \[4.5\]; {NUMBER}"),
        (lambda: SkipLayer(4.5), r"guidance is 4.5; expected an object such as Classi"),
        (lambda: SkipLayer(None), "guidance is None; expected an object"),
        (
            lambda: SkipLayer(ClassifierFree),
            "guidance is <class .*; expected an object",
        ),
        (lambda: SkipLayer(FREE, "1,2"), f"skip layers are '1,2'; {WHOLE}"),
        (lambda: SkipLayer(FREE, 1), f"skip layers are 1; {WHOLE}"),
        (lambda: SkipLayer(FREE, None), f"skip layers are None; {WHOLE}"),
        (lambda: SkipLayer(FREE, [1.5]), rf"skip layers are \[1.5\]; {WHOLE}"),
        (lambda: SkipLayer(FREE, [[1]]), rf"skip layers are \[\[1\]\]; {WHOLE}"),
        (lambda: SkipLayer(FREE, [1], "2"), f"skip_layer_scale is '2'; {NUMBER}"),
        (lambda: SkipLayer(FREE, [1], None), f"skip_layer_scale is None; {NUMBER}"),
        (lambda: SkipLayer(FREE, [1], math.inf), f"skip_layer_scale is inf; {NUMBER}"),
        (lambda: SkipLayer(FREE, [1], 2, "0"), f"skip_layer_start is '0'; {NUMBER}"),
        (
            lambda: SkipLayer(FREE, [1], 2, math.nan),
            f"skip_layer_start is nan; {NUMBER}",
        ),
        (
            lambda: SkipLayer(FREE, [1], 2, 0, None),
            f"skip_layer_stop is None; {NUMBER}",
        ),
        (
            lambda: SkipLayer(FREE, [1], 2, 0.5, 0.5),
            "the window is 0.5 to 0.5; expected",
        ),
        (lambda: SkipLayer(FREE, [1], 2, -0.1, 0.5), "the window is -0.1 to 0.5; expe"),
        (lambda: SkipLayer(FREE, [1], 2, 0.1, 1.1), "the window is 0.1 to 1.1; expect"),
    ],
)
def test_guidance_that_is_none(make: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


@pytest.mark.parametrize(
    "layers", [[1, 2], (1, 2), np.array([1, 2]), torch.tensor([1, 2]), range(1, 3)]
)
def test_layers_in_any_list(layers: object) -> None:
    assert SkipLayer(FREE, layers).layers == (1, 2)


def test_guidance_beneath_says_what_is_asked() -> None:
    assert SkipLayer(FREE).negative and SkipLayer(SkipLayer(FREE)).negative
    assert not SkipLayer(NoGuidance()).negative


@pytest.mark.parametrize(
    "controls, message",
    [
        (CONTROL, f"controls <class 'torch.Tensor'>: {TENSORS}"),
        (3, f"controls <class 'int'>: {TENSORS}"),
        ("abc", f"controls <class 'str'>: {TENSORS}"),
        ({0: CONTROL}, f"controls <class 'dict'>: {TENSORS}"),
        ([None], f"controls <class 'list'>: {TENSORS}"),
        ([CONTROL, 1.0], f"controls <class 'list'>: {TENSORS}"),
        (iter([CONTROL]), f"controls <class 'list_iterator'>: {TENSORS}"),
        ([CONTROL] * 4, "controls are 4: expected at most 3"),
        ([CONTROL[0]], r"controls\[0\] \(6, 32\): expected \(2, 6, 32\)"),
        ([CONTROL, CONTROL[:1]], r"controls\[1\] \(1, 6, 32\): expected \(2, 6, 32\)"),
        ([CONTROL[:, :5]], r"controls\[0\] \(2, 5, 32\): expected \(2, 6, 32\)"),
        ([CONTROL[..., :31]], r"controls\[0\] \(2, 6, 31\): expected \(2, 6, 32\)"),
        ([CONTROL[None]], r"controls\[0\] \(1, 2, 6, 32\): expected \(2, 6, 32\)"),
    ],
)
@pytest.mark.parametrize("form", [lambda model: model, FastMMDiT.of])
@torch.no_grad()
def test_controls_that_cannot_be_added(
    form: Callable, controls: object, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        form(MMDiT(TRANSFORMER))(*given(), controls=controls)


@pytest.mark.parametrize(
    "controls",
    [None, [], (), [CONTROL], (CONTROL,), [CONTROL.double()], [CONTROL.bfloat16()]],
)
@pytest.mark.parametrize("form", [lambda model: model, FastMMDiT.of])
@torch.no_grad()
def test_controls_of_any_dtype(form: Callable, controls: object) -> None:
    model = form(MMDiT(TRANSFORMER))
    nn.init.normal_(model.final_layer.linear.weight)
    found, x = model(*given(), controls=controls), given()
    assert found.dtype == torch.float32
    assert torch.equal(found, model(*x)) == (not controls)


def given() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return (
        torch.randn(2, 16, 4, 6),
        torch.tensor([0.2, 0.9]),
        torch.randn(2, 5, 48),
        torch.randn(2, 40),
    )


@pytest.mark.parametrize(
    "rank, message",
    [
        (0, "rank is 0; expected a whole number, at least 1"),
        (-1, "rank is -1; expected a whole number, at least 1"),
        (2.5, "rank is 2.5; expected a whole number, at least 1"),
        ("4", "rank is '4'; expected a whole number, at least 1"),
        (None, "rank is None; expected a whole number, at least 1"),
        (33, "rank is 33; expected at most 32 in these layers"),
    ],
)
def test_ranks_that_no_layer_has(rank: object, message: str) -> None:
    model = MMDiT(TRANSFORMER)
    with pytest.raises(ValueError, match=message):
        lora.add_lora(model, rank)
    assert not lora.adapted_layers(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("given", [{"sigma": None}, {"pooled": None}])
def test_what_modulations_need(given: dict) -> None:
    call = {"latents": torch.zeros(1, 16, 4, 4), "context": torch.zeros(1, 5, 48)}
    call |= {"sigma": torch.zeros(1), "pooled": torch.zeros(1, 40)} | given
    with pytest.raises(ValueError, match="expected sigma and pooled, or modulations"):
        MMDiT(TRANSFORMER)(**call)
