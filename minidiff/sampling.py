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
from torch import Tensor

from minidiff.dit import MMDiT, MMDiTConfig, Modulations
from minidiff.flow_matching import Scheduler, Velocity, dpmpp_2m, euler, guide, heun
from minidiff.support import checks
from minidiff.text_encoders import CLIPTextEncoder, T5Encoder, assemble
from minidiff.tokenizer import CLIPTokenizer, T5Tokenizer
from minidiff.vae import VAE

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
        checks.check_parts(self.text_encoders, transformer, vae)

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
            ids = tokenize(prompts, max_length=longest)  # (B, L)
            states, vector = encode(ids.to(self.device))
            hidden.append(states)
            pooled.append(vector)
        t5 = self._encode_t5(prompts, max_sequence_length or self.max_sequence_length)
        context = assemble(*hidden, t5)  # → (B, L + M, D)
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
        prompts, negatives = checks.as_prompts(prompt, negative_prompt)
        steps = or_default(num_inference_steps, self.defaults.num_inference_steps)
        scale = or_default(guidance_scale, self.defaults.guidance_scale)
        checks.check_choice("sampler", sampler, SAMPLERS)
        checks.check_choice("output_type", output_type, ("pil", "pt", "latent"))
        checks.check_range("num_inference_steps", steps, 1, 1000)
        checks.check_range("num_images_per_prompt", num_images_per_prompt, 1)
        if max_sequence_length is not None:
            checks.check_range("max_sequence_length", max_sequence_length, 1, 512)
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
            checks.check_size(name, size, grid, config.pos_embed_max_size * grid)
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
        from minidiff.extras.loading import save_pipeline

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
# ## Loading and saving


# %%
def load(
    model: Path | str = "tiny",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    text_encoders: Path | str | None = None,
    memory: Any = None,
    fast: bool = False,
    compile: bool = False,
    **knobs: Any,
) -> Pipeline:
    """A pipeline, ready to draw.

    ``model``: "tiny", "sd3.5-medium", "sd3.5-large", "sd3.5-large-turbo", a hub id, a
    folder in the hub's diffusers layout, or an official single file; then
    ``text_encoders`` is the folder with the encoders and the tokenizers. ``device``
    None is the CPU; ``dtype`` None is float32 on a CPU and bfloat16 elsewhere.

    ``memory``: "8GB", "12GB", … picks a plan that fits, says so, and holds to it;
    ``knobs`` are the settings of ``minidiff.extras.memory.Plan``. ``fast`` runs
    ``minidiff.extras.fast`` for the blocks, ``compile`` compiles each kind of block.
    Every file is checked before the first weight is read: ValueError and
    FileNotFoundError name what does not fit.
    """
    from minidiff.extras import loading

    opened = loading.open_model(model, text_encoders)
    device = torch.device(device or "cpu")
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    if memory is None and not knobs and device.type != "cuda":
        parts = {name: read(device, dtype) for name, read in opened.parts.items()}
    else:
        from minidiff.extras.memory import load_parts

        parts = load_parts(opened.parts, device, dtype, memory, **knobs)
    encoders = [parts.get(name) for name in loading.ENCODERS]
    transformer, vae = parts["transformer"], parts["vae"]
    if fast or compile:
        from minidiff.extras.fast import accelerate

        accelerate(transformer, vae, fast, compile)
    return Pipeline(
        opened.tokenizers, encoders, transformer, vae, opened.scheduler, opened.name
    )
