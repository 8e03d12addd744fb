"""What the pipeline refuses before any work: one line that names what was found."""

from collections.abc import Sequence
from typing import Any


def as_prompts(
    prompt: str | Sequence[str], negative: str | Sequence[str]
) -> tuple[list[str], list[str]]:
    """Prompts and as many negative prompts; one negative prompt serves for all."""
    prompts = as_texts("prompt", prompt)
    negatives = as_texts("negative_prompt", negative or "")
    if isinstance(negative, str) or not negative:
        negatives = negatives * len(prompts)
    if len(negatives) != len(prompts):
        raise ValueError(
            f"negative_prompt has {len(negatives)} texts; expected 1 or {len(prompts)}"
        )
    return prompts, negatives


def as_texts(name: str, value: str | Sequence[str]) -> list[str]:
    """A list of one or more strings."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(
        isinstance(t, str) for t in texts
    ):
        found = type(value).__name__
        raise TypeError(f"{name} is a {found}; expected a string or a list of strings")
    if not texts:
        raise ValueError(f"{name} is an empty list; expected at least one string")
    return list(texts)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}")


def check_range(name: str, value: int, low: int, high: int | None = None) -> None:
    """Raise ValueError unless ``value`` is a whole number from ``low`` to ``high``."""
    if not isinstance(value, int) or value < low or (high and value > high):
        limits = f"at least {low}" if high is None else f"{low} to {high}"
        raise ValueError(f"{name} is {value}; expected a whole number, {limits}")


def check_size(name: str, size: int, grid: int, largest: int) -> None:
    """Raise ValueError unless ``size`` pixels are whole patches that fit the table."""
    if not isinstance(size, int) or size % grid or not 0 < size <= largest:
        nearest = min(max(round(size / grid), 1) * grid, largest)
        raise ValueError(
            f"{name} is {size}; expected a multiple of {grid} up to {largest} pixels "
            f"(the nearest is {nearest})"
        )


def check_parts(text_encoders: Sequence[Any], transformer: Any, vae: Any) -> None:
    """Raise ValueError where the parts of a pipeline do not fit each other."""
    clip_l, clip_g, t5 = (encoder and encoder.config for encoder in text_encoders)
    c = transformer.config
    pairs = [
        ("pooled_projection_dim", clip_l.projection_dim + clip_g.projection_dim),
        ("joint_attention_dim", t5.d_model if t5 else c.joint_attention_dim),
        ("in_channels", vae.config.latent_channels),
    ]
    for name, expected in pairs:
        if (found := getattr(c, name)) != expected:
            raise ValueError(
                f"the transformer's {name} is {found}; the other parts need {expected}"
            )


def given(value: Any, default: Any) -> Any:
    """``value``, or ``default`` where it is None."""
    return default if value is None else value
