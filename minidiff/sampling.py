# %% [markdown]
r"""
# Sampling: from a prompt to a picture

In this chapter you build the **pipeline**: seven chapters, put together, turn words
into pictures.

After it you will be able to

- **assemble** tokenizers, encoders, transformer, solver and autoencoder by hand;
- **batch** and **precompute** what the naive loop does again and again;
- **watch** a picture appear, step by step;
- **compare** guidance scales, step counts and solvers, each with its score beside it;
- **set up** Stable Diffusion 3.5 Medium, Large and Large Turbo with the same lines.
"""

# %% [markdown]
# ## Where we are
#
# At the end of Part I. Every part exists: tokenizers (chapter 1), text encoders (2),
# the autoencoder (3), attention (4) inside the transformer (5), the flow and its
# solvers (6), and trained weights (7). What is left is to call them in the right order,
# with the right defaults, and to refuse early what cannot be drawn.
#
# On a first reading you may go from *Batch it, compute ahead* straight to *The pipeline
# equals the loop*: what lies between is the same once more, as a program needs it.

# %% tags=["hide-input"]
import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from minidiff.dit import MMDiT
from minidiff.files.layout import ENCODERS, MODELS, PUBLISHED, TOKENIZERS, recognize
from minidiff.files.pictures import to_pil
from minidiff.files.tokenizer_files import unknown_words
from minidiff.files.weights import save_folder
from minidiff.flow_matching import (
    ClassifierFree,
    Guidance,
    NoGuidance,
    Scheduler,
    dpmpp_2m,
    euler,
    guide,
    heun,
)
from minidiff.interface import checks
from minidiff.interface.request import (
    Callback,
    Request,
    noted,
    takes,
    text_length,
)
from minidiff.interface.terminal import Watch
from minidiff.text_encoders import CLIPTextEncoder, T5Encoder, assemble
from minidiff.tokenizer import CLIPTokenizer, T5Tokenizer
from minidiff.vae import VAE

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

# What a control says of a state and its level: what is added behind the blocks
Steers: TypeAlias = Callable[[Tensor, Tensor], Sequence[Tensor]]
Drawn: TypeAlias = "list[Image] | Tensor | np.ndarray"
SAMPLERS = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}


# %% tags=["active-ipynb", "hide-input"]
# import time
# from itertools import pairwise
#
# import minidiff
# from minidiff import viz
# from minidiff.classroom import journey
# from minidiff.files.weights import TINY, load_component
# from minidiff.classroom.exercises import check
# from minidiff.classroom.journey import PROMPT, SEED
# from minidiff.judging.exam import exam, share

# %% tags=["active-ipynb"]
# _ = torch.set_grad_enabled(False)
# viz.show_pipeline("sampling")

# %% [markdown]
# ## A picture of the whole
#
# The map shows the order; this table shows what travels. Between the tiny model and the
# large ones little but sizes differs: Medium's first blocks attend twice (chapter 5),
# the large ones shift their levels (chapter 6), and each has defaults of its own.
#
# | step | what comes out | Tiny, 64² | SD3.5, 1024² |
# |---|---|---|---|
# | tokenizers | ids, three rows | 32, 32, 32 | 77, 77, 256 |
# | text encoders | `context` | 64 × 192 | 333 × 4096 |
# | | `pooled` | 160 | 2048 |
# | seed | `latents`: noise | 16 × 16 × 16 | 16 × 128 × 128 |
# | transformer, N times | velocity | as the latents | as the latents |
# | solver | `latents`: data | as before | as before |
# | autoencoder | picture | 3 × 64 × 64 | 3 × 1024 × 1024 |
#
# ## The mathematics
#
# Write $E$ for the text encoders, $v_\theta$ for the transformer, $D$ for the decoder.
# The picture of a prompt $p_+$ with negative prompt $p_-$, seed $s$ and guidance $g$ is
#
# $$\text{picture} = D\Bigl(\tfrac{x_0}{\text{scale}} + \text{shift}\Bigr), \qquad
# x_0 = x_1 + \int_1^0 \bigl[v_- + g\,(v_+ - v_-)\bigr]\, d\sigma,$$
#
# $$x_1 = \text{noise}(s), \qquad
# v_\pm = v_\theta\bigl(x_\sigma, \sigma, E(p_\pm)\bigr).$$
#
# | symbol | variable | meaning | Tiny | SD3.5 |
# |---|---|---|---|---|
# | $p_+$, $p_-$ | `prompt`, `negative_prompt` | what to draw, what to avoid | | |
# | $s$ | `seed` | chooses the noise | 0 | 0 |
# | $g$ | `guidance_scale` | how much to exaggerate | 2.5 | 3.5 to 4.5; Turbo 1 |
# | $N$ | `num_inference_steps` | steps of the solver | 28 | 4 to 40 |
# | scale, shift | `vae.config` | of chapter 3 | measured | 1.5305, 0.0609 |
#
# ## Build it by hand
#
# First without any pipeline. Each part is loaded into the class of its own chapter.

# %% tags=["active-ipynb"]
# from minidiff.dit import MMDiTConfig
# from minidiff.text_encoders import CLIPTextConfig, T5Config
# from minidiff.vae import VAEConfig
#
# load_tokens = lambda cls, name: cls.from_pretrained(TINY / name)
# tokenizers = [load_tokens(CLIPTokenizer, n) for n in ("tokenizer", "tokenizer_2")]
# tokenizers.append(load_tokens(T5Tokenizer, "tokenizer_3"))
# ids = [tokenize([PROMPT]) for tokenize in tokenizers]
# print([tuple(x.shape) for x in ids])

# %% tags=["active-ipynb"]
# kinds = [(CLIPTextEncoder, CLIPTextConfig)] * 2 + [(T5Encoder, T5Config)]
# folders = ("text_encoder", "text_encoder_2", "text_encoder_3")
# encoders = [load_component(*k, TINY / f) for k, f in zip(kinds, folders)]
# transformer = load_component(MMDiT, MMDiTConfig, TINY / "transformer")
# vae = load_component(VAE, VAEConfig, TINY / "vae")

# %% [markdown]
# Words to numbers, for the prompt and for the empty prompt:

# %% tags=["active-ipynb"]
# def encode(text: str) -> tuple[Tensor, Tensor]:
#     l, g, t5 = [f(t([text])) for f, t in zip(encoders, tokenizers)]
#     return assemble(l[0], g[0], t5), torch.cat([l[1], g[1]], dim=-1)
#
# positive, negative = encode(PROMPT), encode("")
# print(journey.meets("context", positive[0]))
# print(journey.meets("pooled", positive[1]))

# %% [markdown]
# ### Noise: one seed, one picture
#
# Every picture gets a random generator of its own: picture $i$ of a call uses seed
# $s + i$. Drawn in one batch or one by one, a picture then starts from the same noise.
# The numbers are drawn on the CPU, because the generators of different devices give
# different numbers for the same seed.


# %%
def starting_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Gaussian noise of ``shape`` (C, h, w) for every seed: (B, C, h, w), float32.

    Drawn on the CPU, so that a seed means the same noise on every device.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = [torch.randn(*shape, generator=g) for g in generators]
    return torch.stack(noise)  # B × (C, h, w) → (B, C, h, w)


# %% [markdown]
# ### The naive loop
#
# For every step, ask the transformer twice, guide, and take Euler's step.


# %%
def denoise_naively(
    transformer: MMDiT,
    x: Tensor,
    negative: tuple[Tensor, Tensor],
    positive: tuple[Tensor, Tensor],
    sigmas: Tensor,
    scale: float,
) -> Tensor:
    """One picture (1, C, h, w), one prompt at a time, nothing computed ahead."""
    for i in range(len(sigmas) - 1):
        level = sigmas[i : i + 1]  # (1,)
        v_neg = transformer(x, level, *negative)
        v_pos = transformer(x, level, *positive)
        x = x + (sigmas[i + 1] - sigmas[i]) * guide(v_neg, v_pos, scale)
    return x


# %% tags=["active-ipynb"]
# shipped = minidiff.load("tiny")
# steps, scale = shipped.defaults
# sigmas = shipped.scheduler.sigmas(steps)
# noise = starting_noise([SEED], (16, 16, 16))
# naive = denoise_naively(transformer, noise, negative, positive, sigmas, scale)
# print(journey.meets("noise", noise))
# print(journey.meets("latents", naive))

# %% [markdown]
# That is the latent which chapter 6 handed on. The last step is chapter 3's: undo scale
# and shift, decode, and move the values from [−1, 1] to [0, 1].

# %% tags=["active-ipynb"]
# picture = (vae.decode(vae.unscale(naive)) / 2 + 0.5).clamp(0, 1)
# viz.show_images(picture, [PROMPT], low=0)

# %% [markdown]
# Words have become a picture, by code that you have seen line by line.
#
# ## Batch it, compute ahead
#
# The naive loop repeats work.
#
# - The two prompts go through the same weights: put them into one batch. The empty
#   prompt's text is also the same for all pictures, so every distinct text is encoded
#   once.
# - The modulations of all blocks depend on $\sigma$ and the pooled text, and on nothing
#   else. All levels are known before the loop, so all modulations can be computed at
#   once. In Medium and Large their weights are about a third of the transformer; once
#   computed, those weights could leave the GPU. (Chapter 5 made `forward` accept them
#   for this reason.)

# %% tags=["active-ipynb"]
# context, pooled = (torch.cat(pair) for pair in zip(negative, positive))
# ahead = transformer.modulations(sigmas[:-1, None], pooled)
# x = noise
# for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
#     twice = x.repeat(2, 1, 1, 1)
#     v = transformer(twice, None, context, None, modulations=ahead.step(i))
#     x = x + (sigma_next - sigma) * guide(*v.chunk(2), scale)
# print("batched and naive agree:", torch.allclose(x, naive, atol=1e-3))

# %% tags=["active-ipynb", "nbval-ignore-output"]
# begun = time.perf_counter()
# denoise_naively(transformer, noise, negative, positive, sigmas, scale)
# naively, begun = time.perf_counter() - begun, time.perf_counter()
# shipped.denoise(noise, context, pooled)
# print(f"naive {naively:.2f} s, batched {time.perf_counter() - begun:.2f} s")

# %% [markdown]
# One run of each, and the second is the package's own, which also has the quicker
# blocks of chapter 12: the difference is not the batch's alone.
#
# ## The pipeline
#
# Now the form that the package exports. First, how each model wants to be drawn from.
# Large Turbo is *distilled*: trained further, with a guided model as its teacher, until
# four steps without guidance look like the teacher's many.


# %%
class Defaults(NamedTuple):
    """How a model is meant to be drawn from; guidance ≤ 1 means none."""

    num_inference_steps: int
    guidance_scale: float


DEFAULTS = {
    name: Defaults(model.num_inference_steps, model.guidance_scale)
    for name, model in PUBLISHED.items()
}
OTHERS = Defaults(28, 7.0)  # what diffusers takes where nothing is said


# %% [markdown]
# A model is recognised by its configuration: Medium's first blocks have a second
# attention, Large's do not. Large and Large Turbo have one and the same configuration,
# so there the hub's name decides; folders that we save remember it. A scheduler may
# have the last word: that of chapter 9 knows what suits its model.
#
# A pipeline holds the parts. What may be set on it is declared at the top, and any
# other name is refused: a wrong one would do nothing, and tell nobody.


# %%
class Parts:
    """What a pipeline is made of, and what may be set on it."""

    tokenizers: tuple[Any, ...]
    text_encoders: tuple[Any, ...]
    transformer: MMDiT
    vae: VAE
    scheduler: Scheduler
    _own_scheduler: Scheduler  # the model's, whichever is set
    name: str  # of the published model that it is, or "sd3"
    defaults: Defaults
    settings: dict[str, Any]  # the model's name, and how it was loaded
    progress: bool | str = True  # a bar on a terminal
    plan: Any = None  # set by the engine: how the weights are placed,
    room: float = math.inf  # how many bytes of a budget are left beside them,
    adapters: Any = ()  # and which LoRAs act: chapter 10
    words: frozenset[str] = frozenset()  # that a small model has seen
    _interrupt: bool = False  # set by a callback, it ends the drawing

    def __setattr__(self, name: str, value: Any) -> None:
        checks.check_attribute(self, name)
        super().__setattr__(name, value)

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return self.transformer.x_embedder.proj.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """In what the transformer computes."""
        return self.transformer.x_embedder.proj.weight.dtype

    @property
    def about(self) -> dict[str, Any]:
        """What every picture notes."""
        told = self.settings | {"dtype": str(self.dtype).removeprefix("torch.")}
        if self.scheduler != self._own_scheduler:
            told["shift"] = self.scheduler.shift
        return told | getattr(self.transformer, "settings", {})  # chapter 12's cache

    @property
    def max_sequence_length(self) -> int:
        """T5 tokens of a prompt unless told otherwise: 256, or as many as T5 takes."""
        t5 = self.tokenizers[2]
        return min(256, t5.model_max_length) if t5 else 256


# %% [markdown]
# Three steps do the work, each usable alone. You have just taken them by hand; as
# functions they take the parts first. *Words to numbers*: three tokenizers, three
# encoders, one context.


# %%
@torch.no_grad()
def encode_texts(
    pipe: Parts,
    prompt: str | Sequence[str | tuple[str, str, str]],
    max_sequence_length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """What the transformer reads: context (B, L, D) and pooled (B, P).

    A prompt is one text, or three: for CLIP-L, CLIP-G and T5. L counts CLIP's tokens
    and then T5's; without T5 its rows are zeros. Warns of what is cut off, and of
    words that a small model has never seen.
    """
    texts = checks.for_encoders(prompt)
    lengths = [pipe.tokenizers[0].model_max_length] * 2
    lengths.append(max_sequence_length or pipe.max_sequence_length)
    checks.warn_of_cuts(pipe, texts, lengths)
    if line := unknown_words(sum(texts, []), pipe.words):
        checks.warn(line)
    read = partial(read_by_all, pipe, texts, lengths)
    context, pooled = read()
    models = dict(zip(ENCODERS, pipe.text_encoders, strict=True))
    checks.warn_of_overflow("the prompt's encoding", context, read, **models)
    return context, pooled


def read_by_all(
    pipe: Parts, texts: Sequence[Sequence[str]], lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """What the three encoders say of their texts: context (B, L, D), pooled (B, P)."""
    clips = []
    for i in range(2):
        ids = pipe.tokenizers[i](texts[i], max_length=lengths[i])  # (B, L)
        clips.append(pipe.text_encoders[i](ids.to(pipe.device)))
    hidden, pooled = zip(*clips, strict=True)
    context = assemble(hidden[0], hidden[1], encode_t5(pipe, texts[2], lengths[2]))
    return context.to(pipe.dtype), torch.cat(pooled, dim=-1).to(pipe.dtype)


def encode_t5(pipe: Parts, texts: Sequence[str], length: int) -> Tensor:
    """T5's states (B, L, D); zeros where the pipeline goes without T5."""
    tokenize, t5 = pipe.tokenizers[2], pipe.text_encoders[2]
    if tokenize is None or t5 is None:
        size = len(texts), length, pipe.transformer.config.joint_attention_dim
        return torch.zeros(size, device=pipe.device, dtype=pipe.dtype)
    return t5(tokenize(texts, max_length=length).to(pipe.device))


# %% [markdown]
# *Noise to latents*: what the solver follows is the transformer, with all computed
# ahead that does not depend on $x$. Guidance is an object of chapter 6; it makes of
# this velocity the guided one. The state of the solver stays in float32, whatever the
# weights compute in.


# %%
@torch.no_grad()
def velocity_of(
    pipe: Parts,
    context: Tensor,
    pooled: Tensor,
    sigmas: Tensor,
    controls: Sequence[Steers] = (),
) -> Callable[..., Tensor]:
    """The transformer as a function ``v(x, sigma, skip_layers=())``.

    ``sigma`` is one of ``sigmas``, for which all modulations are computed here. A state
    ``x`` of fewer rows than the text is asked with the last of the text: with guidance
    the negative prompts come first, then the prompts. Blocks in ``skip_layers`` are
    left out.
    """
    context, pooled = (x.to(pipe.device, pipe.dtype) for x in (context, pooled))
    levels = {sigma: i for i, sigma in enumerate(sigmas.tolist())}
    times = pipe.scheduler.told(sigmas)[:, None].to(pipe.device)  # (S,) → (S, 1)
    modulations = pipe.transformer.modulations(times, pooled)

    @torch.no_grad()
    def ask(x: Tensor, sigma: Tensor, skip_layers: Sequence[int] = ()) -> Tensor:
        now = modulations.step(levels[sigma.item()]).last(len(x))
        how: dict[str, Any] = {"modulations": now, "skip_layers": skip_layers}
        text, x = context[-len(x) :], x.to(pipe.dtype)
        how["controls"] = summed([said(x, sigma) for said in controls])
        return pipe.transformer(x, None, text, None, **how).float()

    return ask


def summed(said: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """What several controls say, added up block by block; one may say nothing."""
    found = []
    for column in zip_longest(*said):
        first, *others = [u for u in column if u is not None]
        found.append(sum(others, first))
    return found


def choose_guidance(
    pipe: Parts, scale: float | None = None, guidance: Guidance | None = None
) -> Guidance:
    """``guidance``, or else the classifier-free one of ``scale``; none for ≤ 1.

    Without either it is the model's own. Raises ValueError for both.
    """
    if guidance is None:
        scale = checks.given(scale, pipe.defaults.guidance_scale)
        checks.check_number("guidance_scale", scale)
        return ClassifierFree(scale) if scale > 1 else NoGuidance()
    if not isinstance(guidance, Guidance):
        known = "an object of chapter 6, such as ClassifierFree(4.5)"
        raise ValueError(f"guidance is {guidance!r}; expected {known}")
    if scale is not None:
        found = f"guidance_scale is {scale} and guidance {guidance}"
        raise ValueError(f"{found}; expected one of the two")
    return guidance


# %%
@torch.no_grad()
def solve(
    pipe: Parts,
    latents: Tensor,
    context: Tensor,
    pooled: Tensor,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    sampler: str = "euler",
    callback_on_step_end: Callback | None = None,
    sigmas: Tensor | None = None,
    guidance: Guidance | None = None,
    controls: Sequence[Any] = (),
) -> Tensor:
    """Noise ``latents`` (B, C, h, w) to data, scaled latents of the same shape.

    ``context`` (B, L, D) and ``pooled`` (B, P); with guidance twice as many rows, the
    negative prompts first. ``callback_on_step_end(pipe, step, timestep, {"latents": …,
    "denoised": x̂₀})`` may return {"latents": …} to replace them, or raise StopIteration
    to end here. ``sigmas`` replaces the schedule, and ``guidance`` the one that
    ``guidance_scale`` stands for. ``controls`` are those of chapter 11.
    """
    checks.check_choice("sampler", sampler, pipe.scheduler.solvers)
    checks.check_sigmas(sigmas)
    steps = checks.given(num_inference_steps, pipe.defaults.num_inference_steps)
    sigmas = checks.given(sigmas, pipe.scheduler.sigmas(steps))
    guidance = choose_guidance(pipe, guidance_scale, guidance)
    begun = [one.begin(pipe, latents, pooled, sigmas) for one in controls]
    solver = SAMPLERS[sampler]
    start, pipe._interrupt = latents.to(pipe.device, torch.float32), False

    def follow() -> Callable[..., Tensor]:
        return guidance(velocity_of(pipe, context, pooled, sigmas, begun), sigmas)

    again = lambda: solver(follow(), start, sigmas)  # noqa: E731
    nets = {f"control_{i}": getattr(c, "net", None) for i, c in enumerate(controls)}
    models = {"transformer": pipe.transformer} | nets
    with Watch(pipe, start, sigmas, callback_on_step_end, again, models) as watch:
        watch.latents = solver(follow(), start, sigmas, watch)
    watch.check("the drawing", watch.latents)
    return watch.latents


# %% [markdown]
# *Latents to pictures*:


# %%
@torch.no_grad()
def pictures_of(pipe: Parts, latents: Tensor) -> Tensor:
    """Scaled latents (B, C, h, w) → pictures (B, 3, H, W) in [0, 1]."""
    latents = pipe.vae.unscale(latents).to(pipe.device, pipe.dtype)
    pictures = pipe.vae.decode(latents).float()
    again = partial(pipe.vae.decode, latents)
    checks.warn_of_overflow("the picture", pictures, again, vae=pipe.vae)
    return (pictures / 2 + 0.5).clamp(0, 1)


# %% [markdown]
# What is to be drawn comes as one `Request` of `minidiff.interface`. It holds all that
# a call is given and has checked itself: texts that are texts, steps from 1 to 1000.
# What hangs on the model is settled here, before any work begins: a wrong size costs a
# line, not a minute.


# %%
def settle(pipe: Parts, request: Request) -> Request:
    """``request`` with the model's own settings where it leaves the choice.

    Raises ValueError for what this model cannot draw, or its memory not hold.
    """
    checks.check_choice("sampler", request.sampler, pipe.scheduler.solvers)
    checks.check_dtypes(pipe.transformer, pipe.vae)
    guidance = choose_guidance(pipe, request.guidance_scale, request.guidance)
    guidance.check(pipe)
    height, width = sides(pipe, request)
    request = replace(
        request,
        num_inference_steps=request.steps or pipe.defaults.num_inference_steps,
        guidance_scale=None,
        guidance=guidance,
        height=height,
        width=width,
        seed=secrets.randbelow(2**32) if request.seed is None else request.seed,
    )
    if request.sigmas is None:
        pipe.scheduler.sigmas(request.steps or 1)  # refuses what it cannot make
    length = text_length(request, pipe, pipe.max_sequence_length)
    request = replace(request, max_sequence_length=length)
    size = latents_size(pipe, request)
    if request.latents is not None and request.latents.shape != size:
        found = tuple(request.latents.shape)
        raise ValueError(f"latents have shape {found}; expected {size}")
    for control in request.controls:
        control.check(pipe, request)
    if pipe.plan:
        pipe.plan.check_room(pipe, size, request.levels, request.controls)
    return request


def sides(pipe: Parts, request: Request) -> list[int]:
    """Height and width in pixels; ValueError for a size that the model cannot make."""
    config, factor = pipe.transformer.config, pipe.vae.config.factor
    given = request.latents
    own = [config.sample_size] * 2 if given is None else given.shape[2:]
    asked = {"height": request.height, "width": request.width}
    grid, found = factor * config.patch_size, []
    for (name, side), n in zip(asked.items(), own, strict=True):
        found.append(checks.given(side, n * factor))
        checks.check_size(name, found[-1], grid, config.pos_embed_max_size * grid)
    return found


def latents_size(pipe: Parts, request: Request) -> tuple[int, int, int, int]:
    """(B, C, h, w) of a checked request's latents."""
    height, width = (side // pipe.vae.config.factor for side in request.size)
    return request.count, pipe.transformer.config.in_channels, height, width


# %% [markdown]
# The whole: read, denoise, decode.


# %%
@torch.no_grad()
def run(pipe: "Pipeline", request: Request) -> Drawn:
    """The pictures of a request that ``check`` has returned."""
    start = noise_of(pipe, request) if request.latents is None else request.latents
    latents = pipe.denoise(
        start,
        *read_texts(pipe, request),
        num_inference_steps=request.num_inference_steps,
        sampler=request.sampler,
        callback_on_step_end=request.callback_on_step_end,
        sigmas=request.sigmas,
        guidance=request.guidance,
        controls=request.controls,
    )
    if request.output_type == "latent":
        return latents
    pictures = pipe.decode(latents)
    if request.output_type == "pt":
        return pictures
    if request.output_type == "np":
        pictures = pictures.permute(0, 2, 3, 1)  # (B, 3, H, W) → (B, H, W, 3)
        return pictures.cpu().numpy()
    return noted(to_pil(pictures), pipe.about, request)


def noise_of(pipe: Parts, request: Request) -> Tensor:
    """The noise (B, C, h, w) of a checked request's seeds."""
    return starting_noise(request.seeds, latents_size(pipe, request)[1:])


def read_texts(pipe: "Pipeline", request: Request) -> tuple[Tensor, Tensor]:
    """Context (B, L, D) and pooled (B, P) of each picture, the negative ones before."""
    asked = [(request.prompts, request.embeds())]
    if request.guidance.negative:
        asked.insert(0, (request.negatives, request.embeds("negative_")))
    unique = list(dict.fromkeys(text for texts, _ in asked for text in texts))
    found = pipe.encode_prompt(unique, request.max_sequence_length) if unique else ()
    parts = []
    for texts, embeds in asked:
        rows = [unique.index(text) for text in texts]
        parts.append([x[rows] for x in found] if texts else embeds)
    context, pooled = (
        torch.cat([x.to(pipe.device, pipe.dtype) for x in both])
        for both in zip(*parts, strict=True)
    )
    n = request.num_images_per_prompt
    context = context.repeat_interleave(n, dim=0)  # (R, L, D) → (B, L, D)
    pooled = pooled.repeat_interleave(n, dim=0)  # (R, P) → (B, P)
    return context, pooled


# %% [markdown]
# The class puts the functions under the names that diffusers gave them.


# %%
class Pipeline(Parts):
    """A text-to-picture pipeline of the SD3 family, made of the chapters' parts.

    ``tokenizers`` and ``text_encoders``: CLIP-L, CLIP-G and T5 (None where the model
    goes without T5). ``name`` chooses the defaults where the configuration does not
    tell (Large and Large Turbo). It makes one call at a time: threads that share a
    pipeline need a lock.
    """

    def __init__(
        self,
        tokenizers: Sequence[CLIPTokenizer | T5Tokenizer | None],
        text_encoders: Sequence[CLIPTextEncoder | T5Encoder | None],
        transformer: MMDiT,
        vae: VAE,
        scheduler: Scheduler,
        name: str = "",
    ) -> None:
        self.tokenizers, self.text_encoders = tuple(tokenizers), tuple(text_encoders)
        self.transformer, self.vae = transformer, vae
        self.scheduler = self._own_scheduler = scheduler
        known = recognize(transformer.config, name)
        self.name = known.name if known else "sd3"
        usual = scheduler.usual
        self.defaults = Defaults(*usual) if usual else DEFAULTS.get(self.name, OTHERS)
        self.settings = {"model": name or self.name}
        checks.check_parts(self.text_encoders, transformer, vae)

    encode_prompt, velocity, guidance = encode_texts, velocity_of, choose_guidance
    denoise, decode = solve, pictures_of
    check, draw = settle, run

    @takes(Request)
    def __call__(self, request: Request) -> Drawn:
        """Draw the pictures that a ``Request`` of these arguments asks for."""
        return self.draw(self.check(request))

    def prepare_latents(
        self,
        count: int,
        height: int | None = None,
        width: int | None = None,
        seed: int | None = 0,
    ) -> Tensor:
        """The noise (count, C, h, w) from which a call with ``seed`` starts."""
        request = Request(
            "", height=height, width=width, num_images_per_prompt=count, seed=seed
        )
        return noise_of(self, self.check(request))

    def save_pretrained(
        self, folder: Path | str, dtype: torch.dtype | None = None
    ) -> None:
        """Write a folder in the hub's diffusers layout, in ``dtype`` (None: as is)."""
        parts = *self.text_encoders, self.transformer, self.vae
        models = dict(zip(MODELS, parts, strict=True))
        tokenizers = dict(zip(TOKENIZERS, self.tokenizers, strict=True))
        given = self.scheduler, self.name, dtype
        save_folder(Path(folder), models, tokenizers, *given)


# %% [markdown]
# Four details deserve a second look.
#
# - *Texts are encoded once.* `dict.fromkeys` drops the doubles and keeps the order; the
#   list `rows` then picks the row of each text, and `repeat_interleave` gives it to
#   every picture of its prompt. Eight pictures of one prompt cost two encodings, not
#   sixteen.
# - *The solver does not know steps, only levels.* `velocity_of` therefore keeps a
#   dictionary from level to position, and finds the modulations that belong to the
#   level it is asked for. Heun asks for levels of the same list, so it needs no more.
# - *The length of the context is a choice.* T5 pads or cuts to `max_sequence_length`,
#   256 for SD3.5, and the padding is read like words. Another length gives a slightly
#   different picture; to repeat a picture, repeat the length.
# - *A solver's callback does the rest.* `Watch` moves the progress bar, calls
#   your own callback, and keeps the latents if yours ends the drawing early.
#   `noted` then writes what was asked for into each picture's `info`.
#
# ### Loading
#
# One function for every model of the family, however it is stored: `minidiff.load`. All
# files are checked before the first weight is read; what the checks are, and where the
# weights then go, is not a matter of this chapter and stands in `minidiff.engine`.

# %% [markdown]
# ## The pipeline equals the loop
#
# By hand, in steps, and in one call:

# %% tags=["active-ipynb"]
# pipe = Pipeline(tokenizers, encoders, transformer, vae, shipped.scheduler)
# context, pooled = pipe.encode_prompt(["", PROMPT])
# steps = pipe.denoise(pipe.prepare_latents(1, seed=SEED), context, pooled)
# called = pipe(PROMPT, seed=SEED, output_type="latent")
# print("naive and in steps agree:", torch.allclose(naive, steps, atol=1e-3))
# print("in steps and called agree:", torch.allclose(steps, called, atol=1e-3))
# pipe = shipped
# loaded = pipe(PROMPT, seed=SEED, output_type="latent")
# print("called and loaded agree:", torch.allclose(called, loaded, atol=1e-3))

# %% [markdown]
# From here on we draw with what `minidiff.load` gives: the same pipeline, whose blocks
# have a faster form on a CPU ([chapter 12](12_efficiency.ipynb)). And what it refuses:

# %% tags=["active-ipynb"]
# for wrong in ({"height": 50}, {"num_inference_steps": 0}, {"sampler": "ddim"}):
#     try:
#         pipe(PROMPT, **wrong)
#     except ValueError as error:
#         print(error)

# %% [markdown]
# ## Look at it
#
# A callback sees every step: the state and the estimate $\hat x_0$. The frames show
# both, and the picture that the decoder makes of the estimate. Latents have sixteen
# channels and a screen three colours: the figure takes the three directions in which
# the last latent varies most, so that a colour there means “alike”, and nothing else.
# Press the prompt: on the book's page the small model draws in place of the frames, and
# a slider walks its steps. (In JupyterLab `viz.live(pipe, PROMPT)` opens the same.)

# %% tags=["active-ipynb"]
# track = []
#
# def keep(pipe: Pipeline, step: int, time: Tensor, tensors: dict) -> None:
#     track.append((time / 1000, tensors["latents"][0], tensors["denoised"][0]))
#
# final = pipe(PROMPT, seed=SEED, callback_on_step_end=keep, output_type="pt")
# times, states, guesses = map(torch.stack, zip(*track))

# %% tags=["active-ipynb", "nbval-ignore-output"]
# pictures = pipe.decode(guesses) * 2 - 1
# viz.live_denoising(states, guesses, pictures, times, PROMPT)

# %% [markdown]
# In which order do things settle? We ask four prompts, and compare each step's
# estimate with the end: its ground (the colour of the border), its outline (the pixels
# that are not ground; the overlap of two such sets is their intersection over their
# union), and its texture (what is left of the picture after a blur).

# %% tags=["active-ipynb", "hide-input"]
# prompts, grade = exam(4)
# track = []
# keep = lambda pipe, step, level, tensors: track.append(tensors["denoised"])
# pipe(prompts, callback_on_step_end=keep, output_type="latent")
# frames = torch.stack([pipe.decode(guess) for guess in track])  # (S, 4, 3, H, W)
#
# def parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
#     """Ground (…, 3), mask (…, H, W) and texture (…, 3, H, W) of pictures."""
#     ground = torch.cat([x[..., 0, :], x[..., -1, :]], dim=-1).median(-1).values
#     mask = (x - ground[..., None, None]).abs().amax(-3) > 0.15
#     blurred = torch.nn.functional.avg_pool2d(x.flatten(0, -4), 3, 1, 1).view_as(x)
#     return ground, mask, x - blurred
#
# def overlap(a: Tensor, b: Tensor) -> Tensor:
#     """Intersection over union of masks (…, H, W)."""
#     return (a & b).sum((-2, -1)) / (a | b).sum((-2, -1)).clamp(min=1)

# %% tags=["active-ipynb"]
# ground, mask, texture = parts(frames)
# settled = {
#     "ground": 1 - (ground - ground[-1]).abs().amax(-1).mean(1),
#     "outline": overlap(mask, mask[-1]).mean(1),
#     "texture": torch.nn.functional.cosine_similarity(
#         texture.flatten(2), texture[-1:].flatten(2), dim=-1).mean(1),
# }
# viz.show_curves(settled, "step", "likeness to the last estimate").captioned(
#     "How much of the end is there after each step; the mean of four prompts.")

# %% tags=["active-ipynb", "nbval-ignore-output"]
# for name, curve in settled.items():
#     print(f"{name:8} nine tenths there at step {int((curve >= 0.9).nonzero()[0])}")

# %% [markdown]
# The three measures differ in kind, so compare each with its own beginning in the
# figure. The ground settles first: its curve is flat where those of outline and texture
# still climb. Where all three curves lie near 1, the estimate stands, and more steps
# there buy little.

# %% [markdown]
# ### Prompts
#
# How often does it draw what was asked? A small network, the *judge*, reads pictures:
# it was trained on real scenes only, never on drawn ones. `exam` gives prompts and
# grades pictures by it, here 24 with one thing and 24 with two, garments among them.
# (It is no oracle: of 500 real scenes it finds all right with everyday things, one or
# two of them, but 87 % with one garment and 73 % with two, [as
# measured](../book/training_log.md).) The brackets say where the share of very many
# prompts would lie, 19 times of 20.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# drawn = {}
# for kind, two_things in (("one thing", False), ("two things", True)):
#     prompts, grade = exam(24, two=two_things)
#     drawn[kind] = pipe(prompts, num_inference_steps=8, output_type="pt")
#     right = grade(drawn[kind] * 2 - 1)
#     names = ("things", "colors", "all")
#     print(f"{kind}:", *(f"{name} {share(right[name])};" for name in names))
#     titles = prompts[:8] if kind == "one thing" else titles

# %% tags=["active-ipynb"]
# viz.show_images(drawn["one thing"][:8], titles, columns=4, low=0).captioned(
#     "The first eight prompts with one thing.")

# %% [markdown]
# ### Guidance
#
# One row for each guidance scale, the same eight seeds in each. The first row is the
# model without guidance.

# %% tags=["active-ipynb"]
# scales, how = (1.0, 2.0, 4.0, 8.0), {"num_inference_steps": 6, "output_type": "pt"}
# same = {"prompt": PROMPT, "num_images_per_prompt": 8} | how
# eight = {g: pipe(**same, guidance_scale=g) for g in scales}
# viz.show_images(torch.cat(list(eight.values())), columns=8, low=0).captioned(
#     "Rows: guidance 1, 2, 4 and 8; the same eight seeds in each.")

# %% tags=["active-ipynb", "nbval-ignore-output"]
# prompts, grade = exam(16)
# for g in scales:
#     many = pipe(prompts, guidance_scale=g, **how)
#     alike = eight[g].std(0).mean()
#     loud = ((many == 0) | (many == 1)).float().mean()
#     right = share(grade(many * 2 - 1)["all"])
#     print(f"g = {g:g}: right {right}; values at their limit {loud:.0%}; "
#         f"spread of 8 seeds {alike:.3f}")

# %% [markdown]
# The last column, of one prompt only, says how unlike its eight pictures are; the
# middle one counts values at their limits, and there are more of them at each larger
# scale. Whether it draws *more rightly* is the first column's matter; sixteen prompts
# tell a large step from a small one, and no more than their brackets do. Here the
# bracket of the largest scale lies below all others. In the figure's last row the
# dresses are ragged and blotched.

# %% [markdown]
# ### Steps
#
# One row for each solver, from one step to sixteen.

# %% tags=["active-ipynb"]
# counts = (1, 2, 4, 8, 16)
# how = {"prompt": PROMPT, "output_type": "pt"}
# one = lambda n, name: pipe(**how, num_inference_steps=n, sampler=name)
# grid = torch.cat([one(n, name) for name in SAMPLERS for n in counts])
# titles = [f"{name}, {n}" for name in SAMPLERS for n in counts]
# viz.show_images(grid, titles, columns=5, low=0)

# %% [markdown]
# With one step all three draw the same picture, because a step to $\sigma = 0$ is
# Euler's in each of them; and it is the average of what the prompt allows, exaggerated
# by guidance, as chapter 6 predicted. Two steps visit 1, 0.001 and 0. Heun then asks
# for the velocity at 0.001 of a picture more blurred than training ever showed at this
# level, and averages in the answer to a question that was never taught. With four steps
# DPM++ 2M goes astray. Its last step but one falls from a third to a thousandth: in
# $\ln\sigma$ eight times as far as the step before, and the line through the last two
# estimates is drawn across all of it (chapter 6).
#
# Heun asks twice a step, so compare at equal *work*. The error is the distance from a
# drawing in 20 steps of Heun, as a share of it, and its interval is over four prompts.
# The last rows have other levels, moved by shift 3.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# prompts, _ = exam(4)
# latents = lambda n, name, **how: pipe(prompts, num_inference_steps=n, sampler=name,
#     output_type="latent", **how)
# fine = latents(20, "heun")
# shifted = Scheduler(shift=3.0)
# rows = [("euler", 10, {}), ("heun", 5, {}), ("dpmpp_2m", 10, {}), ("euler", 20, {})]
# rows += [(name, 10, {"sigmas": shifted.sigmas(10)}) for name in ("euler", "dpmpp_2m")]
# for name, n, how in rows:
#     error = (latents(n, name, **how) - fine).flatten(1).norm(dim=1)
#     error = error / fine.flatten(1).norm(dim=1)
#     half = 3.18 * error.std() / 4**0.5  # Student's t, four prompts
#     calls = 2 * n - 1 if name == "heun" else n
#     where = "shift 3" if how else "its own levels"
#     measured = f"error {error.mean():.3f} ± {half:.3f}"
#     print(f"{name:9} {calls:2} calls, {where:14} {measured}")

# %% [markdown]
# Two lessons. Besides the number of steps it matters which levels they visit: with
# DPM++ 2M the moved ones give the larger error, and the two intervals lie apart. Where
# intervals overlap, four prompts settle nothing: so with Euler on the two lists, and
# with the three solvers at equal work on their own levels. And a small error is not the
# aim; a picture that shows what was asked is.

# %% [markdown]
# ## Predict, then break it
#
# **One.** Keep the seed and change the words. What stays the same in the picture: the
# place of the garment, its size, nothing?

# %% tags=["active-ipynb", "hide-output"]
# pairs = [("red dress", "blue"), ("purple dress", "blue"), ("red dress", "white")]
# pairs += [("red coat", "blue"), ("red bag", "blue")]
# prompts = [f"a {thing} on a {ground} background" for thing, ground in pairs]
# how = {"num_images_per_prompt": 8, "num_inference_steps": 6, "output_type": "pt"}
# changed = pipe(prompts, seed=0, **how)  # (40, 3, 64, 64), eight seeds a prompt
# viz.show_images(changed[::8], [f"{a}, {b}" for a, b in pairs], columns=5, low=0)

# %% tags=["active-ipynb", "hide-output", "nbval-ignore-output"]
# first, *others = parts(changed)[1].unflatten(0, (5, 8))  # outlines (8, 64, 64) each
# for name, other in zip(pairs[1:], others, strict=True):
#     same, apart = (overlap(x, other) for x in (first, first.roll(1, 0)))  # (8,)
#     more = same - apart
#     half = 2.36 * more.std() / 8**0.5  # Student's t, eight seeds
#     print(f"{', '.join(name):18} outlines overlap by {same.mean():.2f}, of different "
#         f"noise by {apart.mean():.2f}: {more.mean():+.2f} ± {half:.2f}")

# %% [markdown]
# Each line compares eight pictures with eight of “red dress, blue”: those from the same
# noise, then those from different noise. How much a dress is like a bag is in both
# numbers. Their difference alone is what the noise has kept of the outline; where its
# interval holds zero, nothing was seen of it. Three lines hold zero, and that of the
# white ground is at its edge: if the noise keeps anything, it is a few hundredths.

# %% [markdown]
# **Two.** Take T5 away: its rows of the context become zeros, as in SD3.5 when T5 is
# left out to save memory. What suffers first, the colour, the garment, or the order of
# two garments?

# %% tags=["active-ipynb", "hide-output"]
# two = "a red bag left of a yellow coat on a white background"
# bare = Pipeline([*tokenizers[:2], None], [*encoders[:2], None], transformer, vae,
#     shipped.scheduler)
# how = {"num_images_per_prompt": 4, "num_inference_steps": 14, "output_type": "pt"}
# how |= {"max_sequence_length": 32}
# pair = torch.cat([pipe(two, **how), bare(two, **how)])
# viz.show_images(pair, ["with T5"] * 4 + ["without"] * 4, columns=4, low=0)

# %% tags=["active-ipynb", "hide-output", "nbval-ignore-output"]
# how = {"num_inference_steps": 6, "output_type": "pt"}
# asked = ("all", "things", "colors", "places")
# print(f"{'right':20}", *(f"{k:>15}" for k in asked))
# for kind, two_things in (("one thing", False), ("two things", True)):
#     prompts, grade = exam(16, two=two_things)
#     words, vector = pipe.encode_prompt(prompts)
#     half = words.shape[1] // 2
#     alone = torch.cat([0 * words[:, :half], words[:, half:]], 1), 0 * vector
#     given = dict(zip(("prompt_embeds", "pooled_prompt_embeds"), alone))
#     answers = {"all three": pipe(prompts, **how), "no T5": bare(prompts, **how,
#         max_sequence_length=words.shape[1] - half), "T5 alone": pipe(**given, **how)}
#     right = {name: grade(drawn * 2 - 1) for name, drawn in answers.items()}
#     for name, found in right.items():
#         print(f"{kind:10} {name:9}", *(f"{share(found[k]):>15}" for k in asked))
#     whole, bereft = right["all three"]["all"], right["no T5"]["all"]
#     print(f"{kind:10} right only with T5: {(whole & ~bereft).sum()}, only without: "
#         f"{(bereft & ~whole).sum()}")

# %% [markdown]
# Single pictures deceive here; the table counts. With and without T5 the same prompts
# are drawn from the same noise, so the last line of each kind counts in pairs. If T5
# made no difference, its two numbers would be alike; five to none happens by chance
# once in 16 times, four to one three times in eight: neither is proof. In these sixteen
# with two things the colours lost most, the places one; that does not rank them.
#
# And “T5 alone” tells whether the model can do without CLIP: none of these pictures is
# right. (In training each encoder was left out in one sample of twenty, both CLIPs
# together in one of four hundred. So zeros in T5's place are known to the transformer,
# and zeros in both CLIPs' nearly unknown: that row also measures how unfamiliar they
# are.) Esser et al. 2024 report that the large model does without T5 on simple prompts;
# what suffers there is written text and long, detailed prompts.
#
# Whom does it believe, if CLIP and T5 are told different things? Each of 16 pictures is
# drawn from one prompt for both CLIPs and the next one for T5. What it shows is graded
# twice, by the one and by the other.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# prompts, grade = exam(16)
# drawn = pipe(prompts, prompt_3=prompts[1:] + prompts[:1], **how) * 2 - 1
# clip, t5 = grade(drawn), grade(drawn.roll(1, 0))
# for name in ("things", "colors", "ground"):
#     print(f"{name:7} as CLIP was told {share(clip[name])}, "
#         f"as T5 was {share(t5[name])}")

# %% [markdown]
# Where the two shares of a line lie far apart, this model has that from one of the
# readers: the thing from CLIP, the ground from T5. The brackets of the colours overlap:
# sixteen pictures do not say whom it believes there.

# %% [markdown]
# ## The same lines, full size
#
# Nothing above knows how large the model is. First without weights: all three models
# on PyTorch's *meta* device, where tensors have a shape and no memory.

# %% tags=["active-ipynb"]
# from torch.utils.flop_counter import FlopCounterMode
#
# from minidiff.engine.loading import blueprint
# from minidiff.files.layout import ON_HUB
# from minidiff.files.weights import count_parameters
#
# for name in ON_HUB:
#     counts = {n: count_parameters(m) for n, m in blueprint(name).items()}
#     print(f"{name}: {sum(counts.values()):,} parameters")
#     print("  transformer {transformer:,}, T5 {text_encoder_3:,}".format(**counts))

# %% tags=["active-ipynb"]
# def work(name: str) -> tuple[float, float]:
#     """GB of 16-bit weights with tables, TFLOP of a guided step at 1024²."""
#     parts, meta = blueprint(name), {"device": "meta"}
#     size = sum(2 * t.numel() for m in parts.values() for t in m.state_dict().values())
#     given = (2, 16, 128, 128), (2,), (2, 333, 4096), (2, 2048)
#     with FlopCounterMode(display=False) as counter:
#         parts["transformer"](*(torch.empty(s, **meta) for s in given))
#     return size / 1e9, counter.get_total_flops() / 1e12

# %% tags=["active-ipynb"]
# counted = {name: work(name) for name in ("sd3.5-medium", "sd3.5-large")}
# counted["sd3.5-large-turbo"] = counted["sd3.5-large"]  # the same networks
# for name, (size, flops) in counted.items():
#     usual = DEFAULTS[name]
#     passes = usual.num_inference_steps * (1 if usual.guidance_scale > 1 else 0.5)
#     print(f"{name}: {size:.1f} GB, {flops:.1f} TFLOP a guided step, "
#         f"{passes * flops:.0f} TFLOP in all its steps")

# %% [markdown]
# Turbo has Large's architecture, and needs a fourteenth of its work: a seventh of the
# steps, and no second pass for guidance. (Encoders and decoder add about 15 TFLOP to a
# picture: see [Numbers worth knowing](../book/numbers.ipynb).)
#
# Now with weights, where there is a CUDA device and the licence has been accepted (the
# set-up page says how). Elsewhere the cell says so in one line.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# def full_size(name: str) -> None:
#     if not torch.cuda.is_available():
#         return print(f"{name}: needs a CUDA device and access to the weights")
#     card = torch.cuda.get_device_properties(0).total_memory
#     try:
#         large = minidiff.load(name, device="cuda", memory=f"{card // 10**9}GB")
#     except OSError:
#         return print(f"{name}: needs a CUDA device and access to the weights")
#     display(large("a red dress on a blue background, studio photograph")[0])

# %% tags=["active-ipynb", "nbval-ignore-output"]
# for name in ON_HUB:
#     full_size(name)

# %% [markdown]
# ## Parity
#
# diffusers opens the same folder with its own classes. Same prompt, same negative
# prompt, same noise, 28 guided steps: the pictures must be equal.

# %% tags=["active-ipynb", "hide-input"]
# import logging
# import os
#
# os.environ["TRANSFORMERS_VERBOSITY"] = "error"
# logging.disable(logging.WARNING)
# import diffusers
# from diffusers.utils.logging import disable_progress_bar
# from transformers.utils.logging import disable_progress_bar as disable_another

# %% tags=["active-ipynb"]
# disable_progress_bar()
# disable_another()
# Reference = diffusers.StableDiffusion3Pipeline
# reference = Reference.from_pretrained(TINY, dtype=torch.float32)
# reference.set_progress_bar_config(disable=True)
# how = {"prompt": two, "negative_prompt": "a dress", "num_inference_steps": 28}
# how |= {"guidance_scale": 4.0, "latents": noise, "output_type": "pt"}
# ours, theirs = pipe(**how), reference(**how, max_sequence_length=32).images

# %% tags=["active-ipynb"]
# error = ((ours - theirs).norm() / theirs.norm()).item()
# assert error < 1e-5, error
# print("relative error of the picture below 1e-5")

# %% [markdown]
# ## What production code does differently
#
# - **Memory.** The encoders run once, then only occupy memory: production code moves
#   them away, streams T5 layer by layer, or stores weights in 8 bits.
#   `minidiff.load(..., memory="12GB")` does so; the plans live in `minidiff.engine`.
# - **Compilation.** `compile=True` compiles each kind of block once. The first picture
#   waits for it, the others should be faster (measured here on no card).
# - **Large pictures** are decoded in overlapping tiles, because the decoder's last
#   feature maps, 256 channels as large as the picture, take gigabytes.
# - **Many users** share a batch, with their own prompts, seeds and guidance scales, and
#   texts are cached.
# - **Distillation** changes the weights rather than the code. Large Turbo is the
#   example at hand: the same transformer, four steps, no guidance. Chapter 9 makes such
#   a model.
#
# ## What else the package does
#
# Part I ends here; Part II and the package go on. What people do on top of a pipeline
# lives in rooms of its own: `drawing` (guidance, image to image, previews), `recipes`
# (training) and `engine` (memory and speed). The options in a terminal are those of
# `minidiff sample` (`--help` lists them all).
#
# | what | in Python | in a terminal |
# |---|---|---|
# | Skip Layer Guidance, for Medium | `guidance.SkipLayer` | `--skip-layers` |
# | Image to image | `image_to_image.image_to_image` | `--image`, `--strength` |
# | Inpainting | the same, with `mask_image` | `--mask` |
# | LoRA: use some (chapter 10) | `pipe.adapters.load` | `--lora`, `--lora-scale` |
# | LoRA: train one | `finetune.finetune` | `minidiff train --from … --lora` |
# | By a sketch (chapter 11) | `control.Control` | `--control`, `--control-image` |
# | Previews | `previews.show_previews` | `--preview` |
# | Memory plans | `load(memory="12GB")` | `--memory 12GB` |
# | Fewer passes through memory | `load(fast=True)` | `--fast` |
# | Compiled blocks | `load(compile=True)` | `--compile` |
#
# *Skip Layer Guidance* moves away from what the model draws without some of its blocks:
# with $v_\circ$ the prompt's velocity without them and $w$ its scale,
# $v = v_- + g\,(v_+ - v_-) + w\,(v_+ - v_\circ)$, between 1 % and 20 % of the steps.
# *Inpainting* paints only where a mask is white. A *LoRA* is a file of small
# corrections to the weights, $W + \frac{\alpha}{r} BA$ with thin matrices $B$ and $A$,
# learned from a folder of captioned pictures. *Previews*
# show a thumbnail after each step, without the decoder. A *memory plan* says what stays
# on the card, and in how many bits. [A page of its own](../book/extras.ipynb) draws
# with each of them.
#
# Exercise 8.2 lets you write the second line, image to image, yourself. This is how it
# is called:
#
# ```python
# from minidiff.drawing.image_to_image import image_to_image
#
# dress = pipe("a red dress on a blue background")[0]
# coat = image_to_image(pipe, "a red coat on a blue background", dress, strength=0.7)[0]
# ```
#
# [Performance](../book/performance.md) says what of this is counted or measured so far;
# no time on a GPU has been measured.
#
# ## Exercises
#
# **8.1 Predict.** Four pictures of one prompt, 28 steps of Heun, guidance 4.5: for how
# many samples does the transformer compute a velocity? (Heun's last step asks once.)

# %% tags=["active-ipynb", "exercise"]
# def samples() -> int:
#     raise NotImplementedError

# %% tags=["active-ipynb", "check"]
# @check
# def exercise_8_1() -> None:
#     rows, forward = [], pipe.transformer.forward
#     count = lambda x, *a, **k: rows.append(len(x)) or torch.zeros_like(x)
#     wanted = samples()
#     pipe.transformer.forward = count
#     pipe("", num_images_per_prompt=4, guidance_scale=4.5, sampler="heun")
#     pipe.transformer.forward = forward
#     assert wanted == sum(rows), "pictures × prompts × calls"

# %% tags=["active-ipynb", "hide-cell", "solution"]
# def samples() -> int:
#     return 4 * 2 * (27 * 2 + 1)  # Heun asks twice a step, but once in the last
#
# exercise_8_1()

# %% [markdown]
# **8.2 Code.** *Image to image*: take the latent of a picture, mix it with the
# journey's `noise` as on chapter 6's path, and solve only the rest of the way, with
# `euler`. Of the schedule's 28 steps leave out the first `int(28 - 28 * strength)`, as
# diffusers counts, and mix up to the level where the others begin. `velocity` is the
# guided velocity, `sigmas` the whole schedule.

# %% tags=["active-ipynb", "exercise"]
# from minidiff.flow_matching import Velocity
#
# def repaint(velocity: Velocity, x0: Tensor, sigmas: Tensor, strength: float):
#     """From data ``x0`` (1, C, h, w) up to a level, with ``noise``, and back down."""
#     raise NotImplementedError

# %% tags=["active-ipynb", "check"]
# @check
# def exercise_8_2() -> None:
#     answers = pipe.velocity(context, pooled, sigmas)
#     velocity = ClassifierFree(scale)(answers, sigmas)
#     kept = repaint(velocity, naive, sigmas, 0.0)
#     assert torch.equal(kept, naive), "strength 0 should change nothing"
#     full = repaint(velocity, naive, sigmas, 1.0)
#     assert torch.allclose(full, naive, atol=1e-3), "strength 1 should draw anew"
#     seen = []
#     repaint(lambda x, s: seen.append((s.item(), x)) or 0 * x, naive, sigmas, 0.5)
#     levels = [level for level, _ in seen]
#     assert levels == sigmas[14:-1].tolist(), "½ should take the last 14 steps"
#     beyond = (seen[0][1] - naive).norm() / (noise - naive).norm()
#     assert abs(beyond - levels[0]) < 1e-3, f"its noise has weight {beyond:.2f}"

# %% tags=["active-ipynb", "hide-cell", "solution"]
# def repaint(velocity: Velocity, x0: Tensor, sigmas: Tensor, strength: float):
#     rest = sigmas[int(28 - 28 * strength) :]
#     x = (1 - rest[0]) * x0 + rest[0] * noise
#     return euler(velocity, x, rest)
#
# exercise_8_2()
# answers = ClassifierFree(scale)(pipe.velocity(context, pooled, sigmas), sigmas)
# ways = (0.25, 0.5, 0.75, 1.0)
# again = pipe.decode(torch.cat([repaint(answers, naive, sigmas, s) for s in ways]))
# for strength, x in zip(ways, again):
#     apart = (x - picture[0]).abs().mean()
#     print(f"strength {strength}: pixels differ by {apart:.3f}")
# viz.show_images(again, [f"strength {s}" for s in ways], low=0)
# # Little changes, because prompt and noise are those that the picture was drawn with:
# # the mixture lies near its own path, and at strength 1 it is that path.

# %% [markdown]
# **8.3 Code.** Walk from one seed to another. The straight line between two noises
# leads through points that are too small to be noise: half-way, independent noises have
# lost a factor $\sqrt 2$. Go along the arc instead: weights $\cos\varphi$ and
# $\sin\varphi$, with $\varphi$ from 0 to $\pi/2$.

# %% tags=["active-ipynb", "exercise"]
# def between(a: Tensor, b: Tensor, t: float) -> Tensor:
#     """Noise on the way from ``a`` (t = 0) to ``b`` (t = 1), of the same size."""
#     raise NotImplementedError

# %% tags=["active-ipynb", "check"]
# @check
# def exercise_8_3() -> None:
#     a, b = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0))
#     first, middle, last = (between(a, b, t) for t in (0, 0.5, 1))
#     assert torch.allclose(first, a), "it should begin at a"
#     assert torch.allclose(last, b, atol=1e-5), "it should end at b"
#     assert abs(middle.std() - 1) < 0.02, "half-way it is no longer noise"
#     for t in (0.25, 0.5, 0.9):
#         angles = [math.acos((between(a, b, t) * end).mean().clamp(-1, 1))
#             for end in (a, b)]
#         near = abs(angles[0] / sum(angles) - t)
#         assert near < 0.02, f"t = {t} should be that share of the way from a to b"

# %% tags=["active-ipynb", "hide-cell", "solution"]
# def between(a: Tensor, b: Tensor, t: float) -> Tensor:
#     # cos² + sin² = 1 keeps the variance of independent noises at 1
#     return math.cos(t * math.pi / 2) * a + math.sin(t * math.pi / 2) * b
#
# exercise_8_3()
# a, b = starting_noise([0, 1], (16, 16, 16)).split(1)
# walk = torch.cat([between(a, b, t / 7) for t in range(8)])
# how = {"latents": walk, "num_inference_steps": 14, "output_type": "pt"}
# viz.show_images(pipe([PROMPT] * 8, **how), low=0)

# %% [markdown]
# **8.4 Explore.** Draw “a dress on a blue background” with the negative prompt “a red
# dress”, and with “red”. Which one does the model understand, and why? In training it
# saw whole captions and the empty one.

# %% tags=["active-ipynb", "hide-cell", "nbval-ignore-output"]
# how = {"num_images_per_prompt": 16, "num_inference_steps": 6, "output_type": "pt"}
# rows, redness = [], {}
# for avoided in ("", "a red dress", "red", "a red dress on a blue background"):
#     drawn = pipe("a dress on a blue background", negative_prompt=avoided, **how)
#     inside = parts(drawn)[1][:, None]  # (B, 1, 64, 64)
#     tint = (drawn * inside).sum((2, 3)) / inside.sum((2, 3)).clamp(min=1)
#     redness[avoided] = tint[:, 0] - tint[:, 1:].mean(1)  # (B, 3) → (B,)
#     rows.append(drawn[:8])
# pairs = [(one, "") for one in tuple(redness)[1:]] + [("a red dress", "red")]
# for one, other in pairs:
#     more = redness[one] - redness[other]  # of the same noise
#     half = 2.13 * more.std() / 16**0.5  # Student's t, sixteen seeds
#     print(f"“{one}” for “{other}” changes redness by {more.mean():+.2f} ± {half:.2f}")
# viz.show_images(torch.cat(rows), columns=8, low=0).captioned(
#     "Rows: away from nothing, “a red dress”, “red”, and “a red dress on a blue "
#     "background”.")

# %% [markdown]
# <details><summary>Answer</summary>
#
# Redness is red less the mean of green and blue, within the outline of what stands out
# from the ground. The rows have their noise in common, so the differences are taken
# seed by seed. Against the empty prompt each of the three takes red away: all were
# understood. The last line sets “a red dress” against “red”, and the caption takes away
# more than the word. “Red” alone is no caption that training showed, and it could
# belong to a ground. The last row avoids the dress itself too: one picture shown is
# empty, and counts with a redness of zero.
#
# </details>

# %% [markdown]
# ## Summary
#
# You **assembled** tokenizers, encoders, transformer, solver and autoencoder by hand,
# and drew a picture with a loop of four lines. You **batched** the prompts and
# **precomputed** the modulations, and saw that nothing changed. You **watched** the
# picture appear, **compared** guidance scales, step counts and solvers by score and
# error, and took T5 away. You **set up** the three published models with the same
# lines, without their weights.
#
# Part I's journey ends where it wanted to go: the prompt of chapter 1 is a picture.

# %% tags=["active-ipynb"]
# print(journey.meets("latents", called))
# print(journey.meets("picture", final))
# viz.show_images(pipe(PROMPT, seed=SEED), [PROMPT])

# %% [markdown]
# ## Further reading
#
# - Rombach et al. 2022, [High-resolution image synthesis with latent diffusion
#   models](https://arxiv.org/abs/2112.10752): the shape of all such pipelines.
# - Esser et al. 2024, [Scaling rectified flow
#   transformers](https://arxiv.org/abs/2403.03206): the model, and what leaving T5 out
#   costs (section 5.3.3).
# - Sauer et al. 2024, [Fast high-resolution image synthesis with latent adversarial
#   diffusion distillation](https://arxiv.org/abs/2403.12015): how SD3-Turbo was made.
#   (Large Turbo's model card names the method's forerunner,
#   [ADD](https://arxiv.org/abs/2311.17042).)
# - Meng et al. 2022, [SDEdit](https://arxiv.org/abs/2108.01073): image to image.
# - The documentation of [diffusers](https://huggingface.co/docs/diffusers), whose
#   vocabulary this package speaks.
