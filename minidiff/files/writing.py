"""Files written whole: a reader sees the old bytes or the new, never a part."""

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


def write_text(path: Path, text: str) -> None:
    """Write ``path`` so that a reader sees the old text or the new, never a part."""
    with replacing(path) as part:
        part.write_text(text)


@contextmanager
def replacing(file: Path | str) -> Iterator[Path]:
    """Another name to write ``file`` under; at the end it takes its place in one step.

    A reader, and a model whose weights are still mapped from the old file, see the old
    bytes or the new, never a part. An error (a full disk, say; on Windows an old file
    that is still mapped) leaves the old: OSError.
    """
    file = Path(file)
    part = file.with_name(f".{file.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
        with part.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(part, file)
    except (SafetensorError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"cannot write {file}: {reason}") from error
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, indented and in UTF-8."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", "utf-8")
