"""A job: where a model's stages read and write, on what, and from which seeds."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from minidiff.data import rng
from minidiff.data.captioned import Pictures
from minidiff.data.garments import SCENES, Scenes
from minidiff.data.told import ToldScenes, own_things
from minidiff.dit import MMDiTConfig
from minidiff.engine import loading
from minidiff.files.weights import load_component
from minidiff.interface.terminal import printable
from minidiff.learning import parallel
from minidiff.learning.run import Run
from minidiff.recipes.recipe import Recipe
from minidiff.text_encoders import T5Config
from minidiff.tokenizer import CLIPTokenizer, T5Tokenizer
from minidiff.training import TrainingConfig

LENGTH = 32  # tokens of a prompt, for each encoder
# What the world needs more than garments alone: words, and one block
VOCABULARY = 1536
LARGER = {T5Config: {"vocab_size": VOCABULARY}, MMDiTConfig: {"num_layers": 6}}


@dataclass(frozen=True)
class Job:
    """Where a stage reads and writes, and on what it runs."""

    output: Path
    recipe: Recipe
    data: str | None = None
    device: str = "cpu"
    cache: Path | None = None
    seed: int = 0
    start: Path | None = None  # a model whose weights are the beginning
    recompute: bool = False  # the transformer's blocks: see ``steps.recompute``
    crop: bool = True  # pictures of a folder: their middle, or all of them squeezed
    run: Run | None = None  # of the stage that learns now

    @property
    def model(self) -> Path:
        """The exported model, in the hub's layout."""
        return self.output / "model"

    @property
    def runs(self) -> Path:
        """The folder of the stages' runs."""
        return self.output / "runs"

    @property
    def composed(self) -> bool:
        """Whether the scenes come from this package, not from a folder."""
        return self.recipe.scenes in SCENES

    @property
    def world(self) -> bool:
        """Whether the scenes are those of garments and everyday things."""
        return self.recipe.world

    def tiny(self, config: Any) -> Any:
        """The tiny configuration of this class, as large as the scenes need it."""
        return replace(config.tiny(), **LARGER.get(config, {}) if self.world else {})

    def config(self, stage: str) -> TrainingConfig | None:
        """How a stage learns; None for one that does not learn by steps."""
        return getattr(self.recipe, stage, None)

    def seed_for(self, purpose: str) -> int:
        """A seed for one purpose."""
        return rng.fold_in(self.seed, sum(map(ord, purpose)))

    def scenes(
        self, two_garments: float = 0.5, split: str = "train"
    ) -> Scenes | ToldScenes | Pictures:
        """Scenes, or the pictures of a folder, of one split on this job's device."""
        name, r = self.recipe.scenes, self.recipe
        if self.world:
            sizes = max(r.pictures, r.latents, r.captions), r.held
            things = own_things(r.things) if r.things else None
            return ToldScenes(split, self.data, self.device, self.seed, *sizes, things)
        if not self.composed:
            return Pictures(split, name, self.device, self.seed, self.crop)
        return SCENES[name](split, self.data, self.device, self.seed, two_garments)

    def read_tokenizers(self) -> list[CLIPTokenizer | T5Tokenizer]:
        """The three trained tokenizers."""
        kinds = loading.TOKENIZERS.items()
        return [kind.from_pretrained(self.model / name) for name, kind in kinds]

    def load_part(self, name: str) -> Any:
        """The exported component of that name."""
        kind, config = loading.PARTS[name]
        return load_component(kind, config, self.model / name, self.device)

    def begin_part(self, name: str) -> Any:
        """A part to train: its tiny configuration, or what ``start`` has learned."""
        kind, config = cast(tuple[Any, Any], loading.PARTS[name])
        if self.start is None:
            return kind(self.tiny(config))
        model = load_component(kind, config, self.start / name)
        for parameter in model.parameters():  # it may be a read-only memory map
            parameter.data = parameter.data.clone()
        return model


def announce(line: str) -> None:
    """Print ``line`` once, however many processes train."""
    if parallel.rank() == 0:
        print(printable(line), flush=True)
