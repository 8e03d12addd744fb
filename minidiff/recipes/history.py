"""What went on with the shipped model after its first recipe: changes of "shipped".

Each began (``--start``) with what the one before had made; the training log tells the
story. Nothing else needs them: they go when another recipe makes the model.
"""

from typing import Any

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
ORTHOGONAL: Changes = STEPS | {"steps": 9_000, "learning_rate": 1.5e-3, "muon": True}
MUON: Changes = FURTHER | {"transformer": ORTHOGONAL}
# What finished the autoencoder (``--stage vae``), by Muon's steps too: its latents
# hardly move, so that the transformer need not learn again. Then ``--stage
# transformer``: what is new in them is fine detail, which lies at low levels.
DETAILS: Changes = MUON | {
    "vae": LONGER["vae"] | {"steps": 10_000, "learning_rate": 2e-3, "muon": True},
    "transformer": ORTHOGONAL | {"steps": 10_000},
    "hold_latents": 0.05,
    "shift": 2.0,
}
HISTORY = {"longer": LONGER, "further": FURTHER, "muon": MUON, "details": DETAILS}
