"""``minidiff train``: the tiny model from nothing, or any model in a new style."""

from pathlib import Path
from typing import Annotated

from minidiff.cli.options import OUT, Device, Group, examples, find_device
from minidiff.interface.options import fields_of

EXAMPLES = examples(
    "minidiff train --output my-model",
    "minidiff train --output style --from tiny --lora --data pictures",
)
WHAT, FROM = Group("From nothing: the tiny model"), Group("Fine-tune: --from")
LORA, HOW = Group("LoRA: --from … --lora"), Group("How to train")
ONE = "as the recipe says"


def train(
    output: Annotated[Path, OUT("Folder of the model and its runs.")],
    stage: Annotated[
        str,
        WHAT(
            "tokenizers, clip, t5, vae, judge, transformer, or all; turbo, matching, "
            "control."
        ),
    ] = "all",
    recipe: Annotated[
        str | None,
        WHAT(
            "gpu, shipped, trial, or a JSON file.",
            usual="gpu on a GPU, else shipped",
        ),
    ] = None,
    start: Annotated[
        Path | None, WHAT("Model to go on from: tiny, or its folder.")
    ] = None,
    scenes: Annotated[
        str | None,
        WHAT(
            "world (garments and things; world:FOLDER with your cut-outs), garments, "
            "plain (grey garments, captioned by class), or a folder of pictures with "
            "captions.",
            usual="world",
        ),
    ] = None,
    seed: Annotated[int | None, WHAT("Of scenes, order and noise.", usual="0")] = None,
    model: Annotated[
        str | None,
        FROM(
            "Fine-tune this model on the pictures in --data.",
            "--from",
            needs="data, a folder of pictures with captions",
        ),
    ] = None,
    learning_rate: Annotated[
        float | None, FROM("Of AdamW.", usual="1e-4", needs="model")
    ] = None,
    buckets: Annotated[
        bool, FROM("Pictures keep about their shape.", "--buckets", needs="model")
    ] = False,
    trigger: Annotated[
        str | None, FROM("Words before every caption.", needs="model")
    ] = None,
    prior: Annotated[
        str | None,
        FROM(
            "What is to stay as it is: in half of the steps the model learns pictures "
            "that it drew of this prompt before.",
            needs="model",
        ),
    ] = None,
    prior_pictures: Annotated[
        int | None, FROM("How many of them.", usual="50", needs="prior")
    ] = None,
    prompts: Annotated[
        list[str] | None,
        FROM(
            "Drawn at each validation at a fixed seed; may be given several times.",
            "--prompt",
            usual="four captions",
            metavar="<str>",
            needs="model",
        ),
    ] = None,
    accumulation: Annotated[
        int | None,
        FROM("Parts of a batch, one after the other.", usual="1", needs="model"),
    ] = None,
    lora: Annotated[
        bool, LORA("Train a LoRA, not all weights.", "--lora", needs="model")
    ] = False,
    rank: Annotated[
        int | None, LORA("Of its matrices.", usual="8", needs="lora")
    ] = None,
    alpha: Annotated[
        float | None, LORA("Its strength.", usual="the rank", needs="lora")
    ] = None,
    targets: Annotated[
        str | None,
        LORA("Its layers: to_q,to_k,…", usual="those of attention", needs="lora"),
    ] = None,
    fp8: Annotated[
        bool, LORA("The blocks' own weights in 8 bits.", "--fp8", needs="lora")
    ] = False,
    encoders: Annotated[
        bool, LORA("Both CLIPs learn too.", "--encoders", needs="lora")
    ] = False,
    data: Annotated[
        Path | None,
        HOW(
            "Folder of Fashion-MNIST's parquet files; with --from of your pictures.",
            usual="$MINIDIFF_DATA",
        ),
    ] = None,
    crop: Annotated[
        bool, HOW("Of your pictures the middle, or all of it squeezed.")
    ] = True,
    steps: Annotated[int | None, HOW("Of the one stage named.", usual=ONE)] = None,
    batch_size: Annotated[int | None, HOW("Of the one stage named.", usual=ONE)] = None,
    compile: Annotated[
        bool | None, HOW("Compile.", usual="as the recipe says, or on a GPU")
    ] = None,
    recompute: Annotated[
        bool, HOW("Less memory for the transformer, a third slower.", "--recompute")
    ] = False,
    device: Device = None,
) -> None:
    """Train the tiny model, stage by stage; run it again to go on after a stop.

    With --from, fine-tune a model on a folder of pictures, each with its caption in a
    .txt beside it or in metadata.jsonl. Each picture in a folder 10_NAME within counts
    ten times an epoch.

    --stage turbo makes a model of 1 to 8 steps without guidance: of OUTPUT/model (or
    --start) under OUTPUT/turbo, with --from of any model, under OUTPUT/model. --stage
    matching sharpens OUTPUT/turbo, under OUTPUT/matching. --stage control makes a
    ControlNet that reads edges, for OUTPUT/model, under OUTPUT/control.

    A JSON file as --recipe changes some of "shipped", for example {"vae": {"steps":
    5000}, "latents": 4096}. Of clip, t5, vae, judge, transformer, turbo, matching and
    control: steps, batch_size, learning_rate, warmup_steps, weight_decay, beta2,
    max_grad_norm, ema_decay, plateau, drop, muon, accumulation, bfloat16, compile,
    sharded, log_every, save_every, validate_every. Of all: pictures, latents, captions,
    held, shift, scenes, guidance. Muon is for vae, transformer and turbo.
    """
    given = locals() | {"device": find_device(device), "pictures": data}
    if model is None:
        from minidiff.recipes.train import TrainOptions, train_stages

        return train_stages(TrainOptions(**fields_of(TrainOptions, given)))
    if recipe or start or scenes or stage not in ("all", "turbo") or seed is not None:
        found = "--from has no stages, recipe, start, scenes or seed"
        raise ValueError(f"{found} (but --stage turbo); its pictures are --data")
    from minidiff.recipes import finetune, own_pictures, turbo

    update = fields_of(finetune.LoraConfig, given)
    given |= {"lora": finetune.lora_config(**update) if lora else None}
    pictures = fields_of(own_pictures.PictureConfig, given)
    given |= {"how": own_pictures.PictureConfig(**pictures)}
    turbo.learn(finetune.FinetuneOptions(**fields_of(finetune.FinetuneOptions, given)))
