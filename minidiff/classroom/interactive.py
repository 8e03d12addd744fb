"""The book's two interactive figures: one piece of HTML each, needing nothing else.

Each carries its pictures, its style and its script, works in a static page and in
JupyterLab without a kernel, and shows a plain strip of frames where scripts are off.
"""

import base64
import html
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minidiff.files.disk import write_text

ASSETS = Path(__file__).parent / "assets"
LIMIT = 1_000_000  # bytes of HTML


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
    """An interactive figure; a notebook shows it by its HTML.

    ``kind`` names its script in ``ASSETS``, ``data`` goes to it as JSON, and
    ``strip`` is the plain picture shown until the script runs.
    """

    kind: str
    label: str
    data: dict[str, Any]
    strip: bytes

    def __repr__(self) -> str:
        return f"{self.kind}: {self.label}"

    def _repr_html_(self) -> str:
        data = json.dumps(self.data, separators=(",", ":")).replace("<", "\\u003c")
        label = html.escape(self.label, quote=True)
        files = "figures.css", f"{self.kind}.js"
        style, script = ((ASSETS / name).read_text("utf-8") for name in files)
        text = (
            f'<figure class="minidiff-figure" data-kind="{self.kind}" '
            f'aria-label="{label}">\n<img class="minidiff-strip dark-light" '
            f'src="{_data_url(self.strip)}" alt="{label}">\n'
            f'<script type="application/json">{data}</script>\n'
            f"<style>{style}</style>\n<script>{script}</script>\n</figure>"
        )
        if len(text) > LIMIT:
            raise ValueError(f"figure of {len(text)} bytes: expected at most {LIMIT}")
        return text

    def save(self, path: str | Path) -> None:
        """Write the figure as a page of its own."""
        head = '<!doctype html><html lang="en"><meta charset="utf-8">'
        head += '<meta name="viewport" content="width=device-width">'
        head += f"<title>{html.escape(self.label)}</title>"
        write_text(path, f"{head}{self._repr_html_()}</html>\n")


def _png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png", optimize=True)
    return buffer.getvalue()


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _strip(pictures: np.ndarray) -> str:
    """Pictures (S, h, w, 3) side by side, as the address of a PNG."""
    return _data_url(_png(np.hstack(list(pictures))))


def _resized(pictures: np.ndarray, height: int) -> np.ndarray:
    """Pictures (S, h, w, 3) at another height, without smoothing when they grow."""
    size = (height * pictures.shape[2] // pictures.shape[1], height)
    method = Image.Resampling.BOX
    return np.stack(
        [np.asarray(Image.fromarray(p).resize(size, method)) for p in pictures]
    )


def denoising_scrubber(
    latents: Tensor,
    denoised: Tensor,
    pictures: Tensor,
    sigmas: Tensor | Sequence[float],
    prompt: str = "",
) -> Interactive:
    """A slider over the steps: latent, x̂₀ and picture side by side.

    ``latents`` and ``denoised`` (the x̂₀ of each step): (S, C, h, w), or (S, 3, H, W)
    for pictures in [−1, 1]; ``pictures``, decoded: (S, 3, H, W) in [−1, 1]; ``sigmas``:
    (S,). S is the number of positions of the slider.
    """
    steps = len(latents)
    rows = [("latent x", latents), ("denoised x̂₀", denoised), ("picture", pictures)]
    if any(len(values) != steps for _, values in rows) or len(sigmas) != steps:
        found = [len(values) for _, values in rows] + [len(sigmas)]
        raise ValueError(f"{found} frames: expected as many of each")
    frames = [to_frames(values) for _, values in rows]
    chosen = np.linspace(0, steps - 1, min(7, steps)).round().astype(int)
    strip = np.concatenate([np.hstack(list(_resized(f[chosen], 64))) for f in frames])
    data = {
        "label": f"Denoising of “{prompt}”" if prompt else "Denoising",
        "sigmas": [round(float(s), 3) for s in sigmas],
        "rows": [
            {"name": name, "size": f.shape[1:3], "sprite": _strip(f)}
            for (name, _), f in zip(rows, frames, strict=True)
        ],
    }
    label = f"{data['label']}: latent, denoised estimate and picture at {steps} steps"
    return Interactive("scrubber", label, data, _png(strip))


def attention_explorer(
    maps: Tensor,
    words: Sequence[str],
    images: Tensor,
    blocks: Sequence[str] | None = None,
    steps: Sequence[str] | None = None,
) -> Interactive:
    """Choose a word and see where it is found; choose a patch and see what it reads.

    ``maps``: (B, S, N, h, w), for each block, step and word a map over the patches,
    shown relative to its maximum; ``images``: the picture of each step (S, 3, H, W) or
    one for all (3, H, W), in [−1, 1]; ``blocks``, ``steps``: names.
    """
    shape = tuple(maps.shape)
    if maps.ndim != 5 or shape[2] != len(words):
        raise ValueError(f"maps {shape}: expected (B, S, {len(words)} words, h, w)")
    pictures = to_pictures(images)
    if len(pictures) not in (1, shape[1]):
        raise ValueError(f"{len(pictures)} images: expected 1 or {shape[1]}, the steps")
    data = {
        "label": "Attention between words and patches",
        "words": list(words),
        "blocks": list(blocks or (f"block {i}" for i in range(shape[0]))),
        "steps": list(steps or (f"step {i}" for i in range(shape[1]))),
        "grid": shape[3:],
        "size": pictures.shape[1:3],
        "pictures": len(pictures),
        "sprite": _strip(pictures),
        "maps": _bytes(maps, (3, 4)),
        "reads": _bytes(maps.permute(0, 1, 3, 4, 2), (4,)),  # → (B, S, h, w, N)
        "palette": _palette(),
    }
    strip = np.hstack([_overlay(m, pictures[-1]) for m in maps[-1, -1]])
    label = "Where attention finds each word: " + ", ".join(words)
    return Interactive("explorer", label, data, _png(strip))


def _scaled(values: Tensor, axes: tuple[int, ...]) -> np.ndarray:
    """Values relative to their maximum over ``axes``, as uint8."""
    x = values.detach().cpu().double().clamp(min=0)
    return (
        (255 * x / x.amax(axes, keepdim=True).clamp(min=1e-30)).round().byte().numpy()
    )


def _bytes(values: Tensor, axes: tuple[int, ...]) -> str:
    return base64.b64encode(_scaled(values, axes).tobytes()).decode()


def _palette() -> str:
    """256 colours from black over purple and orange to pale yellow, as base64."""
    stops = [0, 64, 128, 192, 255]
    red, green, blue = (
        (0, 87, 188, 249, 252),
        (0, 16, 55, 142, 255),
        (4, 110, 84, 9, 164),
    )
    ramp = [np.interp(range(256), stops, c) for c in (red, green, blue)]
    return base64.b64encode(
        np.stack(ramp, 1).round().astype(np.uint8).tobytes()
    ).decode()


def _overlay(values: Tensor, picture: np.ndarray) -> np.ndarray:
    """The heat map (h, w) over the darkened grey picture, as the script draws it."""
    palette = np.frombuffer(base64.b64decode(_palette()), np.uint8).reshape(256, 3)
    heat = _scaled(values, (0, 1))
    scale = [p // v for p, v in zip(picture.shape, heat.shape, strict=False)]
    color = np.kron(palette[heat], np.ones((*scale, 1)))
    grey = picture.mean(-1, keepdims=True)
    return (0.3 * grey + 0.7 * color).round().astype(np.uint8)
