"""``minidiff train``: the options of a whole training, checked, and its stages run."""

from dataclasses import dataclass, replace
from pathlib import Path

from minidiff.data.captioned import Pictures
from minidiff.data.fashion_mnist import fashion_mnist
from minidiff.data.garments import SCENES
from minidiff.interface.checks import check_range
from minidiff.learning import parallel
from minidiff.learning.run import check_folder, check_other
from minidiff.recipes.job import Job
from minidiff.recipes.recipe import (
    LEARNED,
    WORLD,
    Recipe,
    changed,
    check_latents,
    find_recipe,
)
from minidiff.recipes.stages import (
    check_batches,
    check_needs,
    choose_stages,
    run_stages,
)
from minidiff.recipes.start import copy_start, open_start

POOLS = ("pictures", "latents", "captions")


@dataclass(frozen=True)
class TrainOptions:
    """One stage, or "all" that are not done yet, into ``output``.

    Args:
        output: the folder of the model and its runs.
        stage: "all", or the name of one.
        data: where Fashion-MNIST is.
        device: "cpu", "cuda", …
        recipe: "gpu" (large batches, for a large GPU), "shipped" (what began the
            shipped model, an hour and a half of two CPU cores), "trial" (a few steps of
            everything), "world" (garments and things), a name of
            ``minidiff.recipes.history`` (with ``start``) or a JSON file (see
            ``find_recipe``); by default "gpu" on a GPU, else "shipped".
        steps, batch_size: of the one stage named, for the recipe's.
        compile: for the recipe's.
        start: a model to go on from, "tiny" or its folder: its tokenizers and text
            encoders stay, its autoencoder and transformer learn on.
        scenes: "composed", "plain", "world" or a folder of pictures with captions,
            for the recipe's; ``crop`` takes their middle, or squeezes them.
        recompute: the transformer needs less memory, and more time.
        seed: decides what is drawn by chance: other scenes, another order, other noise.
    """

    output: Path
    stage: str = "all"
    data: Path | None = None
    device: str = "cpu"
    recipe: str | None = None
    steps: int | None = None
    batch_size: int | None = None
    compile: bool | None = None
    start: Path | None = None
    scenes: str | None = None
    recompute: bool = False
    crop: bool = True
    seed: int = 0


def train_stages(options: TrainOptions) -> None:
    """Train as ``options`` say. Raises ValueError for a name or number that cannot be.

    Nothing is written before all is checked.
    """
    o = options
    recipe = chosen_recipe(o)
    check_range("--seed", o.seed, 0, 2**63 - 1)
    stages = choose_stages(o.stage, o.start, recipe.scenes)
    learns_vae = any(stage.name == "vae" for stage in stages)
    check_latents(recipe, learns_vae and o.start is None)
    start = o.start and open_start(o.start)
    check_needs(stages, start or o.output / "model")
    device = parallel.start(o.device)
    check_batches(recipe, stages)
    check_folder(o.output)
    check_other(o.output, "runs", "run")
    parallel.wait()
    recipe = limited(recipe, o)
    # A GPU encodes as fast as a disk reads
    cache = None if o.device.startswith("cuda") else o.output / "cache"
    data = str(o.data) if o.data else None
    job = Job(o.output, recipe, data, device, cache, o.seed, start, o.recompute, o.crop)
    if start and parallel.rank() == 0:
        copy_start(job, start)
    parallel.wait()
    run_stages(job, stages)


def chosen_recipe(o: TrainOptions) -> Recipe:
    """The recipe with what the options change in it."""
    cuda = o.device.startswith("cuda")
    recipe = find_recipe(o.recipe or ("gpu" if cuda else "shipped"), cuda)
    scenes = {"scenes": o.scenes or recipe.scenes}
    recipe = changed(recipe, scenes, "the command line")
    known, folder = (*SCENES, WORLD), recipe.things or recipe.scenes
    if recipe.scenes not in known and not Path(folder).is_dir():
        raise ValueError(
            f"scenes is {recipe.scenes!r}; expected {', '.join(known)}, or a folder of "
            "pictures"
        )
    size = {"steps": o.steps, "batch_size": o.batch_size}
    size = {name: value for name, value in size.items() if value is not None}
    if size and o.stage not in LEARNED:
        raise ValueError("--steps and --batch-size need a --stage that has them")
    compiled = {} if o.compile is None else {"compile": o.compile}
    changes = {name: compiled | (size if name == o.stage else {}) for name in LEARNED}
    return changed(recipe, changes, "the command line")


def limited(recipe: Recipe, o: TrainOptions) -> Recipe:
    """The recipe with no more samples than there are; the data must be there."""
    if recipe.scenes in SCENES or recipe.world:
        for split in ("test", "train"):  # the small one first
            fashion_mnist(split, o.data)
        return recipe
    seen, held = (
        len(Pictures(split, recipe.scenes, seed=o.seed, crop=o.crop))
        for split in ("train", "test")
    )
    sizes = {name: min(getattr(recipe, name), seen) for name in POOLS}
    return replace(recipe, held=min(recipe.held, held), **sizes)
