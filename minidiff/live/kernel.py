"""Assembles the kernel after a change: ``python -m minidiff.live.kernel``.

Its text gives two forms: one for every browser with WebAssembly SIMD, and one for those
that have its *relaxed* instructions too, where a product and a sum are one operation.
"""

import re
from pathlib import Path

TEXT = Path(__file__).with_name("kernel.wat")
PLAIN, FUSED = TEXT.with_suffix(".wasm"), TEXT.with_name("kernel_fused.wasm")
FORMS = (FUSED, PLAIN)  # the faster first
ADD = r"\(f32x4\.add (\([^()]+\)) \(f32x4\.mul (\([^()]+\)) (\([^()]+\))\)\)"
MULTIPLY_ADD = r"(f32x4.relaxed_madd \2 \3 \1)"  # of a + b · c: b, c, a


def assemble_kernel(form: Path) -> bytes:
    """What ``kernel.wat`` gives for one of FORMS; needs the package wasmtime."""
    from wasmtime import wat2wasm

    text = TEXT.read_text("utf-8")
    return bytes(wat2wasm(re.sub(ADD, MULTIPLY_ADD, text) if form == FUSED else text))


if __name__ == "__main__":
    for path in FORMS:
        path.write_bytes(assemble_kernel(path))
