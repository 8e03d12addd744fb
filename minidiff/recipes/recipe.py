"""A recipe: how long each stage learns, and from how much; read, changed, checked."""

import math
import os
import shutil
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from minidiff.files.disk import excerpt, read_json
from minidiff.learning.steps import MOST_SAMPLES, multiplies_bfloat16
from minidiff.training import TrainingConfig

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")
LONGEST_NAME = 1000  # of scenes
MOST = 10**9  # of any number: steps times batch size must fit into 64 bits
# The least and the greatest value; of what is not listed, above 0 and at most MOST
LIMITS = {
    "batch_size": (1, MOST_SAMPLES),
    "warmup_steps": (0, MOST),
    "validate_every": (0, MOST),
    "weight_decay": (0, MOST),
    "ema_decay": (0, 1),
    "guidance": (1, 100),
    "plateau": (0, 1),
    "drop": (0, 1),
    "beta2": (0, 0.999999),  # Adam would divide by 0 at 1
}


@dataclass(frozen=True)
class Recipe:
    """How long each stage learns, and from how many scenes."""

    clip: TrainingConfig
    t5: TrainingConfig
    vae: TrainingConfig
    judge: TrainingConfig
    transformer: TrainingConfig
    turbo: TrainingConfig
    matching: TrainingConfig
    control: TrainingConfig
    pictures: int  # scenes kept as pictures, for CLIP and the autoencoder
    latents: int  # scenes kept as latents, for the transformer
    captions: int = 20_000  # that the tokenizers learn from
    held: int = 512  # test scenes that validation looks at
    shift: float = 1.0  # moves noise levels towards 1
    guidance: float = 2.5  # of the students' teacher, and of what control draws
    scenes: str = "world"  # or one of ``SCENES``, a folder

    @property
    def told(self) -> bool:
        """Whether scenes are composed and told here, not read from a folder."""
        return self.scenes.partition(":")[0] in (WORLD, GARMENTS)

    @property
    def things(self) -> str:
        """The folder of own cut-outs, in "world:FOLDER"; "" for those that ship."""
        return self.scenes.partition(":")[2] if self.told else ""


LEARNED = tuple(f.name for f in fields(Recipe) if f.type is TrainingConfig)
# Scenes of garments and everyday things, of garments alone, and garments as they are
SCENES = WORLD, GARMENTS, PLAIN = "world", "garments", "plain"
MUON = ("vae", "transformer", "turbo")  # the stages that Muon may serve


def find_recipe(name: str, cuda: bool = False) -> Recipe:
    """The recipe of that name, or the one that a JSON file describes.

    The file changes "shipped": {"transformer": {"steps": 5000}, "latents": 4096}, and
    so do the other recipes of ``recipes.json``. With ``cuda`` what a file does not say
    is compiled and in bfloat16 (CLIP in float32); else it is not compiled, a recipe of
    that table only where there is a C++ compiler, and bfloat16 is for processors that
    multiply in it. Raises ValueError for an unknown name or key, naming it.
    """
    if name in RECIPES:
        return for_gpu(RECIPES[name]) if cuda else for_cpu(RECIPES[name])
    if not name.endswith(".json"):
        known = ", ".join(RECIPES)
        raise ValueError(f"--recipe is {name!r}; expected {known}, or a .json file")
    shipped = RECIPES["shipped"]
    shipped = for_gpu(shipped) if cuda else each_stage(for_cpu(shipped), compile=False)
    chosen = changed(shipped, read_json(Path(name)), name)
    for stage in LEARNED:
        if getattr(chosen, stage).muon and stage not in MUON:
            known = ", ".join(MUON)
            raise ValueError(f"{name}, {stage}: muon is for {known}")
    return chosen


def for_gpu(recipe: Recipe) -> Recipe:
    """The same stages compiled and in bfloat16.

    CLIP compares unit vectors: for its logits bfloat16 is too coarse.
    """
    clip = replace(recipe.clip, compile=True, bfloat16=False)
    return replace(each_stage(recipe, compile=True, bfloat16=True), clip=clip)


def for_cpu(recipe: Recipe) -> Recipe:
    """The same stages, compiled or in bfloat16 only where the machine can."""
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        recipe = each_stage(recipe, compile=False)
    return recipe if multiplies_bfloat16("cpu") else each_stage(recipe, bfloat16=False)


def each_stage(recipe: Recipe, **settings: bool) -> Recipe:
    """The recipe with these settings in every stage that learns."""
    learned = {n: replace(getattr(recipe, n), **settings) for n in LEARNED}
    return replace(recipe, **learned)


def changed(settings: Settings, changes: dict[str, Any], where: str) -> Settings:
    """A dataclass with ``changes``, in those of its fields that are dataclasses too."""
    known = {f.name: getattr(settings, f.name) for f in fields(settings)}
    for name, value in changes.items():
        if name not in known:
            expected = ", ".join(known)
            raise ValueError(f"{where} sets {excerpt(name)!r}; expected {expected}")
        known[name] = changed_value(known[name], value, name, where)
    return type(settings)(**known)


def changed_value(old: Any, value: Any, name: str, where: str) -> Any:
    """``value`` in the place of ``old``; ValueError unless it is of its kind."""
    if isinstance(old, TrainingConfig):
        if not isinstance(value, dict):
            found = f"{where}: {name} is a {type(value).__name__}"
            raise ValueError(f"{found}, expected an object of settings")
        return changed(old, value, f"{where}, {name}")
    kinds = type(value).__name__, type(old).__name__
    if kinds[0] != kinds[1] and kinds != ("int", "float"):
        raise ValueError(f"{where}: {name} is a {kinds[0]}, expected {kinds[1]}")
    if isinstance(value, str) and len(value) > LONGEST_NAME:
        found = f"{where}: {name} has {len(value):,} characters"
        raise ValueError(f"{found}; expected at most {LONGEST_NAME:,}")
    if kinds[0] in ("int", "float"):
        check_setting(name, value, where)
    return value


def check_setting(name: str, value: float, where: str) -> None:
    """Raise ValueError for a number that no setting of this name can be."""
    low, high = LIMITS.get(name, (math.ulp(0.0), MOST))
    if not low <= value <= high:  # nor NaN
        limits = f"{low} to {high}" if name in LIMITS else f"above 0, at most {MOST}"
        found = str(value)[:40]
        raise ValueError(f"{where}: {name} is {found}; expected {limits}")


def read_recipes() -> dict[str, Recipe]:
    """The recipes of ``recipes.json`` by name, all others as changes of "shipped"."""
    content = read_json(Path(__file__).with_name("recipes.json"))
    known = content["shipped"]
    stages = {n: TrainingConfig(**known[n]) for n in LEARNED if n in known}
    shipped = Recipe(**content["shipped"] | stages)
    return {name: changed(shipped, own, name) for name, own in content.items()}


RECIPES = read_recipes()
