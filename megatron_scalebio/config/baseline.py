"""Which method finds the mixture, and the options of ScaleBiO's rivals."""

from dataclasses import dataclass
from typing import Literal

from megatron_scalebio.config.checks import option, require_positive, require_within
from megatron_scalebio.errors import UserError

Method = Literal[
    "scalebio", "uniform", "natural", "manual", "doremi", "doge", "fastmix", "regmix", "olmix",
    "climb", "less", "rho_loss",
]  # fmt: skip


@dataclass
class BaselineConfig:
    """The method of `reweight`. Every rival ends in the same weights.json."""

    method: Method = option("scalebio", "method that finds the weights")
    reference_iters: int | None = option(
        None,
        "doremi, rho_loss: steps that train the reference model [train_iters; rho_loss: at most "
        "three epochs of the validation sets]",
    )
    proxies: int | None = option(
        None,
        "regmix, olmix, climb: number of small trainings [as many as cost the same as ScaleBiO in "
        "train_iters steps]",
    )
    proxy_iters: int | None = option(None, "regmix, olmix, climb: steps of each [train_iters / 5]")
    swarm: str | None = option(
        None,
        "regmix, olmix: folder with ratios.csv and metrics.csv of finished trainings, in place of "
        "new ones",
    )
    domain_lr: float | None = option(
        None,
        "doremi, doge, fastmix: step size of the weights' update [1; 100 / train_iters up to 1; "
        "16 / train_iters up to 0.1]",
    )
    select_fraction: float = option(0.05, "less, rho_loss offline: share of the examples kept")
    less_checkpoints: int = option(4, "less: epochs of the warm-up; gradients are taken after each")
    less_warmup_fraction: float = option(0.05, "less: share of the examples it warms up on")
    less_dimensions: int = option(8192, "less: dimension that gradients are projected to")
    rho_online: bool = option(
        True,
        "rho_loss: select within each batch while training (false: once, at the end)",
    )
    rho_batch_share: float = option(0.1, "rho_loss online: share of each large batch trained on")

    def __post_init__(self) -> None:
        require_positive(
            self, "reference_iters", "proxies", "proxy_iters", "domain_lr", "less_checkpoints",
            "less_dimensions",
        )  # fmt: skip
        if self.swarm is not None and self.method not in ("regmix", "olmix"):
            raise UserError(f"swarm: {self.swarm!r} is not for the method {self.method} (drop it)")
        if self.swarm is not None and (self.proxies or self.proxy_iters):
            raise UserError(f"swarm: {self.swarm!r} is trained already (drop proxies, proxy_iters)")
        require_within(self, "(0, 1]", "select_fraction", "less_warmup_fraction", "rho_batch_share")
