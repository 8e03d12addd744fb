# %% [markdown]
r"""
# Sampling: from a prompt to a picture
"""

# %%
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from minidiff.dit import MMDiT, MMDiTConfig, Modulations
from minidiff.flow_matching import Scheduler, Velocity, dpmpp_2m, euler, guide, heun
from minidiff.support import checkpoints as cp
from minidiff.support import hub
from minidiff.text_encoders import (
    CLIPTextConfig,
    CLIPTextEncoder,
    T5Config,
    T5Encoder,
    assemble,
)
from minidiff.tokenizer import CLIPTokenizer, T5Tokenizer
from minidiff.vae import VAE, VAEConfig

if TYPE_CHECKING:
    from PIL.Image import Image

SAMPLERS = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}


# %% [markdown]
# ## What suits each model


# %%
class Defaults(NamedTuple):
    """How a model is meant to be drawn from; guidance ≤ 1 means none."""

    num_inference_steps: int
    guidance_scale: float


DEFAULTS = {
    "tiny": Defaults(28, 4.0),
    "sd3.5-medium": Defaults(40, 4.5),
    "sd3.5-large": Defaults(28, 3.5),
    "sd3.5-large-turbo": Defaults(4, 1.0),
}


def recognize(name: str, config: MMDiTConfig) -> str:
    """The key of ``DEFAULTS`` for a model, by its name and its transformer."""
    if "turbo" in name.lower():  # Large and Large Turbo have the same configuration
        return "sd3.5-large-turbo"
    if config == MMDiTConfig.tiny():
        return "tiny"
    return "sd3.5-medium" if config.dual_attention_layers else "sd3.5-large"


# %% [markdown]
# ## Noise: one seed, one picture


# %%
def starting_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Gaussian noise of ``shape`` (C, h, w) for every seed: (B, C, h, w), float32.

    Drawn on the CPU, so that a seed means the same noise on every device.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = [torch.randn(*shape, generator=g) for g in generators]
    return torch.stack(noise)  # B × (C, h, w) → (B, C, h, w)


# %% [markdown]
# ## The pipeline


# %%
class Pipeline:
    """A text-to-picture pipeline of the SD3 family, made of the chapters' parts.

    ``tokenizers`` and ``text_encoders``: CLIP-L, CLIP-G and T5 (None where the model
    goes without T5). ``name`` chooses the defaults where the configuration does not
    tell (Large and Large Turbo).
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
        self.transformer, self.vae, self.scheduler = transformer, vae, scheduler
        self.name = recognize(name, transformer.config)
        self.defaults = DEFAULTS[self.name]
        self.progress = True
        check_parts(self.text_encoders, transformer, vae)

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return self.transformer.x_embedder.proj.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """In what the transformer computes."""
        return self.transformer.x_embedder.proj.weight.dtype

    @property
    def max_sequence_length(self) -> int:
        """T5 tokens of a prompt unless told otherwise: 256, or as many as T5 takes."""
        t5 = self.tokenizers[2]
        return min(256, t5.model_max_length) if t5 else 256

    # Three steps, each usable alone

    @torch.no_grad()
    def encode_prompt(
        self, prompt: str | Sequence[str], max_sequence_length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the transformer reads: context (B, L, D) and pooled (B, P).

        L counts CLIP's tokens and then T5's; without T5 its rows are zeros.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        longest = self.tokenizers[0].model_max_length
        hidden, pooled = [], []
        for tokenize, encode in zip(
            self.tokenizers[:2], self.text_encoders, strict=False
        ):
            ids = tokenize(prompts, max_length=longest)  # (B, 77)
            states, vector = encode(ids.to(self.device))
            hidden.append(states)
            pooled.append(vector)
        t5 = self._encode_t5(prompts, max_sequence_length or self.max_sequence_length)
        context = assemble(*hidden, t5)  # → (B, 77 + M, D)
        return context.to(self.dtype), torch.cat(pooled, dim=-1).to(self.dtype)

    def _encode_t5(self, prompts: Sequence[str], length: int) -> Tensor:
        tokenize, encode = self.tokenizers[2], self.text_encoders[2]
        if encode is None:
            width = self.transformer.config.joint_attention_dim
            return torch.zeros(
                len(prompts), length, width, device=self.device, dtype=self.dtype
            )
        return encode(tokenize(prompts, max_length=length).to(self.device))

    @torch.no_grad()
    def velocity(
        self, context: Tensor, pooled: Tensor, sigmas: Tensor, guidance_scale: float
    ) -> Velocity:
        """The transformer as the function ``v(x, sigma)`` that the solvers follow.

        ``sigma`` is one of ``sigmas``, for which all modulations are computed here.
        With ``guidance_scale`` > 1 the rows of ``context`` and ``pooled`` are those of
        the negative prompts, then those of the prompts.
        """
        levels = {sigma: i for i, sigma in enumerate(sigmas.tolist())}
        times = sigmas[:, None].to(self.device)  # (S,) → (S, 1)
        modulations = self.transformer.modulations(times, pooled)

        def predict(x: Tensor, modulation: Modulations) -> Tensor:
            x = x.to(self.dtype)
            return self.transformer(
                x, None, context, None, modulations=modulation
            ).float()

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            modulation = modulations.step(levels[sigma.item()])
            if guidance_scale <= 1:
                return predict(x, modulation)
            both = predict(torch.cat([x, x]), modulation)  # → (2·B, C, h, w)
            return guide(*both.chunk(2), guidance_scale)

        return velocity

    @torch.no_grad()
    def denoise(
        self,
        latents: Tensor,
        context: Tensor,
        pooled: Tensor,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: str = "euler",
        callback_on_step_end: Callable[..., dict[str, Tensor] | None] | None = None,
    ) -> Tensor:
        """Noise ``latents`` (B, C, h, w) to data, scaled latents of the same shape.

        ``context`` (B, L, D) and ``pooled`` (B, P); with guidance twice as many rows,
        the negative prompts first. ``callback_on_step_end(pipe, step, timestep,
        {"latents": …, "denoised": x̂₀})`` may return {"latents": …} to replace them.
        """
        steps = or_default(num_inference_steps, self.defaults.num_inference_steps)
        scale = or_default(guidance_scale, self.defaults.guidance_scale)
        sigmas = self.scheduler.sigmas(steps)
        velocity = self.velocity(context, pooled, sigmas, scale)
        with progress_bar(steps, self.progress) as bar:

            def end(step: int, sigma: Tensor, x: Tensor, x0: Tensor) -> Tensor | None:
                bar.update()
                if callback_on_step_end is None:
                    return None
                tensors, time = {"latents": x, "denoised": x0}, 1000 * sigma
                changed = callback_on_step_end(self, step, time, tensors) or {}
                return changed.get("latents")

            latents = latents.to(self.device, torch.float32)
            return SAMPLERS[sampler](velocity, latents, sigmas, end)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) → pictures (B, 3, H, W) in [0, 1]."""
        z = self.vae.unscale(latents).to(self.dtype)
        return (self.vae.decode(z).float() / 2 + 0.5).clamp(0, 1)

    # All three

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] = "",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        seed: int | None = 0,
        latents: Tensor | None = None,
        max_sequence_length: int | None = None,
        sampler: str = "euler",
        callback_on_step_end: Callable[..., dict[str, Tensor] | None] | None = None,
        output_type: str = "pil",
    ) -> "list[Image] | Tensor":
        """Draw ``num_images_per_prompt`` pictures for each prompt, prompt by prompt.

        Sizes are in pixels. Picture i of the call starts from the noise of seed + i,
        whatever else is drawn with it; ``seed`` None takes a random one. ``latents``
        (B, C, h, w) replace that noise. Guidance ≤ 1 ignores the negative prompt.

        Returns a list of PIL pictures; with ``output_type`` "pt" a tensor (B, 3, H, W)
        in [0, 1]; with "latent" the scaled latents. Raises ValueError or TypeError,
        before any work, for what cannot be drawn.
        """
        prompts, negatives = as_prompts(prompt, negative_prompt)
        steps = or_default(num_inference_steps, self.defaults.num_inference_steps)
        scale = or_default(guidance_scale, self.defaults.guidance_scale)
        check_choice("sampler", sampler, SAMPLERS)
        check_choice("output_type", output_type, ("pil", "pt", "latent"))
        check_range("num_inference_steps", steps, 1, 1000)
        check_range("num_images_per_prompt", num_images_per_prompt, 1)
        if max_sequence_length is not None:
            check_range("max_sequence_length", max_sequence_length, 1, 512)
        count = len(prompts) * num_images_per_prompt
        latents = self.prepare_latents(count, height, width, seed, latents)

        texts = prompts if scale <= 1 else negatives + prompts
        unique = list(dict.fromkeys(texts))
        context, pooled = self.encode_prompt(unique, max_sequence_length)
        rows = [unique.index(t) for t in texts for _ in range(num_images_per_prompt)]
        latents = self.denoise(
            latents,
            context[rows],  # (unique, L, D) → (B or 2·B, L, D)
            pooled[rows],
            steps,
            scale,
            sampler,
            callback_on_step_end,
        )
        if output_type == "latent":
            return latents
        pictures = self.decode(latents)
        return pictures if output_type == "pt" else to_pil(pictures)

    def prepare_latents(
        self,
        count: int,
        height: int | None = None,
        width: int | None = None,
        seed: int | None = 0,
        latents: Tensor | None = None,
    ) -> Tensor:
        """The noise to start from, (count, C, h, w), for a picture of height × width.

        Raises ValueError for a size that the model cannot make.
        """
        config, factor = self.transformer.config, self.vae.config.factor
        if latents is not None and latents.ndim != 4:
            found = tuple(latents.shape)
            raise ValueError(f"latents have shape {found}; expected (B, C, h, w)")
        given = (
            [None] * 2 if latents is None else [s * factor for s in latents.shape[2:]]
        )
        usual = config.sample_size * factor
        sizes = [h or g or usual for h, g in zip((height, width), given, strict=True)]
        grid = factor * config.patch_size
        for name, size in zip(("height", "width"), sizes, strict=True):
            check_size(name, size, grid, config.pos_embed_max_size * grid)
        shape = (config.in_channels, *(size // factor for size in sizes))
        if latents is None:
            first = secrets.randbelow(2**32) if seed is None else seed
            return starting_noise(range(first, first + count), shape)
        if latents.shape != (count, *shape):
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}; expected {(count, *shape)}"
            )
        return latents

    def save_pretrained(
        self, folder: Path | str, dtype: torch.dtype | None = None
    ) -> None:
        """Write a folder in the hub's diffusers layout, in ``dtype`` (None: as is)."""
        save_pipeline(self, Path(folder), dtype)


# %%
def or_default(value: Any, default: Any) -> Any:
    """``value``, or ``default`` where it is None."""
    return default if value is None else value


def progress_bar(steps: int, shown: bool) -> Any:
    """A progress bar on a terminal, nothing elsewhere (notebooks, files)."""
    from tqdm import tqdm

    return tqdm(total=steps, disable=None if shown else True, leave=False)


def to_pil(pictures: Tensor) -> "list[Image]":
    """Pictures (B, 3, H, W) in [0, 1] → PIL, rounded to the nearest of 256 levels."""
    from PIL import Image

    values = (pictures * 255).round().to(torch.uint8).cpu()
    values = values.permute(0, 2, 3, 1)  # (B, 3, H, W) → (B, H, W, 3)
    return [Image.fromarray(picture.numpy()) for picture in values]


# %% [markdown]
# ## Refusing early


# %%
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


def check_parts(
    text_encoders: Sequence[CLIPTextEncoder | T5Encoder | None],
    transformer: MMDiT,
    vae: VAE,
) -> None:
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


# %% [markdown]
# ## Loading and saving


# %%
PARTS = {
    "text_encoder": ("CLIPTextModelWithProjection", CLIPTextEncoder, CLIPTextConfig),
    "text_encoder_2": ("CLIPTextModelWithProjection", CLIPTextEncoder, CLIPTextConfig),
    "text_encoder_3": ("T5EncoderModel", T5Encoder, T5Config),
    "transformer": ("SD3Transformer2DModel", MMDiT, MMDiTConfig),
    "vae": ("AutoencoderKL", VAE, VAEConfig),
}
TOKENIZERS = {
    "tokenizer": ("CLIPTokenizer", CLIPTokenizer),
    "tokenizer_2": ("CLIPTokenizer", CLIPTokenizer),
    "tokenizer_3": ("T5TokenizerFast", T5Tokenizer),
}
# Settings of diffusers' scheduler that no SD3 model uses, and that we do not honour.
DYNAMIC = (
    "use_dynamic_shifting",
    "shift_terminal",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "stochastic_sampling",
)


def load(
    model: Path | str = "tiny",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Pipeline:
    """A pipeline, ready to draw.

    ``model``: "tiny", "sd3.5-medium", "sd3.5-large", "sd3.5-large-turbo", a hub id, or
    a folder in the hub's diffusers layout. ``device`` None is the CPU; ``dtype`` None
    is float32 on a CPU and bfloat16 elsewhere. Every file is checked before the first
    weight is read: ValueError and FileNotFoundError name what does not fit.
    """
    folder = find_model(model)
    index = cp.read_json(folder / "model_index.json")
    if not str(index.get("_class_name")).startswith("StableDiffusion3"):
        found = index.get("_class_name")
        raise ValueError(f"{folder} is a {found}; expected a StableDiffusion3Pipeline")
    scheduler = read_scheduler(folder / "scheduler")
    present = [n for n in (*PARTS, *TOKENIZERS) if (index.get(n) or [None])[0]]
    required = [n for n in (*PARTS, *TOKENIZERS) if not n.endswith("_3")]
    if missing := [name for name in required if name not in present]:
        raise ValueError(f"{folder}/model_index.json names no {', '.join(missing)}")
    ready = {
        name: cp.prepare_component(*classes, folder / name)
        for name, (_, *classes) in PARTS.items()
        if name in present
    }
    tokenizers = [
        cls.from_pretrained(folder / name) if name in present else None
        for name, (_, cls) in TOKENIZERS.items()
    ]
    device = torch.device(device or "cpu")
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    parts = {name: read(device, dtype) for name, read in ready.items()}
    encoders = [parts.get(name) for name in list(PARTS)[:3]]
    name = f"{model} {index.get('_name_or_path', '')}"
    return Pipeline(
        tokenizers, encoders, parts["transformer"], parts["vae"], scheduler, name
    )


# %%
PUBLISHED = {
    "sd3.5-medium": MMDiTConfig.sd35_medium,
    "sd3.5-large": MMDiTConfig.sd35_large,
    "sd3.5-large-turbo": MMDiTConfig.sd35_large,
}


def blueprint(model: Path | str = "tiny") -> dict[str, nn.Module]:
    """The models of a pipeline on the meta device: shapes, and not one weight.

    The published names need no network; a folder's config.json files are read.
    """
    if model in PUBLISHED:
        with torch.device("meta"):
            return {
                "text_encoder": CLIPTextEncoder(CLIPTextConfig.clip_l()),
                "text_encoder_2": CLIPTextEncoder(CLIPTextConfig.clip_g()),
                "text_encoder_3": T5Encoder(T5Config.t5_xxl()),
                "transformer": MMDiT(PUBLISHED[model]()),
                "vae": VAE(VAEConfig.sd35()),
            }
    folder = find_model(model)
    return {
        name: cp.load_component(*classes, folder / name, device="meta")
        for name, (_, *classes) in PARTS.items()
        if (folder / name).is_dir()
    }


def find_model(model: Path | str) -> Path:
    """The folder that ``model`` names; downloaded if it is on the hub."""
    if str(model) == "tiny":
        return cp.TINY
    if str(model) and Path(model).is_dir():
        return Path(model)
    if Path(model).is_file():
        raise ValueError(f"{model} is a file; expected a folder in the hub's layout")
    if str(model) in hub.REPOSITORIES or str(model).count("/") == 1:
        return hub.download(str(model))
    known = ", ".join(["tiny", *hub.REPOSITORIES])
    raise ValueError(f"model is {str(model)!r}; expected {known} or a folder")


def read_scheduler(folder: Path) -> Scheduler:
    """The schedule of a folder; ValueError for settings that would draw otherwise."""
    content = cp.read_json(cp.config_file(folder))
    if used := [name for name in DYNAMIC if content.get(name)]:
        raise ValueError(f"{folder} asks for {used[0]}, which minidiff does not have")
    return cp.read_config(Scheduler, folder)


# %%
def save_pipeline(pipe: Pipeline, folder: Path, dtype: torch.dtype | None) -> None:
    """Write every part of ``pipe`` and the index that names them."""
    index = {"_class_name": "StableDiffusion3Pipeline", "_name_or_path": pipe.name}
    parts = (*pipe.text_encoders, pipe.transformer, pipe.vae)
    for (name, (hub_class, *_)), part in zip(PARTS.items(), parts, strict=True):
        library = "diffusers" if name in ("transformer", "vae") else "transformers"
        index[name] = [library, hub_class] if part else [None, None]
        if part:
            cp.save_component(part, folder / name, hub_class, dtype)
    for (name, (hub_class, _)), part in zip(
        TOKENIZERS.items(), pipe.tokenizers, strict=True
    ):
        index[name] = ["transformers", hub_class] if part else [None, None]
        if part:
            part.save_pretrained(folder / name)
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    save_scheduler(pipe.scheduler, folder / "scheduler")
    cp.write_json(folder / "model_index.json", index)


def save_scheduler(scheduler: Scheduler, folder: Path) -> None:
    """Write the hub's scheduler_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "shift": scheduler.shift,
        "num_train_timesteps": scheduler.num_train_timesteps,
    }
    cp.write_json(folder / "scheduler_config.json", content)
