"""Image to image, and inpainting: begin part of the way, from a picture.

Meng et al. 2022 (SDEdit), section 3. A picture's latent is mixed with noise of a level,
and only the rest of the schedule is solved; with a mask, everything outside of it is
put back after each step. Steps, numbers and random draws are those of diffusers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from minidiff.files.pictures import in_gray, in_rgb, is_transparent, open_picture
from minidiff.flow_matching import interpolate
from minidiff.interface import checks
from minidiff.interface.request import Callback, Request, check_names, noted
from minidiff.sampling import Drawn, Pipeline, sides
from minidiff.vae import Posterior

if TYPE_CHECKING:
    from PIL.Image import Image

    Single = Image | Tensor | np.ndarray | Path | str
    Picture = Single | Sequence[Single]

# Of a pipeline's call, all but what follows from the picture and the strength here
KNOWN = [n for n in Request.__dataclass_fields__ if n not in ("_", "latents", "sigmas")]


def image_to_image(
    pipe: Pipeline,
    prompt: checks.Texts,
    image: "Picture",
    strength: float = 0.6,
    mask_image: "Picture | None" = None,
    **call: Any,
) -> Drawn:
    """Draw ``prompt`` over ``image``: of the steps, the last ``strength`` part.

    ``image`` is a PIL picture, a file, a tensor (3, H, W) or (B, 3, H, W) in [0, 1], an
    array (H, W, 3) or (B, H, W, 3) of such numbers or of bytes, or a list of these. PIL
    pictures and files are resized where ``height`` or ``width`` ask for it.
    ``mask_image``, of the picture's size, is white where to draw and black where to
    keep. Picture i draws first its latent, then its noise from seed + i. All else is as
    in a call of the pipeline. Raises ValueError or TypeError before any work.
    """
    check_names("image_to_image", call, KNOWN)
    return Start(image, strength, mask_image).draw(pipe, Request(prompt, **call))


@dataclass(frozen=True, eq=False)
class Start:
    """A picture to begin from, or one for each drawing, and what of it may change.

    Raises ValueError or TypeError for what are no pictures, or not of one size.
    """

    image: "Picture"
    strength: float = 0.6
    mask_image: "Picture | None" = None
    images: list[Any] = field(init=False)
    masks: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        checks.check_strength(self.strength)
        object.__setattr__(self, "images", open_pictures("image", self.image))
        mask = self.mask_image
        masks = [] if mask is None else open_pictures("mask_image", mask)
        object.__setattr__(self, "masks", masks)
        width, height = self.size
        for name, opened in (("picture", self.images), ("mask", self.masks)):
            for w, h in map(size_of, opened):
                if (w, h) != (width, height):
                    found = f"the {name} is {w}×{h} pixels"
                    raise ValueError(
                        f"{found}; expected the picture's {width}×{height}"
                    )

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return size_of(self.images[0])

    @property
    def settings(self) -> dict[str, Any]:
        """What a picture notes of it."""
        told = {"image": self.image, "strength": self.strength}
        return told | (
            {} if self.mask_image is None else {"mask_image": self.mask_image}
        )

    def check(self, pipe: Pipeline, request: Request) -> Request:
        """``request`` as ``pipe.check`` returns it, with the levels left to run."""
        width, height = map(checks.given, (request.width, request.height), self.size)
        steps = checks.given(request.steps, pipe.defaults.num_inference_steps)
        sigmas = pipe.scheduler.sigmas(steps)
        sigmas = sigmas[first_step(len(sigmas) - 1, self.strength) :]  # left to run
        request = replace(request, sigmas=sigmas, width=width, height=height)
        try:
            sides(pipe, request)
        except ValueError as error:
            known = "height and width resize a PIL picture or a file"
            raise ValueError(f"{error}; {known}") from None
        return pipe.check(request)

    @torch.no_grad()
    def draw(self, pipe: Pipeline, request: Request) -> Drawn:
        """The pictures of a request that begin from here."""
        steps = checks.given(request.steps, pipe.defaults.num_inference_steps)
        request = self.check(pipe, request)
        sigmas, then = request.sigmas, request.callback_on_step_end
        assert sigmas is not None
        size = *request.size, request.count
        pictures = as_tensors("image", self.images, "RGB", *size) * 2 - 1
        masks = as_tensors("mask_image", self.masks, "L", *size) if self.masks else None
        data, noise = encode(pipe, pictures, request.seeds)
        if masks is not None:
            mask = F.interpolate((masks >= 0.5).float(), data.shape[2:])
            then = Keep(data, noise, mask.to(data), sigmas, then)  # mask (M, 1, h, w)
        latents = interpolate(data, noise, sigmas[0].item())
        drawn = pipe.draw(replace(request, latents=latents, callback_on_step_end=then))
        if isinstance(drawn, list):
            told = replace(request, sigmas=None, num_inference_steps=steps)
            noted(drawn, pipe.about, told, **self.settings)
        return drawn


def first_step(steps: int, strength: float) -> int:
    """The first of ``steps`` to run, by diffusers' rule; ValueError if none is left."""
    checks.check_strength(strength)
    first = int(steps - min(steps * strength, steps))
    if first >= steps:
        raise ValueError(f"strength {strength} of {steps} steps leaves none to run")
    return first


# Pictures


def open_pictures(name: str, value: Any) -> list[Any]:
    """One picture or several, opened: each a PIL picture, or a tensor (…, H, W).

    Raises ValueError or TypeError for what is none.
    """
    if isinstance(value, list | tuple):
        if not value:
            raise ValueError(f"{name} is an empty list; expected at least one picture")
        return [picture for one in value for picture in open_pictures(name, one)]
    opened = from_array(name, value) if isinstance(value, np.ndarray) else value
    opened = open_file(opened)
    if isinstance(opened, Tensor):
        checks.check_dense(name, opened)
        if opened.ndim < 2 or not opened.numel():
            found = f"{name} has shape {tuple(opened.shape)}"
            raise ValueError(f"{found}; expected (…, H, W)")
    elif not hasattr(opened, "convert"):
        found = f"{name} is a {type(opened).__name__}"
        known = "a PIL picture, a file, a tensor, an array, or a list of these"
        raise TypeError(f"{found}; expected {known}")
    return [opened]


def open_file(image: Any) -> Any:
    """The picture in a file; all else comes back as it is.

    Warns of what is transparent: a picture is laid on white, a mask seen without it.
    """
    if not isinstance(image, str | Path):
        return image
    picture = open_picture(image)
    if is_transparent(picture):
        what = "they lie on white, or in a mask count with their own colour"
        checks.warn(f"{image} is transparent in parts; {what}")
    return picture


def from_array(name: str, array: np.ndarray) -> Tensor:
    """An array (H, W) or (…, H, W, C), bytes or in [0, 1] → (H, W) or (…, C, H, W)."""
    if array.dtype.kind not in "uf" or array.dtype.kind == "u" and array.itemsize > 1:
        found = f"{name} is an array of {array.dtype}"
        raise TypeError(f"{found}; expected uint8, or fractions from 0 to 1")
    values = torch.from_numpy(array.astype(np.float32))
    values = values / 255 if array.dtype == np.uint8 else values
    return values if values.ndim < 3 else values.movedim(-1, -3)


def size_of(image: Any) -> tuple[int, int]:
    """(width, height) of a PIL picture or a tensor (…, H, W)."""
    if isinstance(image, Tensor):
        return image.shape[-1], image.shape[-2]
    return image.size


def as_tensors(
    name: str, images: Sequence[Any], mode: str, height: int, width: int, count: int
) -> Tensor:
    """Pictures in [0, 1] as (1 or ``count``, C, H, W): C is 3 for "RGB", 1 for "L"."""
    found = torch.cat([as_tensor(name, x, mode, height, width) for x in images])
    if len(found) not in (1, count):
        raise ValueError(f"{name} has {len(found)} pictures; expected 1 or {count}")
    return found


def as_tensor(name: str, image: Any, mode: str, height: int, width: int) -> Tensor:
    """One of them as (B, C, H, W); a tensor may hold several."""
    channels = len(mode)
    if isinstance(image, Tensor):
        found = image.float()[(None,) * (4 - image.ndim)]
        if found.ndim != 4 or found.shape[1] != channels or image.ndim == 2 < channels:
            wanted = f"expected (B, {channels}, H, W)"
            raise ValueError(f"{name} has shape {tuple(image.shape)}; {wanted}")
        check_values(name, found, height, width)
        return found
    image = in_rgb(image) if mode == "RGB" else in_gray(image)
    if image.size != (width, height):
        image = image.resize((width, height), resample=1)
    values = torch.from_numpy(np.array(image, dtype=np.float32) / 255)
    # (H, W) or (H, W, 3) → (1, C, H, W)
    return values.reshape(*values.shape[:2], channels).permute(2, 0, 1)[None]


def check_values(name: str, image: Tensor, height: int, width: int) -> None:
    """Raise ValueError unless ``image`` is in [0, 1], and as large as asked for."""
    (h, w), (low, high) = image.shape[2:], image.aminmax()
    if not 0 <= low <= high <= 1:
        raise ValueError(f"{name} has values from {low:g} to {high:g}; expected 0 to 1")
    if (w, h) != (width, height):
        found = f"{name} is a tensor of {w}×{h} pixels"
        raise ValueError(f"{found}; expected {width}×{height}")


def encode(pipe: Pipeline, pictures: Tensor, seeds: range) -> tuple[Tensor, Tensor]:
    """Scaled latents of ``pictures`` and noise, each (B, C, h, w), one row a seed.

    Raises ValueError, naming the layer, where latents are not finite.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    read = partial(pipe.vae.encode, pictures.to(pipe.device, pipe.dtype))
    posterior = read()
    rows = [
        Posterior(posterior.mean[i : i + 1], posterior.logvar[i : i + 1])
        for i in range(len(pictures))
    ]
    drawn = [rows[i % len(rows)].sample(g) for i, g in enumerate(generators)]
    data = pipe.vae.scale(torch.cat(drawn)).float()  # B × (1, C, h, w) → (B, C, h, w)
    if line := checks.overflow("the encoding of image", data, read, vae=pipe.vae):
        raise ValueError(line)
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
        then: Callback | None,
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
        return {"latents": latents} | checks.check_changes(changed)
