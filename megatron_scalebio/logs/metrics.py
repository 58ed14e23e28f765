"""What a run logs, one record a step: a line of `metrics.jsonl`, and the same in TensorBoard.

Of many sources a line has the heaviest; all of them are in `sources.npy`, at intervals.

`metrics.jsonl` is the record, TensorBoard a view of it. Both are cut back to the checkpoint's step
when a run resumes, so that no step appears twice.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_scalebio.errors import UserError
from megatron_scalebio.logs.records import (
    METRICS_FILE,
    encode_record,
    read_records,
    truncate_metrics,
    write_whole,
)
from megatron_scalebio.logs.source_table import LISTED_SOURCES, TABLE_FILE, SourceTable
from megatron_scalebio.logs.tensorboard import TensorBoardLog


class MetricsLog:
    """Appends each step to `metrics.jsonl` and to TensorBoard. For rank 0 alone.

    A step's line is written in one system call, so a kill between steps loses nothing and a kill
    inside one leaves at most a torn last line, which resuming drops.

    Args:
        run_dir: the run's output folder, made if missing.
        sources: names, in the order of the records' per-source lists (length S).
        validation: names, in the order of the records' `validation_losses`.
        global_batch_size: training sequences a step.
        resume_step: last step to keep of an earlier run in this folder (0: start afresh).
        tensorboard_dir: where events go [run_dir/tensorboard].
        tensorboard_log_interval: steps between TensorBoard points.

    Raises:
        UserError: when the folder can't be written.
    """

    def __init__(
        self,
        run_dir: Path | str,
        sources: Sequence[str],
        validation: Sequence[str],
        *,
        global_batch_size: int,
        resume_step: int = 0,
        tensorboard_dir: Path | str | None = None,
        tensorboard_log_interval: int = 1,
    ) -> None:
        self.path = Path(run_dir) / METRICS_FILE
        self.tensorboard_dir = Path(tensorboard_dir or Path(run_dir) / "tensorboard")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            truncate_metrics(self.path, resume_step)
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
            self._table = None
            if len(sources) > LISTED_SOURCES:
                table = Path(run_dir) / TABLE_FILE
                self._table = SourceTable(table, len(sources), resume_step)
            self._tensorboard = TensorBoardLog(
                self.tensorboard_dir, sources, validation, global_batch_size,
                tensorboard_log_interval, resume_step,
            )  # fmt: skip
        except OSError as error:
            raise self._disk_error(error) from None
        for record in read_records(self.path):
            self._tensorboard.log_samples_again(record)

    def log(self, record: Mapping[str, Any]) -> None:
        """Records one step; the fields are those of `metrics.jsonl`, as plain Python numbers.

        Floats in lists keep 9 significant digits (all that float32 has); NaN and Inf become null.

        Raises:
            UserError: when the disk is full or gone.
        """
        try:
            line = self._table.take(record) if self._table else record
            write_whole(self._file, encode_record(line))
            self._tensorboard.log(record)
        except OSError as error:
            raise self._disk_error(error) from None

    def close(self) -> None:
        """Writes what TensorBoard still holds and closes both."""
        self._file.close()
        try:
            if self._table:
                self._table.close()
            self._tensorboard.close()
        except OSError as error:
            raise self._disk_error(error) from None

    def _disk_error(self, error: OSError) -> UserError:
        return UserError(
            f"{self.path}: can't write: {error.strerror or error} (free or remount the disk, then "
            "start again: it resumes from the last checkpoint)"
        )
