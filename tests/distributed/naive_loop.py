"""Whole steps of `reweight` and of `train` from their definitions: rates, AdamW, mixture, resets.

In float64, over the gradients of `naive`. Options are those of a run's configuration; where one is
not given, the default stands here as its help text says it.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import torch

from tests.distributed import naive
from tests.distributed.naive import Weights

# The examples of a batch: those of each source (or validation set), by its number.
Groups = dict[int, list]


def rate(
    peak: float, floor: float, style: str, warmup: float, rounds: int, tau: float,
    step: int, steps: int,
) -> float:  # fmt: skip
    """Up to `peak` in the first share `warmup` of the steps, down to `floor` at the last one.

    Divided by τ from each outer round to the next; of both, a step has the value it ends with.
    """
    rising, done = int(warmup * steps), step + 1
    if done <= rising:
        value = peak * done / rising
    else:
        gone = (done - rising) / (steps - rising)
        left = {
            "constant": 1.0, "linear": 1.0 - gone, "cosine": (1.0 + math.cos(math.pi * gone)) / 2,
        }[style]  # fmt: skip
        value = floor + (peak - floor) * left
    return value / tau ** (step * rounds // steps)


class Model:
    """Weights under torch's AdamW, which decays matrices but neither norms nor biases."""

    def __init__(self, weights: Weights, options: dict) -> None:
        self.weights = {k: v.double().clone().requires_grad_() for k, v in weights.items()}
        self.options = options
        self.restart()

    def restart(self) -> None:
        """AdamW without a past."""
        vectors = {k for k in self.weights if "norm" in k or k.endswith(".bias")}
        groups = [
            {"params": [v for k, v in self.weights.items() if (k in vectors) == plain],
             "weight_decay": 0.0 if plain else self.options.get("weight_decay", 0.0)}
            for plain in (True, False)
        ]  # fmt: skip
        betas = (self.options.get("adam_beta1", 0.9), self.options.get("adam_beta2", 0.95))
        eps = self.options.get("adam_eps", 1e-8)
        self.adamw = torch.optim.AdamW(groups, betas=betas, eps=eps)

    def take_over(self, other: Model, share: float = 1.0) -> None:
        """Weights and AdamW's state of another, or mine + share (theirs − mine)."""
        old = copy.deepcopy(self.adamw.state_dict()["state"])
        new = copy.deepcopy(other.adamw.state_dict())
        for mine, theirs in zip(self.weights.values(), other.weights.values(), strict=True):
            mine.data += share * (theirs.data - mine.data)
        for number, state in new["state"].items():
            for name, value in state.items():
                if share < 1 and name != "step":
                    value.copy_(old[number][name] + share * (value - old[number][name]))
        self.adamw.load_state_dict(new)

    def step(self, gradients: Weights, lr: float, trains: Weights) -> float:
        """One step where `trains` is true; the norm of the gradient there, before clipping."""
        parts = {k: torch.where(trains[k], g, 0.0) for k, g in gradients.items()}
        norm = math.sqrt(sum(float(g.square().sum()) for g in parts.values()))
        limit = self.options.get("clip_grad", 1.0)
        scale = min(1.0, limit / norm) if limit else 1.0
        before = {k: v.detach().clone() for k, v in self.weights.items()}
        for k, v in self.weights.items():
            v.grad = parts[k] * scale
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        for k, v in self.weights.items():
            v.data = torch.where(trains[k], v.data, before[k])
        return norm


class Mixture:
    """λ under exponentiated gradient, λ_i −= lr g_i / √(v / (1 − βᵗ)), or under AdamW.

    v ← β v + (1 − β) Σ_i p_i g_i² with β = 0.99. No weight falls below 1e-4 / S. From the 31st
    step on a g of more than 6 times its usual size √(v / (1 − βᵗ)) is cut to that. No g_i counts as
    more than 15 times that size. Where u's memory is m > 1 resets long,

        λ_i −= lr · 0.5 / (m + 9) · g_i / √(ṽ / (1 − βᵗ))
        ṽ ← β ṽ + (1 − β) Σ_i p_i g_i ḡ_i,     no less than v / min(m, 25), no more than v

    with ḡ the mean of the cut g before this one, after which ḡ += (g − ḡ) / min(10, t). Before the
    first such step p becomes the mean of the second half of those so far.
    """

    def __init__(self, initial: list[float], kind: str) -> None:
        weights = np.array(initial, dtype=np.float64)
        self.p = weights / weights.sum()
        self.logits = torch.tensor(np.log(self.p)).requires_grad_()
        self.v, self.lasting, self.t = 0.0, 0.0, 0
        self.mean = np.zeros(len(weights))
        self.past: list[np.ndarray] = []
        self.is_slow = False
        self.adamw = torch.optim.AdamW([self.logits], weight_decay=0.0) if kind == "adamw" else None

    def step(self, g: np.ndarray, lr: float, memory: float = 1.0) -> float:
        """Moves λ and p; the norm of Jᵀ g, J = diag(p) − p pᵀ."""
        gradient = (np.diag(self.p) - np.outer(self.p, self.p)) @ g
        self.t += 1
        if self.adamw:
            self.logits.grad = torch.tensor(gradient)
            self.adamw.param_groups[0]["lr"] = lr
            self.adamw.step()
            moved = np.exp(self.logits.detach().numpy())
            self.p = moved / moved.sum()
        else:
            size = math.sqrt(float((self.p * g**2).sum()))
            usual = math.sqrt(self.v / (1 - 0.99 ** (self.t - 1))) if self.t > 1 else 0.0
            if self.t > 30 and size > 6 * usual > 0:
                g, size = g * (6 * usual / size), 6 * usual
            self.v = 0.99 * self.v + 0.01 * size**2
            self.lasting = 0.99 * self.lasting + 0.01 * float((self.p * g * self.mean).sum())
            usual = math.sqrt(self.v / (1 - 0.99**self.t))
            self.mean = self.mean + (g - self.mean) / min(10, self.t)
            if memory > 1 and not self.is_slow:
                self.is_slow = True
                if self.past:
                    self.p = np.mean(self.past[-(len(self.past) // 2) :], axis=0)
            if memory > 1:
                lr *= 0.5 / (memory + 9)
                if self.v:
                    lasting = min(self.v, max(self.lasting, self.v / min(memory, 25)))
                    lr *= math.sqrt(self.v / lasting)
            moved = self.p * np.exp(-lr * np.clip(g / usual if usual else g, -15, 15))
            moved = np.maximum(moved / moved.sum(), 1e-4 / len(g))
            self.p = moved / moved.sum()
        self.past.append(self.p)
        return float(np.linalg.norm(gradient))


def inclusion(p: np.ndarray, places: int, floor_share: float) -> list[float]:
    """The chance that each is in a batch: its expected seats, where there are too few places."""
    if places >= len(p):
        return [1.0] * len(p)
    return np.minimum(1.0, places * ((1 - floor_share) * p + floor_share / len(p))).tolist()


def mean_of_those_there(weights, losses: list[float], chances: list[float]) -> float:
    """Σ over those there of p ℓ / π, by Σ over those there of p / π."""
    rows = [
        (p / chance, loss)
        for p, loss, chance in zip(weights, losses, chances, strict=True)
        if not math.isnan(loss)
    ]
    return sum(p * loss for p, loss in rows) / sum(p for p, _ in rows)


def everywhere(weights: Weights) -> Weights:
    return {k: torch.ones_like(v, dtype=torch.bool) for k, v in weights.items()}


def in_full(there: Groups, losses: list[float], count: int) -> list[float]:
    """The losses of those that are there, in their order, with NaN for those that are missing."""
    known = dict(zip(sorted(there), losses, strict=True))
    return [known.get(number, math.nan) for number in range(count)]


class Reweighting:
    """ScaleBiO's loop.

    Args:
        tree: the run's configuration, of which the sections optimizer, bilevel, lisa, data, train
            are read.
        weights: of w at the start.
        initial, shares: weights of the sources at the start, and of the validation sets.
    """

    whole_resets = 40

    def __init__(
        self, tree: dict, weights: Weights, shape: dict, initial: list[float], shares: list[float]
    ) -> None:
        self.tree, self.shape = tree, shape
        self.w, self.u = (Model(weights, tree["optimizer"]) for _ in range(2))
        self.mixture = Mixture(initial, tree["bilevel"].get("mixture_optimizer", "eg"))
        self.shares = np.array(shares) / np.sum(shares)
        self.at, self.tokens = 0, 0

    def rates(self) -> dict[str, float]:
        optimizer, bilevel = self.tree["optimizer"], self.tree["bilevel"]
        steps = self.tree["train"]["train_iters"]
        rounds, tau = bilevel.get("outer_rounds", 1), bilevel.get("alpha_growth", 1.0)
        warmup = optimizer.get("lr_warmup_fraction", 0.03)
        style = optimizer.get("lr_decay_style", "cosine")
        of_w = optimizer["lr"]
        floor = optimizer.get("min_lr", of_w / 10)
        of_u = optimizer.get("lr_u", of_w)
        of_mixture = bilevel.get("lr_lambda_decay_style", "constant")
        usual = 0.1 if bilevel.get("mixture_optimizer", "eg") == "eg" else 0.01

        def of(peak: float, floor: float, style: str, warmup: float) -> float:
            return rate(peak, floor, style, warmup, rounds, tau, self.at, steps)

        return {
            "lr_w": of(of_w, floor, style, warmup),
            "lr_u": of(of_u, floor * of_u / of_w, style, warmup),
            "lr_lambda": of(
                bilevel.get("lr_lambda", usual), 0.0, of_mixture,
                0.0 if of_mixture == "constant" else warmup,
            ),
            "alpha": bilevel.get("alpha", 10.0) / of(1.0, 1.0, "constant", 0.0),
            "outer_round": self.at * rounds // steps,
        }  # fmt: skip

    def step(self, train: Groups, valid: Groups, layers: list[int] | None) -> dict:
        """One step on a batch of (tokens, targets) examples; what a run's record says of it.

        Args:
            layers: those that train; None: all.
        """
        rates, p = self.rates(), self.mixture.p
        memory = self.memory()
        alpha = rates["alpha"] = rates["alpha"] * memory**0.5
        of_sources, of_sets = self._chances()
        shared = self._begin()
        of_w, of_u, of_logits, losses = naive.bilevel_gradients(
            self.w.weights, self.u.weights, torch.tensor(np.log(p)), train, valid,
            self.shares.tolist(), alpha, self.shape, self._mean(), (of_sources, of_sets),
        )  # fmt: skip
        loss_w, loss_u = (in_full(train, losses[name], len(p)) for name in ("w", "u"))
        validation = in_full(valid, losses["validation"], len(self.shares))
        g = self._hypergradient(np.array(loss_w) - np.array(loss_u), of_sources, alpha)
        if len(train) == len(p):  # the gradient of λ is then that of autograd
            np.testing.assert_allclose(p * (g - p @ g), of_logits.numpy(), atol=1e-12)
        trains = self._trained(layers)
        tokens = sum(len(t) - 1 for part in train.values() for t, _ in part) * (1 if shared else 2)
        tokens += sum(len(t) - 1 for part in valid.values() for t, _ in part)
        self.tokens += tokens
        self.at += 1
        return {
            **rates,
            "step": self.at,
            "weights": p.tolist(),
            "loss_w": loss_w,
            "loss_u": loss_u,
            "excess_loss": [a - b for a, b in zip(loss_w, loss_u, strict=True)],
            "train_loss_w": mean_of_those_there(p, loss_w, of_sources),
            "train_loss_u": mean_of_those_there(p, loss_u, of_sources),
            "validation_losses": validation,
            "validation_loss": mean_of_those_there(self.shares, validation, of_sets),
            "tokens": tokens,
            "grad_norm_w": self.w.step(of_w, rates["lr_w"], trains),
            "grad_norm_u": self.u.step(of_u, rates["lr_u"], trains),
            "grad_norm_lambda": self.mixture.step(g, rates["lr_lambda"], memory),
        }

    def _begin(self) -> bool:
        """Resets u every k steps, or with LISA's periods, in which AdamW starts anew.

        Returns:
            Whether u is w now: after forty resets one goes only a part of the way, 1 / memory.
        """
        every = self.tree["bilevel"].get("resync_interval", 10)
        interval = self.tree.get("lisa", {}).get("lisa_interval")
        if interval and self.at % interval == 0:
            for model in (self.w, self.u):
                model.restart()
        resets = every is not None and self.at % (interval or every) == 0
        if resets:
            self.u.take_over(self.w, 1 / self.memory())
        return resets and self.memory() == 1

    def memory(self) -> float:
        """Of u's departure from w, in resets."""
        bilevel = self.tree["bilevel"]
        every = bilevel.get("resync_interval", 10)
        if every is None or self.tree.get("lisa", {}).get("lisa_interval"):
            return 1.0
        grown = max(0.0, self.at / every - self.whole_resets)
        return 1.0 + bilevel.get("memory_growth", 0.25) * grown

    def _trained(self, layers: list[int] | None) -> Weights:
        trains = everywhere(self.w.weights)
        for name, mask in trains.items():
            if layers is not None and name.startswith("decoder.layers."):
                mask[[n for n in range(len(mask)) if n not in layers]] = False
        return trains

    def _hypergradient(self, excess: np.ndarray, chances: list[float], alpha: float) -> np.ndarray:
        """g_i = α (ℓ_i(w) − ℓ_i(u)), less its mean under p of those there, by their inclusion."""
        there = ~np.isnan(excess)
        mean = (self.mixture.p * excess)[there].sum() / self.mixture.p[there].sum()
        return np.where(there, alpha * (excess - mean) / np.array(chances), 0.0)

    def _chances(self) -> tuple[list[float], list[float]]:
        """Of sources and of validation sets, to be in a batch."""
        train, floor = self.tree["train"], self.tree["bilevel"].get("floor_share", 0.25)
        places = train["global_batch_size"]
        return (
            inclusion(self.mixture.p, places, floor),
            inclusion(self.shares, train.get("validation_batch_size", places), 0.5),
        )

    def _mean(self) -> str:
        return self.tree["data"].get("loss_mean", "sample")


class Training(Reweighting):
    """`train`: w alone, on a mixture that stays as it is."""

    def step(self, train: Groups, valid: Groups, layers: list[int] | None) -> dict:
        p = self.mixture.p
        chances, _ = self._chances()
        losses = naive.mean_losses(self.w.weights, self.shape, train, self._mean())
        whole = sum(p[i] / chances[i] * loss for i, loss in losses.items())
        parts = torch.autograd.grad(whole, list(self.w.weights.values()))
        gradients = dict(zip(self.w.weights, parts, strict=True))
        lr = self.rates()["lr_w"]
        loss = in_full(train, [losses[i].item() for i in sorted(losses)], len(p))
        tokens = sum(len(t) - 1 for part in train.values() for t, _ in part)
        self.tokens += tokens
        self.at += 1
        return {
            "step": self.at,
            "lr_w": lr,
            "loss_w": loss,
            "train_loss_w": mean_of_those_there(p, loss, chances),
            "tokens": tokens,
            "grad_norm_w": self.w.step(gradients, lr, self._trained(layers)),
        }
