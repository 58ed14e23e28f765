"""The count sketch keeps inner products as its theory says, for the vectors gradients are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_scalebio.methods.sketch import PIECE, CountSketch, Identity, SketchTable

ROWS, COLUMNS, DIMENSIONS, SEEDS = 300, 256, 512, 150


def sketched(table: SketchTable, key: str, x: torch.Tensor) -> torch.Tensor:
    sketch, out = CountSketch(table, key, len(x)), torch.zeros(table.dimensions)
    for number, piece in enumerate(sketch.pieces):
        sketch.add(number, x[piece], out)
    return out


def pair_of_gradients(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Two matrices of more than a piece, unit length, a little alike."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    shared = draw(ROWS, COLUMNS)
    x, y = (0.5 * shared + draw(ROWS, COLUMNS) for _ in range(2))
    if kind == "rank one":
        left, right = draw(ROWS), draw(COLUMNS)
        x, y = (torch.outer(left + draw(ROWS), right + draw(COLUMNS)) for _ in range(2))
    if kind == "outlier column":
        x[:, 7] *= 100
        y[:, 7] *= 100
    return x.flatten() / x.norm(), y.flatten() / y.norm()


@pytest.mark.parametrize("kind", ["dense", "rank one", "outlier column"])
def test_inner_products_are_unbiased_and_of_the_known_variance(kind: str) -> None:
    x, y = pair_of_gradients(kind)
    assert len(x) > PIECE
    exact = float(x @ y)
    error = []
    for seed in range(SEEDS):
        table = SketchTable(DIMENSIONS, seed, torch.device("cpu"))
        estimate = float(sketched(table, "a", x) @ sketched(table, "a", y))
        error.append(estimate - exact)
    variance = (1 + exact**2) / DIMENSIONS
    assert abs(np.mean(error)) < 4 * np.sqrt(variance / SEEDS)
    # A sample variance of 150 is off by 12 %, one standard deviation.
    assert np.mean(np.square(error)) < 1.5 * variance


def test_parts_of_a_vector_are_projected_apart_and_add_up() -> None:
    """⟨S(a, b), S(b, a)⟩ estimates 2⟨a, b⟩: the two halves do not meet each other's places."""
    a, b = pair_of_gradients("dense")
    products = []
    for seed in range(SEEDS):
        table = SketchTable(DIMENSIONS, seed, torch.device("cpu"))
        one = sketched(table, "first", a) + sketched(table, "second", b)
        other = sketched(table, "first", b) + sketched(table, "second", a)
        products.append(float(one @ other))
    exact = 2 * float(a @ b)
    assert np.mean(products) == pytest.approx(exact, abs=4 * np.sqrt(8 / DIMENSIONS / SEEDS))
    again = SketchTable(DIMENSIONS, SEEDS - 1, torch.device("cpu"))
    assert torch.equal(sketched(again, "first", a) + sketched(again, "second", b), one)


def test_as_many_dimensions_as_coordinates_lose_nothing() -> None:
    out = torch.zeros(7)
    for identity, values in ((Identity(0, 3), [1.0, 2.0, 3.0]), (Identity(3, 4), [4.0] * 4)):
        identity.add(0, torch.tensor(values), out)
    assert out.tolist() == [1.0, 2.0, 3.0, 4.0, 4.0, 4.0, 4.0]
