"""What a drawing is asked for: one frozen request, which checks itself.

Command line, pipeline, rehearsal and the plan of memory share it. What depends on a
model, ``Pipeline.check`` fills in and checks.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, fields
from functools import cached_property, wraps
from hashlib import sha256
from inspect import signature
from numbers import Integral, Real
from os import PathLike
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch import Tensor

from minidiff.interface import checks
from minidiff.interface.checks import Texts, Triple
from minidiff.interface.limits import MOST_PICTURES, check_pictures

# callback(pipe, step, timestep, {"latents": …, "denoised": x̂₀}), as in diffusers
Callback = Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]
Given = ParamSpec("Given")
Owner = TypeVar("Owner")
Asked = TypeVar("Asked")
Drawn = TypeVar("Drawn")

OUTPUTS = ("pil", "pt", "np", "latent")
RANGES = {
    "num_inference_steps": (1, 1000),
    "num_images_per_prompt": (1, MOST_PICTURES),
    "seed": (0, 2**63),
    "max_sequence_length": (1, 512),
}
SHAPES = {
    "latents": "(B, C, h, w)",
    "prompt_embeds": "(B, L, D)",
    "pooled_prompt_embeds": "(B, P)",
    "negative_prompt_embeds": "(B, L, D)",
    "negative_pooled_prompt_embeds": "(B, P)",
}
CLIP_TOKENS = 77  # of a tokenizer that is not here yet
LONG = 400  # rows of context; SD3.5 was trained with 154 and 333
# What a picture does not note: what it shows does not hang on it, or is no line of text
UNTOLD = ("output_type", "callback_on_step_end", "num_images_per_prompt")


@dataclass(frozen=True, eq=False)
class Request:
    """The arguments of a pipeline's call; None leaves the choice to the model.

    ``prompt``, and ``negative_prompt`` from which guidance leads away: one text, or a
    list. ``…_2`` and ``…_3`` are what CLIP-G and T5 read in its place;
    ``prompt_embeds`` (B, L, D) with ``pooled_prompt_embeds`` (B, P), as
    ``encode_prompt`` returns them, replace it. Likewise the negative ones.
    ``num_images_per_prompt`` pictures of ``height`` × ``width`` pixels are drawn for
    each prompt, prompt by prompt. Picture i starts from the noise of ``seed`` + i,
    whatever else is drawn with it (None: a random seed), or from ``latents``
    (B, C, h, w). ``sigmas`` (S + 1,) replaces the model's schedule, ``guidance`` the
    classifier-free one of ``guidance_scale``, of which 1 or less means none.
    ``control`` steers besides the words: a ``minidiff.control.Control``, or a list.
    ``max_sequence_length`` counts T5's tokens. ``callback_on_step_end(pipe, step,
    timestep, tensors)`` is called after each step. ``output_type``: "pil" is a list of
    pictures, "pt" a tensor (B, 3, H, W) in [0, 1], "np" an array (B, H, W, 3), "latent"
    the scaled latents.

    Raises ValueError or TypeError for what no model can draw.
    """

    prompt: Texts | None = None
    _: KW_ONLY
    prompt_2: Texts | None = None
    prompt_3: Texts | None = None
    negative_prompt: Texts | None = ""
    negative_prompt_2: Texts | None = None
    negative_prompt_3: Texts | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    num_images_per_prompt: int = 1
    seed: int | None = 0
    latents: Tensor | None = None
    prompt_embeds: Tensor | None = None
    pooled_prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    negative_pooled_prompt_embeds: Tensor | None = None
    max_sequence_length: int | None = None
    sampler: str = "euler"
    callback_on_step_end: Callback | None = None
    sigmas: Tensor | None = None
    guidance: Any = None
    control: Any = None
    output_type: str = "pil"

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))
        for name, limits in RANGES.items():
            value = getattr(self, name)
            if value is not None or name == "num_images_per_prompt":
                checks.check_range(name, value, *limits)
        for name, shape in SHAPES.items():
            checks.check_tensor(name, getattr(self, name), shape)
        checks.check_sigmas(self.sigmas)
        checks.check_choice("output_type", self.output_type, OUTPUTS)
        if self.guidance_scale is not None:
            checks.check_number("guidance_scale", self.guidance_scale)
        call = self.callback_on_step_end
        if not (call is None or callable(call)):
            found = f"callback_on_step_end is a {type(call).__name__}"
            raise TypeError(f"{found}; expected a function")
        for one in self.controls:
            if not callable(getattr(one, "begin", None)):
                found = f"control is a {type(one).__name__}"
                raise TypeError(f"{found}; expected a Control, or a list of them")
        for end in ("", "negative_"):
            self._check_embeds(end)
        _ = self.prompts, self.negatives  # refused here, if ever
        check_pictures(self.rows, self.num_images_per_prompt)

    def embeds(self, end: str = "") -> tuple[Tensor | None, Tensor | None]:
        """Context and pooled vectors of the prompts; ``end`` picks the negative."""
        names = f"{end}prompt_embeds", f"{end}pooled_prompt_embeds"
        return getattr(self, names[0]), getattr(self, names[1])

    def _check_embeds(self, end: str) -> None:
        context, pooled = self.embeds(end)
        name = f"{end}prompt_embeds"
        if (context is None) != (pooled is None):
            raise ValueError(f"one of {name} and {end}pooled_… is given; expected both")
        if context is None or pooled is None:
            return
        for text in (f"{end}prompt", f"{end}prompt_2", f"{end}prompt_3"):
            if getattr(self, text):
                raise ValueError(f"{name} and {text} are given; expected one of them")
        rows = self.rows if end else len(context)
        if len(context) != rows or len(pooled) != rows:
            found = f"{name} has {len(context)} rows, {end}pooled_… {len(pooled)}"
            raise ValueError(f"{found}; expected {rows}")

    @cached_property
    def prompts(self) -> list[Triple]:
        """What CLIP-L, CLIP-G and T5 read for each prompt; empty with embeddings."""
        if self.prompt_embeds is not None:
            return []
        return checks.as_prompts("prompt", self.prompt, self.prompt_2, self.prompt_3)

    @cached_property
    def negatives(self) -> list[Triple]:
        """The same of the negative prompts, one for each prompt."""
        if self.negative_prompt_embeds is not None:
            return []
        no = self.negative_prompt, self.negative_prompt_2, self.negative_prompt_3
        return checks.as_prompts("negative_prompt", *no, count=self.rows)

    @property
    def controls(self) -> tuple[Any, ...]:
        """What steers besides the words."""
        given = () if self.control is None else self.control
        return tuple(given) if isinstance(given, list | tuple) else (given,)

    @property
    def rows(self) -> int:
        """How many prompts there are."""
        given = self.prompt_embeds
        return len(self.prompts if given is None else given)

    @property
    def count(self) -> int:
        """How many pictures are asked for."""
        return self.rows * self.num_images_per_prompt

    @property
    def seeds(self) -> range:
        """The seed of each picture."""
        first = self.seed or 0
        return range(first, first + self.count)

    @property
    def steps(self) -> int | None:
        """How many steps are taken; None leaves them to the model."""
        return self.num_inference_steps if self.sigmas is None else len(self.sigmas) - 1

    @property
    def size(self) -> tuple[int, int]:
        """Once checked: height and width in pixels."""
        assert self.height and self.width
        return self.height, self.width

    @property
    def levels(self) -> int:
        """Once checked: noise levels times rows, two with guidance."""
        return (1 + self.guidance.negative) * ((self.steps or 0) + 1)

    def settings(self, index: int) -> dict[str, Any]:
        """Once checked: what picture ``index`` notes, by name; numbers and texts."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        given |= {"num_inference_steps": self.steps, "guidance": None}
        given |= self.guidance.settings
        given["control"] = "; ".join(map(str, self.controls)) or None
        given["seed"] = self.seeds[index] if self.latents is None else None
        row = index // self.num_images_per_prompt
        given |= {
            name: digest(given[name][index if name == "latents" else row])
            for name in SHAPES
            if given[name] is not None
        }
        return {
            name: as_text(value, row)
            for name, value in given.items()
            if name not in UNTOLD and value is not None
        }


def text_length(request: Request, pipe: Any, usual: int) -> int:
    """How many tokens of a request T5 reads, ``usual`` where it does not say.

    Raises ValueError for texts and embeddings that ``pipe`` cannot read; warns of what
    it should not be given.
    """
    if pipe.text_encoders[2] is None:
        for name in ("prompt_3", "negative_prompt_3"):
            if getattr(request, name):
                known = "expected a pipeline with T5, its reader"
                raise ValueError(f"{name} is given; {known}")
    first, given = pipe.tokenizers[0], request.prompt_embeds
    clip = first.model_max_length if first else CLIP_TOKENS
    length = request.max_sequence_length or usual
    if given is not None and request.max_sequence_length is None:
        length = max(1, given.shape[1] - clip)
    for end in ("", "negative_"):
        check_embeds(request, end, clip + length, pipe.transformer.config)
    if not request.guidance.negative and any(map(any, request.negatives)):
        what = "negative_prompt does nothing without guidance"
        checks.warn(f"{what} (guidance_scale above 1)")
    if request.guidance.negative and pipe.defaults.guidance_scale <= 1:
        checks.warn("this model was distilled to draw without guidance (a scale of 1)")
    if clip + length > LONG:
        found = f"the context has {clip + length} rows, {length} of them T5's"
        told = f"from about {LONG} on, published models draw broken edges"
        checks.warn(f"{found}; {told}")
    return length


def check_embeds(request: Request, end: str, length: int, config: Any) -> None:
    """Raise ValueError for embeddings that a transformer of ``config`` cannot read.

    Their context must have ``length`` rows (tokens).
    """
    shapes = (length, config.joint_attention_dim), (config.pooled_projection_dim,)
    for given, shape in zip(request.embeds(end), shapes, strict=True):
        if given is not None and given.shape[1:] != shape:
            found = f"{end}prompt_embeds have shape {tuple(given.shape)}"
            wanted = ", ".join(map(str, (len(given), *shape)))
            raise ValueError(f"{found}; expected ({wanted})")


def plain(value: Any) -> Any:
    """NumPy's numbers as Python's, all else as it is."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def as_text(value: Any, row: int = 0) -> Any:
    """Numbers and texts as they are; of a picture its file, of levels their list.

    Of one value for each prompt, that of ``row``; of what has no file a digest.
    """
    if isinstance(value, list | tuple):
        return as_text(value[row % len(value)], row) if value else ""
    if isinstance(value, str | int | float):
        return value
    if isinstance(value, Tensor) and value.ndim == 1:
        return ", ".join(f"{level:.6g}" for level in value.tolist())
    path = value if isinstance(value, PathLike) else getattr(value, "filename", "")
    return str(path) or digest(value)


def digest(value: Any) -> str:
    """By what a picture notes the numbers of a tensor, an array or a PIL picture."""
    if isinstance(value, Tensor):
        value = value.detach().float().cpu().numpy()
    return f"given, {sha256(value.tobytes()).hexdigest()[:8]}"


def takes(
    asked: Callable[Given, Asked],
) -> Callable[
    [Callable[[Owner, Asked], Drawn]], Callable[Concatenate[Owner, Given], Drawn]
]:
    """Let a method of one argument be called with those of which ``asked`` makes it."""

    def decorate(
        draw: Callable[[Owner, Asked], Drawn],
    ) -> Callable[Concatenate[Owner, Given], Drawn]:
        @wraps(draw)
        def call(owner: Owner, *args: Given.args, **named: Given.kwargs) -> Drawn:
            check_names(draw.__name__, named, known)
            return draw(owner, asked(*args, **named))

        own, known = signature(draw), signature(asked).parameters
        shown = next(iter(own.parameters.values())), *known.values()
        vars(call)["__signature__"] = own.replace(parameters=shown)
        return call

    return decorate


def check_names(taker: str, named: Any, known: Any) -> None:
    """Raise TypeError for the first argument that ``taker`` does not know."""
    if unknown := [name for name in named if name not in known]:
        hint = " (here it is seed, a whole number)" if unknown[0] == "generator" else ""
        found = f"{taker}() takes no argument {unknown[0]!r}{hint}"
        raise TypeError(f"{found}; expected {', '.join(known)}")


def noted(
    pictures: list[Any], about: dict[str, Any], request: Request, **more: Any
) -> list[Any]:
    """PIL pictures of a checked request, each with its settings as its ``info``.

    ``about`` is said of all. ``minidiff.files.pictures.save_picture`` writes them into
    a file.
    """
    for i, picture in enumerate(pictures):
        own = {name: as_text(value, i) for name, value in more.items()}
        size = {"width": picture.width, "height": picture.height}
        picture.info = about | request.settings(i) | own | size
    return pictures
