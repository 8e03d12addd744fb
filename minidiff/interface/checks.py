"""What the pipeline refuses before any work: one line that names what was found."""

import math
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

Texts = str | Sequence[str]
Triple = tuple[str, str, str]


def as_prompts(
    name: str,
    first: Texts | None,
    second: Texts | None = None,
    third: Texts | None = None,
    count: int | None = None,
) -> list[Triple]:
    """What CLIP-L, CLIP-G and T5 read for each of ``count`` prompts.

    As in diffusers, an encoder without a text of its own reads the first; one string
    serves for all prompts. ValueError where the counts differ.
    """
    columns = []
    for suffix, texts in (("", first), ("_2", second or first), ("_3", third or first)):
        column = as_texts(name + suffix, texts or "" if count else texts)
        count = count or len(column)
        if not texts or isinstance(texts, str):
            column = column * count
        if len(column) != count:
            found = f"{name}{suffix} has {len(column)} texts"
            raise ValueError(f"{found}; expected one string, or {count} texts")
        columns.append(column)
    return list(zip(*columns, strict=True))


def for_encoders(prompt: str | Sequence[str | Triple]) -> list[list[str]]:
    """Prompts of one text or three → the texts of each encoder."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not prompts:
        raise ValueError("prompt is an empty list; expected at least one text")
    triples = [(p,) * 3 if isinstance(p, str) else p for p in prompts]
    return [list(column) for column in zip(*triples, strict=True)]


def as_texts(name: str, value: Any) -> list[str]:
    """A list of one or more strings; TypeError or ValueError for what is none."""
    texts = [value] if isinstance(value, str) else value
    listed = isinstance(texts, list | tuple)
    if not listed or not all(isinstance(t, str) for t in texts):
        found = type(value).__name__
        raise TypeError(f"{name} is a {found}; expected a string or a list of strings")
    if not texts:
        raise ValueError(f"{name} is an empty list; expected at least one string")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:  # half of a pair, or a byte that the shell passed on
        raise ValueError(f"{name} is not a text in UTF-8") from None
    return list(texts)


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in list(choices):
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}")


def check_range(name: str, value: int, low: int, high: int | None = None) -> None:
    """Raise ValueError unless ``value`` is a whole number from ``low`` to ``high``."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < low or (high and value > high):
        limits = f"at least {low}" if high is None else f"{low} to {high}"
        raise ValueError(f"{name} is {value!r}; expected a whole number, {limits}")


def device_and_dtype(
    device: torch.device | str | int | None, dtype: torch.dtype | None
) -> tuple[torch.device, torch.dtype]:
    """Where and in what to work: None is the CPU; float32 there, else bfloat16.

    Raises ValueError for a device that torch does not know, and for a dtype that is
    not floating point.
    """
    try:
        device = torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device is {device!r}; expected cpu, cuda, …") from None
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    known = torch.float32, torch.bfloat16, torch.float16, torch.float64
    if dtype not in known:
        names = ", ".join(map(str, known))
        raise ValueError(f"dtype is {dtype!r}; expected one of {names}")
    return device, dtype


def find_target(
    device: torch.device | str | int | None, dtype: torch.dtype | None
) -> tuple[torch.device, torch.dtype]:
    """As ``device_and_dtype``; ValueError too for a device that cannot draw here."""
    device, dtype = device_and_dtype(device, dtype)
    seen = {"cpu": math.inf, "cuda": torch.cuda.device_count()}
    seen |= {"mps": torch.backends.mps.is_available()}
    check_choice("device", device.type, seen)
    if (device.index or 0) >= seen[device.type]:
        found = f"device is {device}, which PyTorch does not see"
        raise ValueError(f"{found}; expected cpu, or a driver and a PyTorch for it")
    return device, dtype


def check_fast(config: Any) -> None:
    """Raise ValueError for a transformer that ``minidiff.engine.fast`` cannot run."""
    if config.qk_norm != "rms_norm":
        found = f"this transformer has qk_norm {config.qk_norm!r}"
        raise ValueError(f"{found}; fast expects 'rms_norm'")


def check_tensor(name: str, value: Any, shape: str) -> None:
    """Raise TypeError or ValueError for what is no tensor of ``shape``, "(B, C, …)".

    None passes.
    """
    if value is None:
        return
    if not isinstance(value, Tensor):
        found = f"{name} is a {type(value).__name__}"
        raise TypeError(f"{found}; expected a tensor {shape}")
    if value.ndim != len(shape.strip("(,)").split(",")) or not value.numel():
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {shape}")
    check_dense(name, value)
    if not value.is_floating_point() or not value.isfinite().all():
        found = f"{name} is a tensor of {value.dtype}"
        raise ValueError(f"{found}; expected finite numbers, floating point")


def check_dense(name: str, value: Tensor) -> None:
    """Raise ValueError for a tensor that is complex, sparse, or on the meta device."""
    if value.is_complex() or value.is_meta or value.layout != torch.strided:
        found = f"{name} is a tensor of {value.dtype}, {value.layout}, {value.device}"
        raise ValueError(f"{found}; expected dense real numbers, not on meta")


def check_sigmas(sigmas: Tensor | None) -> None:
    """Raise ValueError unless levels (S + 1,) fall from at most 1 to at least 0."""
    check_tensor("sigmas", sigmas, "(S + 1,)")
    if sigmas is None:
        return
    if len(sigmas) < 2:
        raise ValueError(f"sigmas is {len(sigmas)} level; expected two or more")
    if not (sigmas.diff() < 0).all() or sigmas[0] > 1 or sigmas[-1] < 0:
        levels = ", ".join(f"{level:.4g}" for level in sigmas.tolist())
        raise ValueError(f"sigmas are {levels}; expected levels that fall from 1 to 0")


def check_strength(value: Any) -> None:
    """Raise ValueError unless ``value`` is a number above 0, at most 1."""
    if not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError(f"strength is {value!r}; expected above 0, at most 1")


def check_changes(changed: Any) -> dict[str, Tensor]:
    """What a callback returned, empty for None; TypeError for what is no dict."""
    if not isinstance(changed, Mapping | None):
        found = f"callback_on_step_end returned a {type(changed).__name__}"
        raise TypeError(f"{found}; expected {{'latents': …}}, or None")
    return dict(changed or {})


def check_attribute(owner: Any, name: str) -> None:
    """Raise AttributeError where ``owner`` declares no attribute ``name`` to be set."""
    kind = type(owner)
    declared = {n for c in kind.__mro__ for n in getattr(c, "__annotations__", ())}
    if name not in declared and not hasattr(kind, name):
        known = ", ".join(sorted(n for n in declared if n[0] != "_"))
        found = f"a {kind.__name__} has no {name!r} that could be set"
        raise AttributeError(f"{found}; expected {known}, or an argument of the call")


def check_size(name: str, size: int, grid: int, largest: int) -> None:
    """Raise ValueError unless ``size`` pixels are whole patches that fit the table."""
    if not isinstance(size, int):
        check_range(name, size, 1)
    if size % grid or not 0 < size <= largest:
        nearest = min(max((size + grid // 2) // grid, 1) * grid, largest)
        wanted = f"a multiple of {grid} up to {largest} pixels"
        raise ValueError(
            f"{name} is {size}; expected {wanted} (the nearest is {nearest})"
        )


def check_parts(text_encoders: Sequence[Any], transformer: Any, vae: Any) -> None:
    """Raise ValueError where the parts of a pipeline do not fit each other."""
    clip_l, clip_g, t5 = (encoder and encoder.config for encoder in text_encoders)
    c = transformer.config
    for name, expected in {
        "pooled_projection_dim": clip_l.projection_dim + clip_g.projection_dim,
        "joint_attention_dim": t5.d_model if t5 else c.joint_attention_dim,
        "in_channels": vae.config.latent_channels,
    }.items():
        if (found := getattr(c, name)) != expected:
            what = f"the transformer's {name} is {found}"
            raise ValueError(f"{what}; the other parts need {expected}")


def check_tokenizers(tokenizers: Sequence[Any], text_encoders: Sequence[Any]) -> None:
    """Raise ValueError where an encoder cannot read what its tokenizer writes."""
    names = ("CLIP-L", "CLIP-G", "T5")
    for name, tokenizer, encoder in zip(names, tokenizers, text_encoders, strict=True):
        if not (tokenizer and encoder):
            continue
        config, ids = encoder.config, tokenizer.vocab.values()
        if min(ids) < 0 or max(ids) >= config.vocab_size:
            found = f"{name}'s tokenizer has ids from {min(ids)} to {max(ids)}"
            known = f"its encoder needs them from 0 to {config.vocab_size - 1}"
            raise ValueError(f"{found}; {known}")
        end = getattr(config, "eos_token_id", 2)  # 2 stands for the last id: chapter 2
        if end not in (2, tokenizer.eos_token_id):
            found = f"{name} looks for the end token {end}"
            known = f"its tokenizer ends with {tokenizer.eos_token_id}"
            raise ValueError(f"{found}; {known}")
        limit = getattr(config, "max_position_embeddings", math.inf)
        if tokenizer.model_max_length > limit:
            found = f"{name}'s tokenizer writes {tokenizer.model_max_length} ids"
            raise ValueError(f"{found}; its encoder reads at most {limit}")


def check_dtypes(transformer: nn.Module, vae: nn.Module) -> None:
    """Raise ValueError where the weights that draw are not all in one dtype.

    Weights stored in 8 bits do not count: they are read in the dtype of the others. Nor
    do those of modules that declare ``casts``: they mind their dtype themselves.
    """
    found: dict[Any, str] = {}
    for part, model in (("transformer", transformer), ("vae", vae)):
        named = model.named_modules()
        free = tuple(f"{name}." for name, m in named if getattr(m, "casts", False))
        for name, weight in model.named_parameters():
            counts = weight.is_floating_point() and weight.dtype.itemsize > 1
            if counts and not name.startswith(free):
                found.setdefault(weight.dtype, f"{part}.{name}")
    if len(found) > 1:
        parts = " and ".join(f"{name} is {dtype}" for dtype, name in found.items())
        raise ValueError(f"dtypes are mixed: {parts}; expected one for all weights")


def check_number(name: str, value: Any, most: float = sys.float_info.max) -> None:
    """Raise ValueError unless ``value`` is a finite number of size ``most`` or less."""
    number = isinstance(value, Real)  # of NumPy too
    if not (number and abs(value) <= most):
        limits = "" if most == sys.float_info.max else f", {-most:g} to {most:g}"
        raise ValueError(f"{name} is {value!r}; expected a finite number{limits}")


def warn(text: str) -> None:
    """Warn of a call, each time: Python keeps no record of what was told before."""
    warnings.warn_explicit(text, UserWarning, "minidiff", 1)


def warn_of_cuts(
    pipe: Any, texts: Sequence[Sequence[str]], lengths: Sequence[int]
) -> None:
    """Warn, naming it, of text that an encoder will not see: its tokens are too many.

    All three kinds of ids end with one special token, which a cut keeps.
    """
    lost: dict[tuple[int, str], list[str]] = {}
    known = zip(("CLIP-L", "CLIP-G", "T5"), pipe.text_encoders, strict=True)
    for (name, reads), tokenizer, column, length in zip(
        known, pipe.tokenizers, texts, lengths, strict=True
    ):
        for text in dict.fromkeys(column if reads else ()):
            if len(ids := tokenizer.encode(text)) > length:
                cut = tokenizer.decode(ids[length - 1 : -1])
                lost.setdefault((length, cut), []).append(name)
    for (length, cut), readers in lost.items():
        who = " and ".join(readers) + (" reads" if len(readers) == 1 else " read")
        warn(f"{who} {length} tokens; not seen: {cut!r}")


def overflow(
    name: str, values: Tensor, again: Callable[[], object], **models: Any
) -> str:
    """What to say of ``values`` that are not all finite numbers; empty where they are.

    ``again`` computes them once more, so that the first layer of ``models`` where it
    happens can be named.
    """
    if is_finite(values):
        return ""
    where = first_overflow(again, models)
    return (
        f"{name} holds infinite values or NaN, so the picture will be black"
        f"{where and f' (first in {where})'}; "
        "where float16 overflows, load with dtype=torch.bfloat16"
    )


def warn_of_overflow(
    name: str, values: Tensor, again: Callable[[], object], **models: Any
) -> bool:
    """Warn of what ``overflow`` has to say; whether there was something."""
    if line := overflow(name, values, again, **models):
        warn(line)
    return bool(line)


def first_overflow(again: Callable[[], object], models: Mapping[str, Any]) -> str:
    """The first layer in ``again()`` that makes what is not finite of what is.

    Its name, and why; empty where no layer of ``models`` does.
    """
    found: list[str] = []

    def look(name: str, layer: nn.Module, given: Any, named: Any, made: Any) -> None:
        if not found and is_finite(given, named) and not is_finite(made):
            found.append(f"{name}: {why(layer, made)}")

    layers = [
        (f"{part}.{name}".rstrip("."), layer)
        for part, model in models.items()
        for name, layer in (model.named_modules() if model else ())
    ]
    handles = [
        layer.register_forward_hook(partial(look, name), with_kwargs=True)
        for name, layer in layers
    ]
    try:
        again()
    finally:
        for handle in handles:
            handle.remove()
    return "".join(found)


def is_finite(*values: Any) -> bool:
    """Whether all numbers in tensors, and in lists and dictionaries of them, are."""
    parts = [x.values() if isinstance(x, dict) else x for x in values]
    return all(
        bool(x.isfinite().all()) if isinstance(x, Tensor) else is_finite(*x)
        for x in parts
        if isinstance(x, Tensor | Iterable) and not isinstance(x, str)
    )


def why(layer: nn.Module, made: Any) -> str:
    """What to say of a layer whose answer is not finite, its inputs being so."""
    if not is_finite(layer.parameters(recurse=False)):
        return "weights that are not finite"
    half = isinstance(made, Tensor) and made.dtype == torch.float16
    return "values beyond float16's 65504" if half else "values that are not finite"


def chosen(**settings: Any) -> dict[str, Any]:
    """Those of ``settings`` that say something, for pictures to carry."""
    said = {name: x for name, x in settings.items() if x not in (None, False)}
    return {name: x if isinstance(x, int) else str(x) for name, x in said.items()}


def given(value: Any, default: Any) -> Any:
    """``value``, or ``default`` where it is None."""
    return default if value is None else value
