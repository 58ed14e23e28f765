"""The processes that share a conversion: one, or those that torchrun or srun started."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from megatron_scalebio.errors import UserError
from megatron_scalebio.launcher import world_size_from_environment


class Ranks:
    """This process's place among those that share the work."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def each[T](self, work: Callable[[], T]) -> T:
        """Does something on every rank and gives this rank's result.

        Raises:
            UserError: on all ranks, if one of them raised one or its disk failed it.
        """
        result, problem = None, None
        try:
            result = work()
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{error.filename or 'disk'}: {error.strerror or error}"
        for problem_there in self.gather(problem):
            if problem_there is not None:
                raise UserError(problem_there)
        return cast(T, result)

    def main(self, work: Callable[[], None]) -> None:
        """Does something on rank 0 while the others wait; all raise what it raises."""
        self.each(work if self.is_main else lambda: None)

    def gather[T](self, value: T) -> list[T]:
        """All ranks' values, in their order, on all ranks."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def share[T](self, items: Sequence[T], nbytes: Callable[[T], int]) -> list[T]:
        """This rank's part of the items: neighbours, and about as many bytes as the others'."""
        total = sum(map(nbytes, items)) or 1
        mine, before = [], 0
        for item in items:
            middle = before + nbytes(item) / 2
            if int(middle * self.size / total) == self.rank:
                mine.append(item)
            before += nbytes(item)
        return mine


@contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that a launcher started, joined now or by the run that this is part of."""
    if world_size_from_environment() == 1:
        yield Ranks()
        return
    import torch.distributed as dist
    from megatron.core import parallel_state  # takes seconds

    from megatron_scalebio import runtime
    from megatron_scalebio.config import Config

    is_part_of_a_run = parallel_state.model_parallel_is_initialized()
    runtime.start(Config())
    try:
        yield Ranks(runtime.rank(), dist.get_world_size())
    finally:
        if not is_part_of_a_run:
            runtime.stop_model_parallel()
