"""Named sets of options: `--preset NAME` lays one between the defaults and the user's own.

paper: ScaleBiO as published (Pan et al., ACL 2025, section 5 and its public code). The gradients of
w and u are clipped at a norm of α there and divided by α here, hence 1.0.
"""

from typing import Any

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        "bilevel": {
            "alpha": 100.0,
            "mixture_optimizer": "adamw",
            "lr_lambda": 0.01,
            "lr_lambda_decay_style": "cosine",
            "resync_interval": None,
            "floor_share": 1.0,
        },
        "optimizer": {"lr_decay_style": "cosine", "lr_warmup_fraction": 0.03, "clip_grad": 1.0},
        "lisa": {"lisa_layers": 4, "lisa_interval": 20},
        "train": {"train_epochs": 1.0},
    }
}
