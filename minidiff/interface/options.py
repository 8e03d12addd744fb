"""How the options of a command fill the dataclasses of the library."""

from dataclasses import fields
from typing import Any


def not_none(**settings: Any) -> dict[str, Any]:
    """The settings that are not None."""
    return {name: value for name, value in settings.items() if value is not None}


def fields_of(cls: type, given: dict[str, Any]) -> dict[str, Any]:
    """The options that are set and are called as fields of the dataclass ``cls``."""
    return not_none(**{f.name: given.get(f.name) for f in fields(cls)})
