"""A recipe: how long each stage learns, and from how much; read, changed, checked."""

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from minidiff.files.disk import excerpt, read_json
from minidiff.learning.steps import MOST_SAMPLES
from minidiff.training import TrainingConfig

Changes = dict[str, Any]

LONGER: Changes = {  # the autoencoder and the transformer learn on, by AdamW
    "vae": {
        "steps": 4000,
        "batch_size": 16,
        "learning_rate": 1.5e-3,
        "warmup_steps": 100,
        "ema_decay": 0.998,
        "muon": False,
        "save_every": 250,
        "validate_every": 1000,
    },
    "transformer": {
        "steps": 5000,
        "batch_size": 64,
        "learning_rate": 1.6e-3,
        "warmup_steps": 200,
        "ema_decay": 0.999,
        "muon": False,
        "accumulation": 2,
        "save_every": 250,
        "validate_every": 1000,
    },
    "pictures": 2**15,
    "latents": 2**16,
    "two_garments": 0.5,
}
# ``--stage transformer``, then once more with 13,000 steps. The noise above sigma 0.7
# decides which garment it is: the shift has 3 samples of 5 there.
STEPS: Changes = LONGER["transformer"] | {"steps": 10_000, "learning_rate": 1.2e-3}
FURTHER: Changes = LONGER | {"transformer": STEPS, "two_garments": 0.65, "shift": 3.0}
# What finished the transformer: the same levels, Muon's steps
MUON_STEPS: Changes = STEPS | {"steps": 9_000, "learning_rate": 1.5e-3, "muon": True}
ORTHOGONAL: Changes = FURTHER | {"transformer": MUON_STEPS}
# What finished the autoencoder (``--stage vae``), by Muon's steps too: its latents
# hardly move, so that the transformer need not learn again. Then ``--stage
# transformer``: what is new in them is fine detail, which lies at low levels.
DETAILS: Changes = ORTHOGONAL | {
    "vae": LONGER["vae"] | {"steps": 10_000, "learning_rate": 2e-3, "muon": True},
    "transformer": MUON_STEPS | {"steps": 10_000},
    "hold_latents": 0.05,
    "shift": 2.0,
}
HISTORY = {"longer": LONGER, "further": FURTHER, "muon": ORTHOGONAL, "details": DETAILS}


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
    "hold_latents": (0, MOST),
    "ema_decay": (0, 1),
    "two_garments": (0, 1),
    "plateau": (0, 1),
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
    pictures: int  # scenes kept as pictures, for CLIP and the autoencoder
    latents: int  # scenes kept as latents, for the transformer
    captions: int = 20_000  # that the tokenizers learn from
    held: int = 512  # test scenes that validation looks at
    two_garments: float = 0.65  # of T5's and the transformer's scenes: they are harder
    uniform_levels: bool = False  # noise levels uniform, not logit-normal
    keep_latents: bool = False  # of the autoencoder only the decoder learns
    hold_latents: float = 0.0  # how strongly, where both learn: see ``held_loss``
    shift: float = 1.0  # moves noise levels towards 1
    scenes: str = "composed"  # or "plain" (garments as they are), "world", a folder

    @property
    def world(self) -> bool:
        """Whether scenes are those of garments and things."""
        return self.scenes.partition(":")[0] == WORLD

    @property
    def things(self) -> str:
        """The folder of own cut-outs, in "world:FOLDER"; "" for those that ship."""
        return self.scenes.partition(":")[2] if self.world else ""


LEARNED = tuple(f.name for f in fields(Recipe) if f.type is TrainingConfig)
WORLD = "world"  # scenes of garments and everyday things, told in free sentences
MUON = ("vae", "transformer")  # the stages that Muon may serve


RECIPES = {
    "gpu": Recipe(
        clip=TrainingConfig(2500, 1024, 1e-3, warmup_steps=200, save_every=500),
        t5=TrainingConfig(2500, 1024, 1e-3, warmup_steps=200, save_every=500),
        vae=TrainingConfig(
            3200,
            256,
            2e-3,
            warmup_steps=100,
            muon=True,
            save_every=500,
            validate_every=500,
        ),
        judge=TrainingConfig(4000, 512, 2e-3, 200, weight_decay=0.05, save_every=500),
        transformer=TrainingConfig(
            24_000,
            512,
            5e-3,
            warmup_steps=500,
            ema_decay=0.9995,
            muon=True,
            save_every=1500,
            validate_every=2000,
        ),
        pictures=2**18,
        latents=2**20,
        shift=2.0,  # between what texture and what garments need
    ),
    # What began minidiff/pretrained/tiny, on two CPU cores; all of that had AdamW
    "shipped": Recipe(
        clip=TrainingConfig(
            350, 128, 1.5e-3, 20, ema_decay=0.99, save_every=100, bfloat16=True
        ),
        t5=TrainingConfig(
            500, 64, 1e-3, 30, ema_decay=0.99, save_every=100, bfloat16=True
        ),
        vae=TrainingConfig(
            1600,
            12,
            2e-3,
            40,
            ema_decay=0.995,
            muon=True,
            save_every=100,
            validate_every=400,
            bfloat16=True,
        ),
        judge=TrainingConfig(
            7000,
            128,
            3e-3,
            200,
            weight_decay=0.05,
            save_every=500,
            validate_every=1000,
            bfloat16=True,
        ),
        transformer=TrainingConfig(
            2800,
            32,
            8e-3,
            150,
            ema_decay=0.998,
            muon=True,
            save_every=200,
            validate_every=500,
            bfloat16=True,
        ),
        pictures=2**14,
        latents=2**15,
        held=256,
        two_garments=0.4,
    ),
    "trial": Recipe(  # every stage for a few steps
        clip=TrainingConfig(60, 64, 1e-3, warmup_steps=10, log_every=5, save_every=20),
        t5=TrainingConfig(60, 64, 1e-3, warmup_steps=10, log_every=5, save_every=20),
        vae=TrainingConfig(30, 8, 1e-3, warmup_steps=5, log_every=5, save_every=10),
        judge=TrainingConfig(20, 32, 2e-3, warmup_steps=5, log_every=5, save_every=10),
        transformer=TrainingConfig(
            60, 16, 1e-3, warmup_steps=5, log_every=5, save_every=20, validate_every=60
        ),
        pictures=2048,
        latents=1024,
        captions=2000,
        held=32,
    ),
    # The small world of garments and things, on two CPU cores, all from nothing
    "world": Recipe(
        clip=TrainingConfig(
            3000,
            128,
            1.5e-3,
            100,
            ema_decay=0.995,
            save_every=250,
            bfloat16=True,
            compile=True,
        ),
        t5=TrainingConfig(
            4000,
            64,
            1.5e-3,
            100,
            ema_decay=0.995,
            save_every=250,
            bfloat16=True,
            compile=True,
        ),
        vae=TrainingConfig(
            12_000,
            12,
            3e-3,
            100,
            ema_decay=0.998,
            muon=True,
            save_every=250,
            validate_every=500,
            bfloat16=True,
            compile=True,
        ),
        judge=TrainingConfig(
            7000,
            128,
            3e-3,
            200,
            weight_decay=0.05,
            save_every=250,
            validate_every=1000,
            bfloat16=True,
            compile=True,
        ),
        transformer=TrainingConfig(
            50_000,
            64,
            1e-2,
            300,
            ema_decay=0.9995,
            plateau=0.7,
            muon=True,
            save_every=250,
            validate_every=2000,
            bfloat16=True,
            compile=True,
        ),
        pictures=2**16,
        latents=2**17,
        captions=40_000,
        shift=2.0,
        scenes=WORLD,
    ),
}


def find_recipe(name: str, cuda: bool = False) -> Recipe:
    """The recipe of that name, or the one that a JSON file describes.

    The file changes "shipped": {"transformer": {"steps": 5000}, "latents": 4096}. With
    ``cuda`` what it does not say is compiled and in bfloat16 (CLIP in float32). Raises
    ValueError for an unknown name or key, naming it.
    """
    if name in RECIPES:
        return for_gpu(RECIPES[name]) if cuda else RECIPES[name]
    shipped = find_recipe("shipped", cuda)
    if name in HISTORY:
        return changed(shipped, HISTORY[name], name)
    if not name.endswith(".json"):
        known = ", ".join((*RECIPES, *HISTORY))
        raise ValueError(f"--recipe is {name!r}; expected {known}, or a .json file")
    chosen = changed(shipped, read_json(Path(name)), name)
    for stage in LEARNED:
        if getattr(chosen, stage).muon and stage not in MUON:
            known = " and ".join(MUON)
            raise ValueError(f"{name}, {stage}: muon is for {known}")
    return chosen


def for_gpu(recipe: Recipe) -> Recipe:
    """The same stages compiled and in bfloat16.

    CLIP compares unit vectors: for its logits bfloat16 is too coarse.
    """
    stages = {
        name: replace(getattr(recipe, name), compile=True, bfloat16=name != "clip")
        for name in LEARNED
    }
    return replace(recipe, **stages)


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


def check_latents(recipe: Recipe, none: bool) -> None:
    """Raise ValueError for latents that are to be kept or held where there are none."""
    if recipe.keep_latents and recipe.hold_latents:
        raise ValueError("the recipe has keep_latents and hold_latents; expected one")
    if none and (recipe.keep_latents or recipe.hold_latents):
        raise ValueError(
            "the recipe keeps or holds a model's latents; expected --start"
        )
