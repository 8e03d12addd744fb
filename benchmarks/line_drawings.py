"""A manner learned from twenty line drawings: is it learned, is the subject kept?

The model draws twenty garments, which are turned into line drawings; `minidiff train
--from tiny --lora` learns them. Of prompts that are no captions it is then counted how
often a picture is a line drawing (it looks more like the lines of the model's own
picture than like that picture), and how often its subject is kept (of all prompts'
lines those of its own prompt are the nearest). Last, diffusers draws with the file.

Run: python benchmarks/line_drawings.py FOLDER
"""

import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import minidiff
from minidiff.files.pictures import save_sheet, to_pil
from minidiff.files.weights import TINY
from minidiff.recipes.finetune import FinetuneOptions, LoraConfig, finetune_pictures
from minidiff.sampling import Pipeline

GARMENTS = ("dress", "coat", "bag", "shirt", "sneaker")
LEARNED, OTHERS = ("red", "blue", "green", "yellow"), ("purple", "orange", "pink")


def line_drawing(pictures: Tensor) -> Tensor:
    """Dark lines on white where (B, 3, H, W), in [0, 1], changes its brightness."""
    gray = F.avg_pool2d(pictures.mean(1, keepdim=True), 3, 1)
    gray = F.pad(gray, (2, 2, 2, 2), mode="replicate")  # → (B, 1, H + 2, W + 2)
    across = gray[..., 1:-1, 2:] - gray[..., 1:-1, :-2]
    down = gray[..., 2:, 1:-1] - gray[..., :-2, 1:-1]
    return (1 - 4 * torch.hypot(across, down)).clamp(0, 1).expand(-1, 3, -1, -1)


def prompts(colours: tuple[str, ...]) -> list[str]:
    named = [f"a {colour} {garment}" for garment in GARMENTS for colour in colours]
    return [f"{name} on a white background" for name in named]


def draw(pipe: Pipeline, texts: list[str], seed: int) -> Tensor:
    parts = [texts[i : i + 5] for i in range(0, len(texts), 5)]
    how = {"num_inference_steps": 12, "output_type": "pt"}
    return torch.cat([pipe(p, seed=seed + 5 * i, **how) for i, p in enumerate(parts)])


def likeness(a: Tensor, b: Tensor) -> Tensor:
    """The correlation of each picture in ``a`` with each in ``b``, a little blurred."""
    soft = [F.avg_pool2d(x.mean(1, keepdim=True), 4).flatten(1) for x in (a, b)]
    unit = [F.normalize(x - x.mean(1, keepdim=True), dim=1) for x in soft]
    return unit[0] @ unit[1].mT


def learn(pipe: Pipeline, folder: Path) -> Path:
    """The LoRA of twenty line drawings of the model's own garments."""
    texts, data = prompts(LEARNED), folder / "pictures"
    data.mkdir(parents=True, exist_ok=True)
    drawn = to_pil(line_drawing(draw(pipe, texts, seed=100)))
    for i, (picture, text) in enumerate(zip(drawn, texts, strict=True)):
        picture.save(data / f"{i}.png")
        (data / f"{i}.txt").write_text(text)
    how = {"steps": 200, "batch_size": 8, "learning_rate": 1e-2}
    lora = LoraConfig(rank=8)
    return finetune_pictures(
        FinetuneOptions("tiny", data, folder / "ink", lora=lora, **how)
    )


def told(pictures: Tensor, photos: Tensor) -> str:
    """How many are line drawings, and how many keep their subject."""
    lines = line_drawing(photos)
    drawn = likeness(pictures, lines).diagonal() > likeness(pictures, photos).diagonal()
    own = likeness(pictures, lines).argmax(1) == torch.arange(len(pictures))
    share, kept = (x.float().mean() for x in (drawn, own))
    return f"line drawings {share:.2f}, subject kept {kept:.2f}"


def their_difference(pipe: Pipeline, file: Path) -> float:
    """The largest difference of a pixel to what diffusers draws with the file."""
    from diffusers import StableDiffusion3Pipeline

    theirs = StableDiffusion3Pipeline.from_pretrained(TINY, torch_dtype=torch.float32)
    theirs.load_lora_weights(str(file.parent))
    text, noise = prompts(OTHERS)[0], pipe.prepare_latents(1, seed=0)
    theirs.set_progress_bar_config(disable=True)
    drawn = theirs(
        text,
        latents=noise,
        num_inference_steps=12,
        guidance_scale=pipe.defaults.guidance_scale,
        max_sequence_length=pipe.max_sequence_length,
        output_type="pt",
    ).images
    ours = pipe(text, latents=noise, num_inference_steps=12, output_type="pt")
    return (ours - drawn).abs().max().item()


def main(folder: Path) -> None:
    pipe = minidiff.load("tiny")
    pipe.progress = False
    file, texts = learn(pipe, folder), prompts(OTHERS)
    photos = draw(pipe, texts, seed=0)
    print("the model:   ", told(photos, photos))
    pipe.adapters.load(file)
    styled = draw(pipe, texts, seed=0)
    print("with the LoRA:", told(styled, photos))
    print(f"diffusers' picture differs by at most {their_difference(pipe, file):.1e}")
    save_sheet(torch.cat([photos, styled]), len(texts), folder / "styled.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
