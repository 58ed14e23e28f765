"""The options of the core: small, checked, and free of torch, so that they load in no time."""

import math
from dataclasses import dataclass
from typing import Literal

CONFIDENCE_LEVELS = (0.80, 0.90, 0.95, 0.98)
WHOLE_RESETS = 40  # before memory grows


@dataclass(frozen=True)
class BilevelOptions:
    """The bilevel problem, how its mixture is updated, and what is reported about it.

    Attributes:
        alpha: α, how strongly w is held to the training mixture: weight of L2(w) − L2(u), its
            training loss above u's; a step multiplies it by the square root of u's memory.
        mixture_optimizer: "eg", exponentiated gradient, or "adamw" on the logits, as published.
        lr_lambda: learning rate of the mixture [0.1 for eg, 0.01 for adamw].
        resync_interval: steps between resets of u to w, at least 2; under LISA every new draw of
            layers resets u instead. None: never.
        memory_growth: after WHOLE_RESETS resets, each one moves u only a part of the way to w, so
            that u's difference from w is remembered for resync_interval steps plus this share of
            the steps since then. 0: every reset is complete.
        loss_mean: a source's loss is the mean over its examples of their means over target tokens
            ("sample"), or the mean over all its target tokens ("token").
        average_fraction: last share of the steps that the reported weights average over.
        confidence: level of their intervals, one of CONFIDENCE_LEVELS.
        tolerance: largest half-width of an interval that counts as converged, a fraction of 1.

    Raises:
        ValueError: if one is out of its range.
    """

    alpha: float = 10.0
    mixture_optimizer: Literal["eg", "adamw"] = "eg"
    lr_lambda: float | None = None
    resync_interval: int | None = 10
    memory_growth: float = 0.5
    loss_mean: Literal["sample", "token"] = "sample"
    average_fraction: float = 0.5
    confidence: float = 0.95
    tolerance: float = 0.05

    def __post_init__(self) -> None:
        _require(0 < self.alpha < math.inf, "alpha", self.alpha, "above 0 and finite")
        _require(
            self.mixture_optimizer in ("eg", "adamw"),
            "mixture_optimizer", self.mixture_optimizer, "eg or adamw",
        )  # fmt: skip
        _require(self.rate > 0, "lr_lambda", self.lr_lambda, "above 0")
        interval = self.resync_interval
        _require(
            interval is None or (interval >= 2 and interval == int(interval)),
            "resync_interval", interval, "2 or more (at 1, u has no step to depart from w) or None",
        )  # fmt: skip
        growth = self.memory_growth
        _require(0 <= growth <= 1, "memory_growth", growth, "in [0, 1]")
        _require(
            self.loss_mean in ("sample", "token"), "loss_mean", self.loss_mean, "sample or token"
        )
        share = self.average_fraction
        _require(0 < share <= 1, "average_fraction", share, "in (0, 1]")
        _require(
            self.confidence in CONFIDENCE_LEVELS,
            "confidence", self.confidence, f"one of {CONFIDENCE_LEVELS}",
        )  # fmt: skip
        _require(self.tolerance > 0, "tolerance", self.tolerance, "above 0")

    @property
    def rate(self) -> float:
        """lr_lambda, or the default of the mixture's optimizer."""
        if self.lr_lambda is not None:
            return self.lr_lambda
        return 0.1 if self.mixture_optimizer == "eg" else 0.01


@dataclass(frozen=True)
class LisaOptions:
    """LISA: few layers train at a time, drawn anew at intervals.

    Attributes:
        layers: active layers over the whole model.
        interval: steps between draws.
        train_embedding: train the embedding and the output head in every period.
        train_norm: train the final norm in every period.
        train_routers: train the routers of all layers in every period.
    """

    layers: int
    interval: int = 20
    train_embedding: bool = True
    train_norm: bool = True
    train_routers: bool = False

    def __post_init__(self) -> None:
        whole = self.layers >= 1 and self.layers == int(self.layers)
        _require(whole, "layers", self.layers, "a whole number, 1 or more")
        _require(self.interval >= 1, "interval", self.interval, "1 or more")


def _require(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value}, it must be {wanted}")
