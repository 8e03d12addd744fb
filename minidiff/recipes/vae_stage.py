"""The stage of the autoencoder: reconstruction, and the scale of its latents."""

from dataclasses import replace

import torch
from torch import Tensor

from minidiff.data import rng
from minidiff.files.pictures import from_bytes
from minidiff.judging.distances import psnr_by_picture
from minidiff.recipes.features import place_in_pool
from minidiff.recipes.job import Job, Lesson, export_part
from minidiff.recipes.text_stages import picture_pool
from minidiff.training import Batch, Task, vae_loss
from minidiff.vae import VAE, Upsample


class UncompiledUpsample(Upsample):
    """``Upsample``, left out of compilation.

    On a CPU, in bfloat16, PyTorch 2.13's inductor makes zeros of the gradient that
    flows back through nearest-neighbour upsampling: all layers before it stand still.
    """

    forward = torch.compiler.disable(Upsample.forward)


def compilable(vae: VAE) -> VAE:
    """The same autoencoder, safe to compile on a CPU."""
    for layer in vae.modules():
        if isinstance(layer, Upsample):
            layer.__class__ = UncompiledUpsample
    return vae


def vae_lesson(job: Job) -> Lesson:
    """The autoencoder, and the shift and scale of its latents."""
    recipe, images = job.recipe, picture_pool(job.scenes(), job.recipe.pictures)[0]
    vae = job.begin_part("vae").to(job.device, memory_format=torch.channels_last)
    vae = compilable(vae) if job.device == "cpu" else vae
    config = vae.config
    seed, side = job.seed_for("posterior"), images.shape[-1] // config.factor
    shape = (config.latent_channels, side, side)
    held = torch.arange(recipe.held, device=job.device)
    tests = job.scenes(split="test").batch(held).images

    def batch(indices: Tensor) -> Batch:
        place = place_in_pool(indices, len(images))
        noise = rng.normal(seed, indices, shape)
        return {"images": from_bytes(images[place]), "noise": noise}

    @torch.no_grad()
    def validate(vae: VAE) -> dict[str, float]:
        decoded = vae.decode(vae.encode(tests).mode())
        return {"psnr": psnr_by_picture(decoded, tests).mean().item()}

    def export(vae: VAE) -> None:
        export_part(job, measured(vae, from_bytes(images[:1024])), "vae")

    return Lesson(Task(vae, vae_loss, batch, validate), export)


def chunk_size(device: torch.device) -> int:
    """How many pictures are encoded at once: what the caches of ``device`` hold."""
    return 64 if device.type == "cpu" else 2048


@torch.no_grad()
def measured(vae: VAE, images: Tensor) -> VAE:
    """The same weights with shift and scale that make latents of mean 0, variance 1."""
    latents = vae.encode(images).mode()
    shift, scale = latents.mean().item(), 1 / latents.std().item()
    config = replace(vae.config, shift_factor=shift, scaling_factor=scale)
    copy = VAE(config).to(images.device)
    copy.load_state_dict(vae.state_dict())
    return copy.eval()
