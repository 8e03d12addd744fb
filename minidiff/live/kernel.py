"""Assembles the kernel after a change: ``python -m minidiff.live.kernel``."""

from pathlib import Path

TEXT = Path(__file__).with_name("kernel.wat")
BYTES = TEXT.with_suffix(".wasm")


def assemble_kernel() -> bytes:
    """What ``kernel.wat`` gives; needs the package wasmtime."""
    from wasmtime import wat2wasm

    return bytes(wat2wasm(TEXT.read_text("utf-8")))


if __name__ == "__main__":
    BYTES.write_bytes(assemble_kernel())
