"""Which examples of a global batch share a packed row.

    the longest first, each to the row that has fewest tokens so far    (Graham 1969: LPT)
    in as few rows as none then has too many tokens

So rows come out about equally long, and all ranks and pipeline stages have like work. The rows are
a function of the lengths alone: every rank computes all of them.
"""

import heapq

from megatron_scalebio.mixture.sampler import Ints


def packed_rows(length_B: Ints, most: int, multiple: int) -> list[list[int]]:
    """The members of each row, in their order in the batch; rows ascend by their tokens.

    Args:
        length_B: tokens of each example, none above `most`.
        most: tokens in a row.
        multiple: the number of rows is a multiple of it, as the number of examples is.
    """
    assert len(length_B) % multiple == 0 and length_B.max() <= most
    fewest = -(-int(length_B.sum()) // most)
    for count in range(-(-fewest // multiple) * multiple, len(length_B) + 1, multiple):
        rows = _dealt(length_B, count)
        if all(tokens <= most for tokens, _, _ in rows):
            return [sorted(members) for _, _, members in sorted(rows)]
    raise AssertionError("every example has a row of its own")


def _dealt(length_B: Ints, count: int) -> list[tuple[int, int, list[int]]]:
    """(tokens, number, members) of each of so many rows."""
    rows: list[tuple[int, int, list[int]]] = [(0, number, []) for number in range(count)]
    for member in (-length_B).argsort(kind="stable").tolist():
        tokens, number, members = rows[0]
        members.append(member)
        heapq.heapreplace(rows, (tokens + int(length_B[member]), number, members))
    return rows
