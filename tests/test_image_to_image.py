"""Image to image and inpainting: diffusers' pictures, random draws included."""

import math
import struct
import zlib

import numpy as np
import pytest
import torch
from helpers import relative_error
from PIL import Image, ImageOps
from pipelines import pair

import minidiff
from minidiff.drawing import image_to_image as module
from minidiff.drawing.image_to_image import first_step, image_to_image, open_file
from minidiff.engine import memory

BOUND = 1e-5
STRENGTHS = (0.6, 0.35, 1.0)
MASKED = ((0.6, 4.0), (1.0, 1.0))  # strength and guidance
CALL = {"num_inference_steps": 10, "guidance_scale": 4.0, "negative_prompt": "a bag"}
CALL |= {"prompt": ["a red dress", "a coat"], "max_sequence_length": 20}


def trio(folder):
    """Our pipeline, and diffusers' two for pictures and for masks."""
    from diffusers import (
        StableDiffusion3Img2ImgPipeline,
        StableDiffusion3InpaintPipeline,
    )

    pipe, reference = pair(folder)
    found = [pipe]
    for kind in (StableDiffusion3Img2ImgPipeline, StableDiffusion3InpaintPipeline):
        other = kind.from_pipe(reference)
        other.set_progress_bar_config(disable=True)
        found.append(other)
    return found


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    return trio(tmp_path_factory.mktemp("model"))


def picture(height=32, width=32, count=2):
    return torch.rand(
        count, 3, height, width, generator=torch.Generator().manual_seed(1)
    )


def mask_of(height=32, width=32):
    mask = torch.zeros(1, 1, height, width)
    mask[..., 5:20, 9:] = 1
    return mask


def generators(count, seed=3):
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def theirs(pipe, image, strength, **call):
    height, width = image.shape[2:] if hasattr(image, "shape") else image.size[::-1]
    return pipe(
        **CALL | {"output_type": "latent"} | call,
        image=image,
        strength=strength,
        height=height,
        width=width,
    ).images


def ours(pipe, image, strength, mask=None, **call):
    call = CALL | {"output_type": "latent", "seed": 3} | call
    return image_to_image(pipe, image=image, strength=strength, mask_image=mask, **call)


def image_error(pipes, strength):
    pipe, reference, _ = pipes
    image = picture(24, 40)
    expected = theirs(reference, image, strength, generator=generators(2))
    return relative_error(ours(pipe, image, strength), expected)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_same_as_diffusers(pipes, strength):
    assert image_error(pipes, strength) <= BOUND


def test_same_from_pil_with_one_picture_for_one_prompt(pipes):
    pipe, reference, _ = pipes
    values = (picture(40, 32, 1)[0] * 255).to(torch.uint8).permute(1, 2, 0)
    image = Image.fromarray(values.numpy())
    call = {"prompt": "a coat", "output_type": "pt"}
    expected = theirs(reference, image, 0.6, generator=generators(1), **call)
    assert relative_error(ours(pipe, image, 0.6, **call), expected) <= BOUND
    resized = ours(pipe, image, 0.6, height=32, **call)
    call |= {"image": image, "strength": 0.6, "height": 32, "width": 32}
    again = reference(**CALL | call, generator=generators(1)).images
    assert relative_error(resized, again) <= BOUND


def inpainting_error(pipes, strength, scale):
    pipe, _, reference = pipes
    image, mask = picture(), mask_of()
    call = {"guidance_scale": scale}
    expected = theirs(
        reference, image, strength, mask_image=mask, generator=generators(2), **call
    )
    return relative_error(ours(pipe, image, strength, mask, **call), expected)


@pytest.mark.parametrize("strength, scale", MASKED)
def test_inpainting_same_as_diffusers(pipes, strength, scale):
    assert inpainting_error(pipes, strength, scale) <= BOUND


@torch.no_grad()
def test_inpainted_pictures_are_decoded_with_the_shift(pipes):
    """diffusers' own pipeline leaves it out, of inpainting alone."""
    pipe, _, reference = pipes
    call = {"mask_image": mask_of(), "generator": generators(2)}
    latents = theirs(reference, picture(), 0.6, **call)
    config = reference.vae.config
    shifted = latents / config.scaling_factor + config.shift_factor
    decoded = reference.vae.decode(shifted).sample / 2 + 0.5
    found = ours(pipe, picture(), 0.6, mask_of(), output_type="pt")
    assert relative_error(found, decoded.clamp(0, 1)) <= BOUND
    call["generator"] = generators(2)
    unshifted = theirs(reference, picture(), 0.6, output_type="pt", **call)
    assert relative_error(found, unshifted) > 1e-3


@pytest.mark.parametrize("form", ["list", "array", "bytes", "lists of files"])
def test_pictures_as_lists_and_arrays(pipes, tmp_path, form):
    """Two pictures, in each form the same as in one tensor."""
    values = (picture() * 255).round().byte()
    pixels = values.permute(0, 2, 3, 1).numpy()
    given = {"list": list(values / 255), "array": pixels / 255, "bytes": pixels}
    files = [tmp_path / f"{i}.png" for i in range(2)]
    for file, one in zip(files, pixels, strict=True):
        Image.fromarray(one).save(file)
    given["lists of files"] = files
    call = {"output_type": "np"}
    expected = ours(pipes[0], values / 255, 0.6, mask_of(), **call)
    masks = {"array": mask_of()[0, 0].numpy(), "list": [mask_of()[0]] * 2}
    found = ours(pipes[0], given[form], 0.6, masks.get(form, mask_of()), **call)
    assert found.shape == (2, 32, 32, 3) and abs(found - expected).max() < 1e-5


def mutant_interpolate(data, noise, sigma):
    return (1 - sigma**2) ** 0.5 * data + sigma * noise


def mutant_first_step(steps, strength):
    return first_step(steps, strength) + 1


@pytest.mark.parametrize(
    "name, mutant",
    [("interpolate", mutant_interpolate), ("first_step", mutant_first_step)],
)
def test_parity_catches(pipes, monkeypatch, name, mutant):
    pipe, reference, inpaint = pipes
    expected = theirs(reference, picture(), 0.6, generator=generators(2))
    call = {"generator": generators(2), "mask_image": mask_of()}
    masked = theirs(inpaint, picture(), 0.6, **call)
    monkeypatch.setattr(module, name, mutant)
    assert relative_error(ours(pipe, picture(), 0.6), expected) > 1e-4
    assert relative_error(ours(pipe, picture(), 0.6, mask_of()), masked) > 1e-4


def test_the_unmasked_part_stays(pipes):
    pipe = pipes[0]
    mask = mask_of()
    seen = []
    call = {"callback_on_step_end": lambda *a: seen.append(a[3]["latents"])}
    found = ours(pipe, picture(), 0.5, mask, **call)
    data, _ = module.encode(pipe, picture() * 2 - 1, range(3, 5))
    kept = torch.nn.functional.interpolate(mask, found.shape[2:])[0, 0] == 0
    assert torch.equal(found[..., kept], data[..., kept])
    assert len(seen) == 5 and torch.equal(seen[-1], found)


def test_a_grey_mask_is_cut_as_by_diffusers(pipes):
    pipe, _, reference = pipes
    mask = mask_of()
    mask[..., 5:12, 9:], mask[..., 12:16, 9:] = 0.4, 0.5
    call = {"mask_image": mask, "generator": generators(2)}
    expected = theirs(reference, picture(), 0.6, **call)
    assert relative_error(ours(pipe, picture(), 0.6, mask), expected) <= BOUND


def test_each_picture_is_its_own(pipes):
    both = ours(pipes[0], picture(), 0.6)
    for i, prompt in enumerate(CALL["prompt"]):
        call = {"prompt": prompt, "seed": 3 + i}
        alone = ours(pipes[0], picture()[i], 0.6, **call)
        torch.testing.assert_close(both[[i]], alone, rtol=1e-4, atol=1e-5)


def test_the_steps_that_diffusers_runs():
    assert [first_step(50, s) for s in (0.2, 0.6, 1.0, 0.01)] == [40, 20, 0, 49]
    for strength in (0, -1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="expected above 0, at most 1"):
            first_step(50, strength)


def test_a_photograph_stands_as_the_camera_was_held(tmp_path):
    """Cameras write the picture as the sensor sees it, and how it is to be turned."""
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn to the right
    stored = Image.new("RGB", (40, 24))
    stored.paste((255, 255, 255), (0, 0, 20, 24))
    stored.save(tmp_path / "photo.jpg", exif=exif)
    seen = open_file(tmp_path / "photo.jpg")
    assert seen.size == (24, 40) and seen.filename == str(tmp_path / "photo.jpg")
    assert min(seen.getpixel((12, 3))) > 240 and max(seen.getpixel((12, 37))) < 15


def damage(file, kind):
    """Write a picture that PIL cannot read."""
    if kind == "truncated":
        Image.new("RGB", (64, 64), "red").save(file, "JPEG")
        file.write_bytes(file.read_bytes()[:-200])
    elif kind == "too many pixels":
        header = chunk(b"IHDR", (60000, 60000, 8, 2, 0, 0, 0))
        file.write_bytes(b"\x89PNG\r\n\x1a\n" + header)
    else:
        file.write_bytes(b"no picture")


def chunk(kind, values):
    data = kind + struct.pack(">IIBBBBB", *values)
    return struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))


@pytest.mark.parametrize("kind", ["truncated", "too many pixels", "text"])
def test_a_damaged_picture_is_named(tmp_path, kind):
    damage(tmp_path / "photo.jpg", kind)
    with pytest.raises(ValueError, match="photo.jpg is not a picture that can be read"):
        open_file(tmp_path / "photo.jpg")


@pytest.mark.parametrize(
    "error", [struct.error("x"), TypeError("x"), AttributeError("x"), OSError("x")]
)
def test_damaged_notes_of_a_camera_are_named(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    monkeypatch.setattr(ImageOps, "exif_transpose", fail)
    with pytest.raises(ValueError, match="photo.png is not a picture that .*: x"):
        open_file(tmp_path / "photo.png")


def test_a_size_is_refused_before_pixels_are_read(pipes, monkeypatch):
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("work began"))
    monkeypatch.setattr(Image.Image, "resize", lambda *_: pytest.fail("work began"))
    large = Image.new("RGB", (4000, 32))
    with pytest.raises(ValueError, match="width is 4000; expected a multiple of 8"):
        ours(pipes[0], large, 0.6)
    with pytest.raises(ValueError, match="height is 0; expected a multiple of 8"):
        ours(pipes[0], large, 0.6, height=0, width=32)


@pytest.mark.slow
def test_slices_are_encoded_as_the_whole(pipes, tmp_path):
    pipes[0].save_pretrained(tmp_path)
    sliced = minidiff.load(tmp_path, vae_slicing=True)
    sliced.progress = False
    expected = ours(pipes[0], picture(), 0.6)
    assert relative_error(ours(sliced, picture(), 0.6), expected) <= BOUND


def test_what_is_drawn_is_weighed(pipes, monkeypatch):
    """By the levels that are left: seven, twice with guidance."""
    seen = []

    def weigh(_, pipe, size, levels, controls):
        seen.append((tuple(size), levels))

    monkeypatch.setattr(memory.Plan, "check_room", weigh)
    ours(pipes[0], picture(), 0.6)
    assert seen == [((2, 16, 8, 8), 14)]


BAD = [
    ({"strength": 0}, ValueError, "strength is 0; expected above 0"),
    ({"image": picture(33)}, ValueError, "height is 33; .*the nearest is 32"),
    ({"image": torch.rand(2, 4, 8, 8)}, ValueError, "image has shape"),
    ({"image": picture() * 255}, ValueError, "image has values from 0"),
    ({"height": 0}, ValueError, "height is 0; expected a multiple of 8"),
    ({"image": torch.rand(8)}, ValueError, "image has shape .8,.; expected"),
    ({"latents": picture()}, TypeError, "takes no argument 'latents'"),
    ({"sigmas": torch.ones(2)}, TypeError, "takes no argument 'sigmas'"),
    ({"strenght": 0.5}, TypeError, "takes no argument 'strenght'"),
    ({"prompt": "bad \udcff byte"}, ValueError, "prompt is not a text in UTF-8"),
    ({"height": 40}, ValueError, "is a tensor of 32×32 pixels; expected 32×40"),
    ({"image": 3}, TypeError, "image is a int"),
    ({"image": picture(count=3)}, ValueError, "image has 3 pictures; expected 1 or 2"),
    ({"mask": mask_of(40)}, ValueError, "the mask is 32×40 pixels; .* 32×32"),
    ({"image": "no/such.png"}, FileNotFoundError, "no/such.png"),
    ({"image": __file__}, ValueError, "is not a picture that can be read"),
    ({"num_inference_steps": 0}, ValueError, "num_inference_steps is 0"),
    (
        {"image": np.zeros((32, 32, 3), int)},
        TypeError,
        "an array of int64; expect",
    ),
    ({"mask": [1]}, TypeError, "mask_image is a int; expected a PIL"),
    ({"mask": picture()[:, :2]}, ValueError, "mask_image has shape"),
    ({"mask": picture(count=3)[:, :1]}, ValueError, "mask_image has 3 pictures"),
    ({"sampler": "ddim"}, ValueError, "sampler is 'ddim'"),
    ({"output_type": "gif"}, ValueError, "output_type is 'gif'"),
    ({"guidance_scale": math.nan}, ValueError, "guidance_scale is nan"),
    ({"negative_prompt": ["a", "b", "c"]}, ValueError, "negative_prompt has 3 texts"),
    ({"max_sequence_length": 0}, ValueError, "max_sequence_length is 0"),
]


@pytest.mark.parametrize("call, kind, message", BAD, ids=[m for _, _, m in BAD])
def test_bad_input(pipes, monkeypatch, call, kind, message):
    monkeypatch.setattr(pipes[0].vae, "encode", lambda *_: pytest.fail("work began"))
    with pytest.raises(kind, match=message):
        ours(pipes[0], **{"image": picture(), "strength": 0.6} | call)


def test_a_mask_of_sixteen_bits_is_scaled():
    mask = Image.fromarray(np.full((8, 8), 20_000, np.uint16))
    found = module.as_tensor("mask_image", mask, "L", 8, 8)
    assert found.max() == pytest.approx(20_000 / 65_535, abs=0.01)
