"""The book's interactive figures, as frames.

On a page of the book the model that draws in the browser opens in their place; in
JupyterLab, and where scripts are off, the frames stay.
"""

import base64
import html
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_pictures(images: Any, low: float = -1.0) -> np.ndarray:
    """(B, H, W, 3) uint8 from float (B, 3, H, W) or (3, H, W) in [``low``, 1], from
    uint8 of these shapes or (B, H, W), or from a list of PIL pictures of one size."""
    if not isinstance(images, (Tensor, np.ndarray)):
        return np.stack([np.asarray(image.convert("RGB")) for image in images])
    x = torch.as_tensor(images).detach().cpu()
    if x.is_floating_point():
        x = ((x.float() - low) / (1 - low) * 255).round().clamp(0, 255).byte()
        x = x[None] if x.ndim == 3 else x
    elif x.ndim == 3:
        x = x[:, None]  # (B, H, W) → (B, 1, H, W)
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"pictures of shape {tuple(x.shape)}: expected (B, 3, H, W)")
    x = x.expand(-1, 3, -1, -1)  # (B, 1 or 3, H, W) → (B, 3, H, W)
    return x.permute(0, 2, 3, 1).numpy()  # (B, 3, H, W) → (B, H, W, 3)


def latent_pictures(latents: Tensor) -> np.ndarray:
    """(S, h, w, 3) uint8: latents (S, C, h, w) along the three directions in which
    the last of them varies most, as red, green and blue."""
    x = latents.detach().cpu().double()
    last = x[-1].flatten(1)  # (C, h, w) → (C, h·w)
    last = last - last.mean(1, keepdim=True)
    axes = torch.linalg.svd(last, full_matrices=False).U[:, :3]  # (C, 3)
    axes = axes * axes[axes.abs().argmax(0), range(axes.shape[1])].sign()
    rgb = torch.einsum("schw,cd->shwd", x, axes)
    middle = rgb[-1].mean((0, 1))
    spread = 2.5 * rgb[-1].std((0, 1)).clamp(min=1e-6)
    rgb = ((rgb - middle) / spread / 2 + 0.5).clamp(0, 1)
    return (rgb * 255).round().byte().numpy()


def to_frames(values: Tensor) -> np.ndarray:
    """(S, H, W, 3) uint8 of pictures (S, 3, H, W), or of latents (S, C, h, w)."""
    return to_pictures(values) if values.shape[1] == 3 else latent_pictures(values)


@dataclass(frozen=True)
class Interactive:
    """Frames of a drawing, in whose place the book's pages open the live model.

    ``picture`` and ``frames`` are PNGs, ``label`` says what they show. With frames
    ``station`` is the part of the page "Inside a picture" that opens there; without, a
    ``sketch`` in base64 lies on the pad.
    """

    prompt: str
    label: str
    picture: bytes
    frames: bytes = b""
    station: str = ""
    model: str = "tiny"
    sketch: str = ""

    def __repr__(self) -> str:
        return f"{self.station or 'sketch'}: {self.label}"

    def _repr_html_(self) -> str:
        prompt, label = (html.escape(x, quote=True) for x in (self.prompt, self.label))
        known = {"model": self.model, "open": self.station, "sketch": self.sketch}
        known["examples"] = html.escape(json.dumps([self.prompt]), quote=True)
        data = " ".join(f'data-{name}="{x}"' for name, x in known.items() if x)
        inside = " minidiff-inside" if self.frames else ""
        below = f"<figcaption>{label}</figcaption>"
        if self.frames:
            url = _data_url(self.frames)
            frames = f'<img class="dark-light" width="100%" src="{url}" alt="{label}">'
            below = f'<div class="inside-frames">{frames}\n{below}</div>'
        return (
            f'<figure class="minidiff-live{inside}" {data}>\n'
            f'<img class="dark-light" src="{_data_url(self.picture)}" width="192" '
            f'alt="the picture drawn for “{prompt}”" data-prompt="{prompt}">\n'
            f"{below}\n</figure>"
        )


def _png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png", optimize=True)
    return buffer.getvalue()


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _resized(pictures: np.ndarray, height: int) -> np.ndarray:
    """Pictures (S, h, w, 3) at another height, without smoothing when they grow."""
    size = (height * pictures.shape[2] // pictures.shape[1], height)
    method = Image.Resampling.BOX
    return np.stack(
        [np.asarray(Image.fromarray(p).resize(size, method)) for p in pictures]
    )


def live_denoising(
    latents: Tensor,
    denoised: Tensor,
    pictures: Tensor,
    sigmas: Tensor | Sequence[float],
    prompt: str,
) -> Interactive:
    """A drawing step by step: latent, x̂₀ and picture, in at most seven frames.

    ``latents`` and ``denoised`` (the x̂₀ of each step): (S, C, h, w), or (S, 3, H, W)
    for pictures in [−1, 1]; ``pictures``, decoded: (S, 3, H, W) in [−1, 1]; ``sigmas``:
    (S,).
    """
    steps, rows = len(latents), (latents, denoised, pictures)
    if {*map(len, rows), len(sigmas)} != {steps}:
        found = [*map(len, rows), len(sigmas)]
        raise ValueError(f"{found} frames: expected as many of each")
    chosen = np.linspace(0, steps - 1, min(7, steps)).round().astype(int)
    frames = [np.hstack(list(_resized(to_frames(x)[chosen], 64))) for x in rows]
    levels = ", ".join(f"{float(sigmas[i]):.2f}" for i in chosen)
    label = f"“{prompt}”: latent, estimate x̂₀ and its picture, at σ = {levels}"
    last = to_pictures(pictures)[-1]
    whole = _png(np.concatenate(frames))
    return Interactive(prompt, label, _png(last), whole, "steps")


def live_attention(
    maps: Tensor, words: Sequence[str], image: Tensor, prompt: str
) -> Interactive:
    """Where each word is read: ``maps`` (N, h, w), each relative to its maximum, over
    the picture ``image`` (3, H, W) in [−1, 1]."""
    shape = tuple(maps.shape)
    if maps.ndim != 3 or shape[0] != len(words):
        raise ValueError(f"maps {shape}: expected ({len(words)} words, h, w)")
    picture = to_pictures(image)[0]
    frames = np.hstack([_overlay(x, picture) for x in maps])
    label = "Where attention finds each word: " + ", ".join(words)
    return Interactive(prompt, label, _png(picture), _png(frames), "attention")


def live_sketch(sketch: Tensor, image: Tensor, prompt: str) -> Interactive:
    """A pad with a sketch (1, H, W) of 0 and 1, beside what was drawn by it.

    ``image``: (3, H, W) in [−1, 1].
    """
    if sketch.shape[1:] != image.shape[1:]:
        shapes = tuple(sketch.shape), tuple(image.shape)
        raise ValueError(f"sketch and image are {shapes}: expected one size")
    bits = np.packbits(sketch.detach().cpu().bool().flatten().numpy())
    lines = base64.urlsafe_b64encode(bits.tobytes()).decode()
    label = f"“{prompt}”, by the edges of another picture"
    drawn = _png(to_pictures(image)[0])
    return Interactive(prompt, label, drawn, model="tiny-turbo-edges", sketch=lines)


def _overlay(values: Tensor, picture: np.ndarray) -> np.ndarray:
    """The heat map (h, w), relative to its maximum, over the darkened grey picture."""
    x = values.detach().cpu().double().clamp(min=0)
    heat = (255 * x / x.amax().clamp(min=1e-30)).round().long().numpy()
    scale = [p // v for p, v in zip(picture.shape, heat.shape, strict=False)]
    color = np.kron(_palette()[heat], np.ones((*scale, 1)))
    grey = picture.mean(-1, keepdims=True)
    return (0.3 * grey + 0.7 * color).round().astype(np.uint8)


def _palette() -> np.ndarray:
    """256 colours (256, 3) from black over purple and orange to pale yellow."""
    stops = [0, 64, 128, 192, 255]
    ramps = (0, 87, 188, 249, 252), (0, 16, 55, 142, 255), (4, 110, 84, 9, 164)
    return np.stack([np.interp(range(256), stops, ramp) for ramp in ramps], 1)
