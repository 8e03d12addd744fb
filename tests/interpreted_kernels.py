"""The Triton kernels beside their plain forms, in Triton's interpreter, on a CPU.

    TRITON_INTERPRET=1 python tests/interpreted_kernels.py

The paths of Python must hold the repository and this folder.
"""

from dataclasses import replace

import torch
from helpers import randomize, relative_error
from small import AUTOENCODER, TRANSFORMER, inputs, transformer
from torch.nn import functional as F

from minidiff import efficiency
from minidiff.engine import kernels, triton_kernels
from minidiff.engine.fast import FastDecoder, FastMMDiT
from minidiff.vae import VAE


def check_transformer():
    for width in (TRANSFORMER.attention_head_dim, 12):  # no power of two
        model = transformer(replace(TRANSFORMER, attention_head_dim=width))
        given = inputs(TRANSFORMER, height=4, width=4, length=3)
        assert relative_error(FastMMDiT.of(model)(*given), model(*given)) < 1e-5
        # Behind skipped blocks more updates than one pass takes come together
        controls = list(torch.randn(2, 2, 4, 2 * width))
        how = {"controls": controls, "skip_layers": [1]}
        expected = model(*given, **how)
        assert relative_error(FastMMDiT.of(model)(*given, **how), expected) < 1e-5


def check_decoder():
    vae = randomize(VAE(AUTOENCODER))
    # One chunk of a group norm's pixels in each of two pictures; several chunks of one
    for size in ((2, 16, 2, 3), (1, 16, 12, 12)):
        latents = torch.randn(size)
        exact = vae.decoder(latents)
        assert relative_error(FastDecoder.of(vae.decoder)(latents), exact) < 1e-5
    vae, latents = vae.half(), latents.half()
    plain = relative_error(vae.decoder(latents), exact)
    assert relative_error(FastDecoder.of(vae.decoder)(latents), exact) < 1.1 * plain


def check_float8():
    """With values that are scaled, not rounded: the interpreter rounds some wrongly."""
    efficiency.FLOAT8 = triton_kernels.FLOAT8 = torch.float32
    x, y, table = torch.randn(6, 96), torch.randn(6, 96), torch.randn(2, 6, 96)
    given = [(y, table[:, 0])], [(table[:, i], table[:, i + 1]) for i in (1, 3)], True
    pairs = [
        (kernels.quantize_rows(x), kernels.quantize(x)),
        (
            kernels.quantize_rows(x, gelu=True),
            kernels.quantize(F.gelu(x, approximate="tanh")),
        ),
        *zip(
            kernels.residual_norm(x.clone(), *given),
            kernels.residual_norm.__wrapped__(x.clone(), *given),
            strict=True,
        ),
    ]
    for found, plain in pairs:
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-3)


if __name__ == "__main__":
    assert kernels.INTERPRET
    torch.manual_seed(0)
    with torch.no_grad():
        check_transformer()
        check_decoder()
        check_float8()
