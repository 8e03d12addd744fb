"""What is published about the models that minidiff knows by name: one table."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Published:
    """A model that a name stands for, and what suits it.

    ``sizes``: for each part the class method of its configuration that has its sizes.
    ``repository``, ``revision``: on the hub, at the commit that this package was
    written for; ``single_file``: the official one there. Steps and guidance are those
    of the model's card; a folder's scheduler has the last word on ``shift``.
    """

    name: str
    sizes: Mapping[str, str]
    num_inference_steps: int
    guidance_scale: float
    repository: str = ""
    revision: str = ""
    single_file: str = ""
    shift: float = 3.0

    @property
    def names(self) -> set[str]:
        """What it is called: here, on the hub, in the hub's cache, as a single file."""
        if not self.repository:
            return {self.name}
        cached = f"models--{self.repository.replace('/', '--')}"
        stem = self.single_file.removesuffix(".safetensors")
        return {self.name, self.repository, cached, self.single_file, stem}


TINY = {
    "text_encoder": "tiny_l",
    "text_encoder_2": "tiny_g",
    "text_encoder_3": "tiny",
    "transformer": "tiny",
    "vae": "tiny",
}
MEDIUM = {
    "text_encoder": "clip_l",
    "text_encoder_2": "clip_g",
    "text_encoder_3": "t5_xxl",
    "transformer": "sd35_medium",
    "vae": "sd35",
}
LARGE = MEDIUM | {"transformer": "sd35_large"}
PUBLISHED = {
    model.name: model
    for model in (
        Published("tiny", TINY, 28, 2.5),
        Published(
            "sd3.5-medium",
            MEDIUM,
            40,
            4.5,
            "stabilityai/stable-diffusion-3.5-medium",
            "b940f670f0eda2d07fbb75229e779da1ad11eb80",
            "sd3.5_medium.safetensors",
        ),
        Published(
            "sd3.5-large",
            LARGE,
            28,
            3.5,
            "stabilityai/stable-diffusion-3.5-large",
            "ceddf0a7fdf2064ea28e2213e3b84e4afa170a0f",
            "sd3.5_large.safetensors",
        ),
        Published(
            "sd3.5-large-turbo",
            LARGE,
            4,
            1.0,
            "stabilityai/stable-diffusion-3.5-large-turbo",
            "ec07796fc06b096cc56de9762974a28f4c632eda",
            "sd3.5_large_turbo.safetensors",
        ),
    )
}
ON_HUB = {name: model for name, model in PUBLISHED.items() if model.repository}


def named(model: Path | str) -> Published | None:
    """The published model that ``model``, a name or a hub id, stands for."""
    names = {known.repository: known for known in ON_HUB.values()} | PUBLISHED
    return names.get(str(model))


def recognize(config: Any, origin: Path | str = "") -> Published | None:
    """The published model that a transformer of configuration ``config`` is one of.

    Of those that are configured alike, as Large and Large Turbo, ``origin`` decides: a
    name, a hub id or a path that ends in what one is called, or lies in its folder of
    the hub's cache; else it is the first. The size of pictures does not count. A
    configuration of none is the model that its origin names, or None.
    """
    parts = Path(origin).parts
    said = {*parts[-1:], "/".join(parts[-2:])} | {
        p for p in parts if p[:8] == "models--"
    }
    alike = [known for known in PUBLISHED.values() if _is_like(config, known)]
    for known in alike or PUBLISHED.values():
        if said & known.names:
            return known
    return alike[0] if alike else None


def _is_like(config: Any, known: Published) -> bool:
    """Whether a transformer of ``config`` has the layers of a published model's."""
    other = getattr(type(config), known.sizes["transformer"])()
    return config == replace(other, sample_size=config.sample_size)
