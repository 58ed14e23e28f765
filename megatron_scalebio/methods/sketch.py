"""Count sketch (Charikar, Chen & Farach-Colton 2002): a random projection at one addition a number.

    (S x)_k = Σ over i with h(i) = k of s(i) · x_i        h(i) a random place of d, s(i) = ±1

Inner products are kept as by a dense Johnson-Lindenstrauss projection (Weinberger et al. 2009):

    E ⟨Sx, Sy⟩ = ⟨x, y⟩        Var ⟨Sx, Sy⟩ ≤ (‖x‖² ‖y‖² + ⟨x, y⟩²) / d

A dense one takes d additions a number: of a whole model's gradient, more than the gradient itself.

h and s are not stored for every coordinate. A vector is cut into pieces; each reads a random window
of one table of random (h, s), and its sum is then turned by a random number of places and negated
or not. Two coordinates of one piece have independent entries of the table; of two pieces, the turn
makes their places and the negation their signs independent.
"""

import hashlib

import numpy as np
import torch

PIECE = 1 << 15  # what is worked out of it stays in a CPU's cache
_TABLE = 1 << 20


class SketchTable:
    """What the sketches of a run share: d and a table of bucket 2h + [s = −1] entries, int32."""

    def __init__(self, dimensions: int, seed: int, device: torch.device) -> None:
        self.dimensions, self.seed, self.device = dimensions, seed, device
        generator = np.random.default_rng((seed, 3))
        buckets = generator.integers(2 * dimensions, size=_TABLE, dtype=np.int32)
        self.bucket_T = torch.from_numpy(buckets).to(device)


class CountSketch:
    """The sketch of one part of a vector. Sketches of a vector's parts add up to its sketch.

    Args:
        key: the part's name; parts of different names are projected independently.
        size: its coordinates.
    """

    def __init__(self, table: SketchTable, key: str, size: int) -> None:
        self.table = table
        self.pieces = [slice(at, min(at + PIECE, size)) for at in range(0, size, PIECE)]
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        generator = np.random.default_rng((table.seed, 4, int.from_bytes(digest, "big")))
        self._window = generator.integers(_TABLE - PIECE + 1, size=len(self.pieces)).tolist()
        self._turn = generator.integers(table.dimensions, size=len(self.pieces)).tolist()
        self._sign = (2 * generator.integers(2, size=len(self.pieces)) - 1).tolist()

    def add(self, number: int, values: torch.Tensor, out_D: torch.Tensor) -> None:
        """Adds the sketch of one piece's coordinates to `out_D`, float32."""
        first, dimensions = self._window[number], self.table.dimensions
        bucket = self.table.bucket_T[first : first + len(values)]
        sums = torch.zeros(2 * dimensions, device=out_D.device)
        sums.index_add_(0, bucket, values)
        positive, negative = sums.view(dimensions, 2).unbind(1)
        out_D.add_((positive - negative).roll(self._turn[number]), alpha=self._sign[number])


class Identity:
    """In a sketch's place where there are as many dimensions as coordinates: nothing is lost.

    Args:
        offset: of the part's first coordinate in the whole vector.
    """

    def __init__(self, offset: int, size: int) -> None:
        self.pieces, self._offset = [slice(0, size)], offset

    def add(self, number: int, values: torch.Tensor, out_D: torch.Tensor) -> None:
        out_D[self._offset : self._offset + len(values)] += values
