"""Made-up trajectories of mixtures, and the formulas of their intervals written out."""

from __future__ import annotations

import math

import torch


def ar1_paths(num_paths: int, steps: int, memory: float, *, seed: int) -> torch.Tensor:
    """Stationary AR(1) noise of unit marginal variance, shape ``[steps, num_paths]``."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(steps, num_paths, generator=generator, dtype=torch.float64)
    path = torch.empty_like(noise)
    path[0] = noise[0]
    for t in range(1, steps):
        path[t] = memory * path[t - 1] + (1 - memory**2) ** 0.5 * noise[t]
    return path


def mixture_path(noise_scale: float, drift: float = 0.0, steps: int = 400) -> torch.Tensor:
    """Two weights around one half, with AR(1) noise and a linear drift over the whole path."""
    first = 0.5 + noise_scale * ar1_paths(1, steps, 0.8, seed=4)[:, 0]
    first = first + drift * torch.linspace(-0.5, 0.5, steps, dtype=torch.float64)
    return torch.stack([first, 1 - first], dim=1)


def path_of(*columns: list[float]) -> torch.Tensor:
    return torch.tensor(columns, dtype=torch.float64).T


def wave(size: float, steps: int = 100) -> list[float]:
    return [size * math.sin(2 * math.pi * (k + 0.5) / steps) for k in range(steps)]


def still_noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


# Abadir and Paruolo 1997, table II.
PUBLISHED = {0.80: 3.875, 0.90: 5.323, 0.95: 6.747, 0.98: 8.613}


def half_width(path: list[float], confidence: float = 0.95) -> float:
    """c · sqrt(V / n), V = (1/n²) Σ_r (Σ_{k≤r} (x_k − x̄))²: the formula written as a loop."""
    n, mean = len(path), sum(path) / len(path)
    v = sum(sum(x - mean for x in path[:r]) ** 2 for r in range(1, n + 1)) / n**2
    return PUBLISHED[confidence] * (v / n) ** 0.5


def left(path: list[float]) -> float:
    """Of an error b / t: its mean from T/2 to T, from how it differs between the halves of that."""
    half = len(path) // 2
    apart = sum(path[half:]) / (len(path) - half) - sum(path[:half]) / half
    return abs(apart) * (2 * math.log(2)) / (4 * math.log(1.5) - 4 * math.log(4 / 3))
