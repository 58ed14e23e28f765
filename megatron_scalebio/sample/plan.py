"""How many rows each source gives to a sample, and which: pure functions of weights and a seed.

    rows_i = min(cap_i, t · s_i)   with t such that they add up to N;  s_i = p_i / e_i

p_i is the learned weight, e_i the training examples that a row of source i becomes, and cap_i the
most that source i may give. Where cap_i binds, what is left goes to the others in proportion.
"""

import zlib

import numpy as np
import numpy.typing as npt

from megatron_scalebio.mixture.sampler import Floats, Ints, shuffled_index

_CHUNK = 1 << 16


def allocate(shares_S: Floats, caps_S: Ints, total: int) -> Ints:
    """Rows of each source: ``total`` in proportion to the shares, none above its cap.

    Fewer than ``total`` only where all sources with a share are at their caps. Fractions are
    rounded by largest remainder, ties to the earlier source.
    """
    wanted_S = np.zeros(len(shares_S))
    free_S = (shares_S > 0) & (caps_S > 0)
    left = float(total)
    while free_S.any() and left > 0:
        offer_S = np.where(free_S, shares_S, 0.0)
        offer_S /= offer_S.max()  # so that tiny shares do not underflow in the sum
        offer_S *= left / offer_S.sum()
        full_S = free_S & (wanted_S + offer_S >= caps_S)
        if not full_S.any():
            wanted_S += offer_S
            break
        # A source that is full at this offer stays full: later offers only grow.
        left -= float((caps_S - wanted_S)[full_S].sum())
        wanted_S = np.where(full_S, caps_S, wanted_S)
        free_S &= ~full_S
    return _whole(wanted_S, caps_S, min(total, round(wanted_S.sum())))


def _whole(wanted_S: Floats, caps_S: Ints, total: int) -> Ints:
    counts_S = np.floor(np.round(wanted_S, 9)).astype(np.int64)
    remainder_S = np.where(counts_S < caps_S, np.round(wanted_S - counts_S, 9), -1.0)
    first = np.argsort(-remainder_S, kind="stable")[: total - int(counts_S.sum())]
    counts_S[first] += 1
    return counts_S


def draw_rows(name: str, usable_R: npt.NDArray[np.bool_], count: int, seed: int) -> Ints:
    """The ``count`` rows of a source, ascending, repeated where it gives more than one epoch.

    Each epoch takes the usable rows in a pseudo-random order of its own that depends on the seed
    and the source's name alone, so that a smaller sample is part of a larger one.
    """
    usable = int(usable_R.sum())
    if not count:
        return np.empty(0, np.int64)
    epochs, rest = divmod(count, usable)
    whole = np.repeat(np.flatnonzero(usable_R), epochs)
    return np.sort(np.concatenate([whole, _first_usable(name, usable_R, epochs, rest, seed)]))


def _first_usable(
    name: str, usable_R: npt.NDArray[np.bool_], epoch: int, count: int, seed: int
) -> Ints:
    rows = len(usable_R)
    found: list[Ints] = []
    for start in range(0, rows, _CHUNK):
        if count <= 0:
            break
        order = shuffled(np.arange(start, min(rows, start + _CHUNK)), rows, name, seed, epoch)
        order = order[usable_R[order]][:count]
        found.append(order)
        count -= len(order)
    return np.concatenate([np.empty(0, np.int64), *found])


def shuffled(position: Ints, size: int, name: str, seed: int, epoch: int = 0) -> Ints:
    """What stands at each position of a pseudo-random order of ``size`` things called ``name``."""
    group = np.full(len(position), zlib.crc32(name.encode()), np.int64)
    return shuffled_index(position + epoch * size, np.full(len(position), size), group, seed)
