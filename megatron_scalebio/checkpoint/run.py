"""What a checkpoint needs of a run."""

from collections.abc import Mapping
from typing import Any, Protocol

from megatron_scalebio.config import Config
from megatron_scalebio.core.training import Training


class _Data(Protocol):
    vocab_size: int
    tokenizer: Any


class Run(Protocol):
    """A run that can be saved and continued; `engine.state.RunState` is one.

    Attributes:
        stage: the command; a checkpoint resumes under the same alone.
        step: steps made.
        changes: from which step on which settings were others than before; a resume adds to them.
    """

    config: Config
    stage: str
    changes: list[str]

    @property
    def training(self) -> Training: ...
    @property
    def data(self) -> _Data: ...
    @property
    def step(self) -> int: ...

    def settings(self) -> Mapping[str, Any]:
        """The options that decide the steps to come, by field."""

    def common_state(self) -> dict[str, Any]:
        """What is equal on all ranks."""

    def load_common_state(self, state: dict[str, Any]) -> None: ...
