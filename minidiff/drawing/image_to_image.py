"""Image to image, and inpainting: begin part of the way, from a picture.

Meng et al. 2022 (SDEdit), section 3. A picture's latent is mixed with noise of a level,
and only the rest of the schedule is solved; with a mask, everything outside of it is
put back after each step. Steps, numbers and random draws are those of diffusers.
"""

import warnings
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from minidiff.files.pictures import in_gray, in_rgb, is_transparent, open_picture
from minidiff.flow_matching import interpolate
from minidiff.interface import checks, output
from minidiff.sampling import SAMPLERS, Pipeline
from minidiff.vae import Posterior

if TYPE_CHECKING:
    from PIL.Image import Image

    Picture = Image | Tensor | Path | str

# What a pipeline's call is given here: it follows from the picture and the strength.
OWN = {"self", "latents", "sigmas"}


@output.described
@torch.no_grad()
def image_to_image(
    pipe: Pipeline,
    prompt: checks.Texts,
    image: "Picture",
    strength: float = 0.6,
    mask_image: "Picture | None" = None,
    *,
    num_inference_steps: int | None = None,
    height: int | None = None,
    width: int | None = None,
    num_images_per_prompt: int = 1,
    seed: int = 0,
    callback_on_step_end: output.Callback | None = None,
    **call: Any,
) -> "list[Image] | Tensor":
    """Draw ``prompt`` over ``image``: of the steps, the last ``strength`` part.

    ``image`` is a PIL picture, a file, or a tensor (3, H, W) or (B, 3, H, W) in [0, 1];
    a PIL picture or file is resized where ``height`` or ``width`` ask for it.
    ``mask_image``, of the picture's size, is white where to draw and black where to
    keep. Picture i draws first its latent, then its noise from seed + i. All else is as
    in a call of the pipeline. Raises ValueError or TypeError before any work.
    """
    steps = checks.given(num_inference_steps, pipe.defaults.num_inference_steps)
    count = check_call(pipe, prompt, steps, num_images_per_prompt, call)
    sigmas = pipe.scheduler.sigmas(steps)[first_step(steps, strength) :]
    image, mask = open_pictures(image, mask_image)
    width, height = map(checks.given, (width, height), size(image))
    guidance = pipe.guidance(call.get("guidance_scale"), call.get("guidance"))
    with warnings.catch_warnings(action="ignore"):  # the pipeline's call tells them
        guidance.check(pipe)
    levels = checks.count_levels(guidance.negative, steps, sigmas)
    shape = latent_shape(pipe, count, height, width, levels)
    pictures = as_tensor("image", image, "RGB", height, width, count) * 2 - 1
    if mask is not None:
        mask = as_tensor("mask_image", mask, "L", height, width, count)

    data, noise = encode(pipe, pictures, range(seed, seed + count))
    callback = callback_on_step_end
    if mask is not None:
        mask = (mask >= 0.5).float()
        small = F.interpolate(mask, shape[2:])  # (M, 1, H, W) → (M, 1, h, w)
        callback = Keep(data, noise, small.to(data), sigmas, callback_on_step_end)
    return pipe(
        prompt,
        num_inference_steps=steps,
        num_images_per_prompt=num_images_per_prompt,
        latents=interpolate(data, noise, sigmas[0].item()),
        sigmas=sigmas,
        callback_on_step_end=callback,
        **call,
    )


def latent_shape(pipe: Pipeline, count: int, h: int, w: int, levels: int) -> torch.Size:
    """(count, C, h, w) of the latents; ValueError for a size that cannot be drawn."""
    try:
        return pipe.prepare_latents(count, h, w, levels=levels).shape
    except ValueError as error:
        raise ValueError(
            f"{error}; height and width resize a PIL picture or a file"
        ) from None


def check_call(
    pipe: Pipeline, prompt: checks.Texts, steps: int, num: int, call: dict[str, Any]
) -> int:
    """What the pipeline would check, before the first work; how many pictures."""
    known = signature(Pipeline.__call__).parameters.keys() - OWN
    if unknown := call.keys() - known:
        found = f"image_to_image() takes no argument {min(unknown)!r}"
        raise TypeError(f"{found}; expected {', '.join(sorted(known))}")
    usual = {"sampler": "euler", "output_type": "pil", "max_sequence_length": None}
    how = (call.get(name, value) for name, value in usual.items())
    checks.check_call(pipe, steps, num, SAMPLERS, *how)
    others = call.get("prompt_2"), call.get("prompt_3")
    prompts = checks.as_prompts(pipe, "prompt", prompt, *others)
    no = (call.get(f"negative_prompt{end}") for end in ("", "_2", "_3"))
    checks.as_prompts(pipe, "negative_prompt", next(no) or "", *no, count=len(prompts))
    return len(prompts) * num


def first_step(steps: int, strength: float) -> int:
    """The first of ``steps`` to run, by diffusers' rule; ValueError if none is left."""
    if not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}; expected above 0, at most 1")
    first = int(steps - min(steps * strength, steps))
    if first >= steps:
        raise ValueError(f"strength {strength} of {steps} steps leaves none to run")
    return first


# Pictures


def open_pictures(image: "Picture", mask: "Picture | None") -> tuple[Any, Any]:
    """A picture and its mask, or None, opened: each a PIL picture or a tensor.

    Raises ValueError where the mask has another size than the picture.
    """
    image, mask = open_file(image), open_file(mask)
    check_kind("image", image)
    if mask is not None:
        check_kind("mask_image", mask)
        (w, h), (x, y) = size(mask), size(image)
        if (w, h) != (x, y):
            found = f"the mask is {w}×{h} pixels"
            raise ValueError(f"{found}; expected the picture's {x}×{y}")
    return image, mask


def open_file(image: "Picture | None") -> Any:
    """The picture in a file; pictures, tensors and None come back as they are.

    Warns of what is transparent: a picture is laid on white, a mask seen without it.
    """
    if not isinstance(image, str | Path):
        return image
    picture = open_picture(image)
    if is_transparent(picture):
        what = "they lie on white, or in a mask count with their own colour"
        checks.warn(f"{image} is transparent in parts; {what}")
    return picture


def check_kind(name: str, value: Any) -> None:
    """Raise TypeError or ValueError for what is no picture at all."""
    if isinstance(value, Tensor):
        if value.ndim < 2:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; expected (…, H, W)"
            )
    elif not hasattr(value, "convert"):
        kind = type(value).__name__
        raise TypeError(
            f"{name} is a {kind}; expected a PIL picture, a file or a tensor"
        )


def size(image: Any) -> tuple[int, int]:
    """(width, height) of a PIL picture or a tensor (…, H, W)."""
    if isinstance(image, Tensor):
        return image.shape[-1], image.shape[-2]
    return image.size


def as_tensor(
    name: str, image: Any, mode: str, height: int, width: int, count: int
) -> Tensor:
    """A picture in [0, 1] as (1 or ``count``, C, H, W): C is 3 for "RGB", 1 for "L"."""
    channels = len(mode)
    if isinstance(image, Tensor):
        image = image.float()
        found = image[None] if mode == "L" and image.ndim == 2 else image
        found = found[None] if found.ndim == 3 else found
        if found.ndim != 4 or found.shape[1] != channels:
            shape = tuple(image.shape)
            raise ValueError(
                f"{name} has shape {shape}; expected (B, {channels}, H, W)"
            )
        check_tensor(name, found, height, width, count)
        return found
    image = in_rgb(image) if mode == "RGB" else in_gray(image)
    if image.size != (width, height):
        image = image.resize((width, height), resample=1)
    values = torch.from_numpy(np.array(image, dtype=np.float32) / 255)
    # (H, W) or (H, W, 3) → (1, C, H, W)
    return values.reshape(*values.shape[:2], channels).permute(2, 0, 1)[None]


def check_tensor(name: str, image: Tensor, height: int, width: int, count: int) -> None:
    """Raise ValueError unless ``image`` is in [0, 1], and as large as asked for."""
    if len(image) not in (1, count):
        found = f"{name} has {len(image)} pictures"
        raise ValueError(f"{found}; expected 1 or {count}")
    (h, w), (low, high) = image.shape[2:], image.aminmax()
    if not 0 <= low <= high <= 1:
        raise ValueError(f"{name} has values from {low:g} to {high:g}; expected 0 to 1")
    if (w, h) != (width, height):
        found = f"{name} is a tensor of {w}×{h} pixels"
        raise ValueError(f"{found}; expected {width}×{height}")


def encode(pipe: Pipeline, pictures: Tensor, seeds: range) -> tuple[Tensor, Tensor]:
    """Scaled latents of ``pictures`` and noise, each (B, C, h, w), one row a seed."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    posterior = pipe.vae.encode(pictures.to(pipe.device, pipe.dtype))
    rows = [
        Posterior(posterior.mean[i : i + 1], posterior.logvar[i : i + 1])
        for i in range(len(pictures))
    ]
    drawn = [rows[i % len(rows)].sample(g) for i, g in enumerate(generators)]
    data = pipe.vae.scale(torch.cat(drawn)).float()  # B × (1, C, h, w) → (B, C, h, w)
    noise = [torch.randn(data.shape[1:], generator=g) for g in generators]
    return data, torch.stack(noise).to(data.device)  # B × (C, h, w) → (B, C, h, w)


# Inpainting


class Keep:
    """A callback that puts the picture back outside the mask, at the level reached."""

    def __init__(
        self,
        data: Tensor,
        noise: Tensor,
        mask: Tensor,
        sigmas: Tensor,
        then: output.Callback | None,
    ) -> None:
        self.data, self.noise, self.mask = data, noise, mask
        self.sigmas, self.then = sigmas, then

    def __call__(
        self, pipe: Pipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        known = interpolate(self.data, self.noise, self.sigmas[step + 1].item())
        latents = (1 - self.mask) * known + self.mask * tensors["latents"]
        tensors["latents"] = latents
        changed = self.then(pipe, step, timestep, tensors) if self.then else None
        return {"latents": latents} | (changed or {})
