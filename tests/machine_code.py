"""Compiles the Triton kernels at full size for a card that need not be there.

    python tests/machine_code.py 90    # its compute capability

Nothing runs: every kernel must become machine code.
"""

import sys
from functools import partial
from itertools import product

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from minidiff.engine import kernels, triton_kernels

ROWS, HEAD = 8, 64


class Card:
    """What Triton asks of a card before it compiles."""

    def __init__(self, capability):
        self.get_current_target = partial(GPUTarget, "cuda", capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def call_kernels(width, fp8, batch, dtype=torch.bfloat16):
    """Each kernel of a transformer of that width, in each of its forms."""
    table = torch.zeros(batch, 9 * width, dtype=dtype).split(width, dim=1)
    x = torch.zeros(ROWS, width, dtype=dtype)
    for outputs in (table[:2],), (table[:2], table[6:8]):
        for updates in [], [(x, table[2])], [(x, table[2]), (x, table[8])]:
            kernels.residual_norm(x, updates, outputs, fp8)
    norms, qkv = torch.zeros(2, 2, HEAD, dtype=dtype), x.repeat(1, 3)
    kernels.norm_heads(qkv, norms, width // HEAD, ROWS // 2)
    if fp8:
        kernels.quantize_rows(x)
        kernels.quantize_rows(x.repeat(1, 4), gelu=True)


def call_group_norm(channels, dtype=torch.bfloat16):
    """The decoder's kernels in each of their forms."""
    x = torch.zeros(1, channels, 64, 64, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(channels, dtype=dtype)
    forms = product((None, weight), (None, x), (False, True), (False, True))
    for add, residual, keep, silu in forms:
        kernels.group_norm_silu(x, 32, weight, weight, add, residual, keep, silu)


def main(capability):
    compiled, run, has_fp8 = {}, JITFunction.run, capability >= 89

    def compile_only(self, *given, **options):
        kernel = run(self, *given, **(options | {"warmup": True}))
        compiled[kernel.hash] = kernel

    triton.runtime.driver.set_active(Card(capability))
    JITFunction.run, kernels.has_kernels = compile_only, lambda x: True
    for fp8 in (False, True)[: 1 + has_fp8]:
        call_kernels(2432, fp8, batch=2)  # Large's width
    call_group_norm(channels=512)
    assert all(kernel.asm["cubin"] for kernel in compiled.values())
    own = vars(triton_kernels).items()
    known = {name for name, f in own if isinstance(f, JITFunction)}
    found = {kernel.name for kernel in compiled.values()}
    assert known - found == ({"_store_row"} if has_fp8 else {"_store_row", "_quantize"})
    print(len(compiled), "kernels")


if __name__ == "__main__":
    main(int(sys.argv[1]))
