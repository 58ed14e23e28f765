"""How records are read and encoded: the options that `prepare` and `sample` share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_scalebio.config.checks import require_at_least, require_one_of
from megatron_scalebio.data.record_fields import FORMATS, RecordOptions

TOO_LONG = ("truncate", "drop", "split")
BAD_RECORDS = ("stop", "skip")
# What makes other examples of the same records.
REPEATED = (
    "format", "text_key", "columns", "ignore_fields", "too_long", "train_on_prompt",
    "chat_template",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EncodeConfig(RecordOptions):
    """What decides which examples a file of records gives.

    Attributes:
        bad_records: ``stop`` at the first record at fault, or ``skip`` and list them.
        seq_length: tokens of an example as the model sees it, so that it holds at most one
            token more; None for no limit.
        too_long: ``truncate`` (keep the head), ``drop``, ``split`` (pieces of ``seq_length``
            that overlap by one token, so that each token is predicted once); None splits text
            and truncates dialogues.
        train_on_prompt: every token of a dialogue is a target, not only assistant turns.
        chat_template: None for the tokenizer's own, ``plain`` for the built-in one, or a file.
    """

    bad_records: str = "stop"
    seq_length: int | None = None
    too_long: str | None = None
    train_on_prompt: bool = False
    chat_template: str | None = None

    def __post_init__(self) -> None:
        require_one_of("--format", self.format, ("auto", *FORMATS))
        require_one_of("--too-long", self.too_long, TOO_LONG)
        require_one_of("--bad-records", self.bad_records, BAD_RECORDS)
        require_at_least("--seq-length", self.seq_length, 1)

    @property
    def skips_bad(self) -> bool:
        return self.bad_records == "skip"

    def repeated(self) -> dict[str, Any]:
        """The options that make the same examples of the same records, for ``source.json``."""
        options = {name: getattr(self, name) for name in REPEATED}
        options["columns"] = [list(pair) for pair in self.columns]
        options["ignore_fields"] = list(self.ignore_fields)
        if self.chat_template is not None and Path(self.chat_template).is_file():
            options["chat_template"] = str(Path(self.chat_template).absolute())
        return options
