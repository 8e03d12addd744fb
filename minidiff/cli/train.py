"""``minidiff train``: the tiny model from nothing, or any model in a new style."""

from pathlib import Path
from typing import Annotated

from minidiff.cli.options import (
    Device,
    examples,
    find_device,
    given,
    option,
    refuse,
)

EXAMPLES = examples(
    "minidiff train --output my-model",
    "minidiff train --output style --from tiny --lora --data pictures",
)
OUT, WHAT, FROM = "Output", "From nothing: the tiny model", "Fine-tune: --from"
LORA, HOW = "LoRA: --from … --lora", "How to train"
ONE = "as the recipe says"


def train(
    output: Annotated[
        Path, option(OUT, "Folder of the model and its runs.", metavar="FOLDER")
    ],
    stage: Annotated[
        str,
        option(
            WHAT,
            "tokenizers, clip, t5, vae, judge, transformer, or all.",
            metavar="NAME",
        ),
    ] = "all",
    recipe: Annotated[
        str | None,
        option(
            WHAT,
            "gpu, shipped, longer, further, muon, details, trial, or a JSON file.",
            metavar="NAME",
            usual="gpu on a GPU, else shipped",
        ),
    ] = None,
    start: Annotated[
        Path | None,
        option(WHAT, "Model to go on from: tiny, or its folder.", metavar="NAME"),
    ] = None,
    scenes: Annotated[
        str | None,
        option(
            WHAT,
            "composed, world (garments and things; world:FOLDER with your cut-outs), "
            "plain (grey garments, captioned by class), or a folder of pictures with "
            "captions.",
            metavar="NAME",
            usual="composed",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        option(WHAT, "Of scenes, order and noise.", metavar="N", usual="0"),
    ] = None,
    from_model: Annotated[
        str | None,
        option(
            FROM,
            "Fine-tune this model on the pictures in --data.",
            "--from",
            metavar="MODEL",
        ),
    ] = None,
    learning_rate: Annotated[
        float | None, option(FROM, "Of AdamW.", metavar="X", usual="1e-4")
    ] = None,
    lora: Annotated[
        bool, option(LORA, "Train a LoRA, not all weights.", "--lora")
    ] = False,
    rank: Annotated[
        int | None, option(LORA, "Of its matrices.", metavar="N", usual="8")
    ] = None,
    alpha: Annotated[
        float | None,
        option(LORA, "Its strength.", metavar="X", usual="the rank"),
    ] = None,
    targets: Annotated[
        str | None,
        option(
            LORA,
            "Its layers: to_q,to_k,…",
            metavar="LIST",
            usual="those of attention",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        option(
            HOW,
            "Folder of Fashion-MNIST's parquet files; with --from of your pictures.",
            metavar="FOLDER",
            usual="$MINIDIFF_DATA",
        ),
    ] = None,
    crop: Annotated[
        bool, option(HOW, "Of your pictures the middle, or all of it squeezed.")
    ] = True,
    steps: Annotated[
        int | None,
        option(HOW, "Of the one stage named.", metavar="N", usual=ONE),
    ] = None,
    batch_size: Annotated[
        int | None,
        option(HOW, "Of the one stage named.", metavar="N", usual=ONE),
    ] = None,
    compile: Annotated[
        bool | None,
        option(HOW, "Compile.", usual="as a JSON recipe says, or on a GPU"),
    ] = None,
    recompute: Annotated[
        bool,
        option(HOW, "Less memory for the transformer, a third slower.", "--recompute"),
    ] = False,
    device: Device = None,
) -> None:
    """Train the tiny model, stage by stage; run it again to go on after a stop.

    With --from, fine-tune a model on a folder of pictures, each with its caption in a
    .txt beside it or in metadata.jsonl.

    A JSON file as --recipe changes some of "shipped", for example
    {"vae": {"steps": 5000}, "latents": 4096}. Of clip, t5, vae, judge and transformer:
    steps, batch_size, learning_rate, warmup_steps, weight_decay, beta2, max_grad_norm,
    ema_decay, plateau, muon, accumulation, bfloat16, compile, sharded, log_every,
    save_every, validate_every. Of all: pictures, latents, captions, held, two_garments,
    uniform_levels, keep_latents, hold_latents, shift, scenes. Muon is for vae and
    transformer.
    """
    if not lora:
        refuse("--lora", None, rank=rank, alpha=alpha, targets=targets)
    if from_model is None:
        refuse("--from", None, lora=lora or None, learning_rate=learning_rate)
        from minidiff.recipes.train import TrainOptions, train_stages

        options = TrainOptions(
            output=output,
            stage=stage,
            data=data,
            device=find_device(device),
            recipe=recipe,
            steps=steps,
            batch_size=batch_size,
            compile=compile,
            start=start,
            scenes=scenes,
            recompute=recompute,
            crop=crop,
            seed=seed or 0,
        )
        train_stages(options)
        return
    if recipe or start or scenes or stage != "all" or seed is not None:
        found = "--from has no stages, recipe, start, scenes or seed"
        raise ValueError(f"{found}; its pictures are --data")
    if data is None:
        raise ValueError("--from needs --data: a folder of pictures with captions")
    from minidiff.learning import parallel
    from minidiff.recipes import finetune

    tuning = finetune.FinetuneOptions(
        model=from_model,
        pictures=data,
        output=output,
        steps=given(steps, 500),
        batch_size=given(batch_size, 1),
        learning_rate=given(learning_rate, 1e-4),
        lora=finetune.lora_config(given(rank, 8), alpha, targets) if lora else None,
        device=find_device(device),
        compile=bool(compile),
        recompute=recompute,
        crop=crop,
    )
    made = finetune.finetune_pictures(tuning)
    if parallel.rank() == 0:
        print(made)
