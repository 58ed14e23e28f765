"""Reads tensors of a Megatron `torch_dist` checkpoint, saved under any layout, one at a time."""

import pickle
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.serialization import load_common_state_dict
from megatron.core.safe_globals import register_safe_globals
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, LoadPlan
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_scalebio.checkpoint.folder import BILEVEL, damage, data_alone
from megatron_scalebio.convert.table import Whole
from megatron_scalebio.errors import UserError

# Where a model's tensors are, beside those of optimizers and random states.
_MODEL = ("embedding.", "decoder.", "output_layer.", "encoder.", "mtp.")
_READ_ERRORS = (
    RuntimeError, OSError, EOFError, pickle.UnpicklingError, AssertionError, ValueError,
    CheckpointException,  # not an Exception
)  # fmt: skip


class MegatronFolder:
    """One checkpoint folder.

    Args:
        folder: with `.metadata`.
        prefix: what the names begin with (`u.` in a bilevel run's own part).

    Raises:
        UserError: if a file is missing or cut short.
    """

    def __init__(self, folder: Path, prefix: str = "") -> None:
        problem = damage(folder)  # reads the metadata without running what it may name
        if problem:
            raise UserError(f"{problem} (the checkpoint is not whole: use another)")
        self.folder = folder
        self._prefix = prefix
        self._reader = FileSystemReader(folder)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._held = {
            name.removeprefix(prefix): entry
            for name, entry in metadata.state_dict_metadata.items()
            if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
        }

    def holds(self, whole: Whole) -> bool:
        return self._key(whole) is not None

    def shape(self, whole: Whole) -> tuple[int, ...]:
        """Its global shape; of a layer's tensor, without the axes of layers and experts.

        Raises:
            UserError: if the checkpoint has another number of them.
        """
        key, size = self._key_and_size(whole)
        _, sizes = whole.place_in(key)
        if size[: len(sizes)] != sizes:
            what = "layers" if whole.expert is None else "experts"
            held, wanted = (" x ".join(map(str, each)) for each in (size[: len(sizes)], sizes))
            raise UserError(
                f"{self.folder}: {key} has {held} {what}, the reference {wanted} (use the model "
                "that the checkpoint came from)"
            )
        return size[len(sizes) :]

    def dtype(self, whole: Whole) -> torch.dtype:
        return self._held[self._key_and_size(whole)[0]].properties.dtype

    def unknown(self, wholes: list[Whole]) -> list[str]:
        """Names of model tensors that are none of these."""
        known = {key for whole in wholes for key in (whole.stacked_key, whole.layer_key)}
        return [key for key in self._held if key.startswith(_MODEL) and key not in known]

    def read(self, whole: Whole, rows: int) -> Tensor:
        """The first rows of a tensor (all but a padded vocabulary has no more).

        Raises:
            UserError: if its bytes are damaged.
        """
        key, size = self._key_and_size(whole)
        place, _ = whole.place_in(key)
        offset = (*place, *(0,) * (len(size) - len(place)))
        size = (*(1,) * len(place), rows, *size[len(place) + 1 :])
        region = ChunkStorageMetadata(torch.Size(offset), torch.Size(size))
        out = torch.empty(size, dtype=self._held[key].properties.dtype)
        items = create_read_items_for_chunk_list(self._prefix + key, self._held[key], [region])
        try:
            self._reader.read_data(LoadPlan(items), _Into(out)).wait()
        except _READ_ERRORS as error:
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{self.folder}: could not read {self._prefix + key}: {line} (the checkpoint is "
                "damaged: use another)"
            ) from None
        return out[(0,) * len(place)]

    def _key(self, whole: Whole) -> str | None:
        for key in (whole.stacked_key, whole.layer_key):
            if key in self._held:
                return key
        return None

    def _key_and_size(self, whole: Whole) -> tuple[str, tuple[int, ...]]:
        key = self._key(whole)
        assert key is not None, "ask `holds` first"
        return key, tuple(self._held[key].size)


class _Into(DefaultLoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self._out = out

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        place = tuple(
            slice(offset, offset + length)
            for offset, length in zip(read_item.dest_offsets, read_item.lengths, strict=True)
        )
        return self._out[place]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """What was read has been copied to its place already."""


def padding_multiple(folder: Path) -> int | None:
    """What the vocabulary is padded to a multiple of, if the checkpoint's arguments tell."""
    register_safe_globals()  # argparse.Namespace among them
    with data_alone():
        try:
            common = load_common_state_dict(folder)
        except _READ_ERRORS:  # Megatron-LM's may hold objects of its own
            return None
    args = common.get("args")
    divisor = getattr(args, "make_vocab_size_divisible_by", None)
    tp = getattr(args, "tensor_model_parallel_size", None)
    return divisor * tp if isinstance(divisor, int) and isinstance(tp, int) else None


def open_u(folder: Path) -> MegatronFolder:
    """What u has of its own beside a bilevel run's checkpoint; the rest of it equals w.

    Raises:
        UserError: if the checkpoint is not of a bilevel run.
    """
    if not (folder / BILEVEL).is_dir():
        raise UserError(
            f"{folder}: holds no u: it is not the checkpoint of a bilevel run (leave out --which, "
            "to export w)"
        )
    return MegatronFolder(folder / BILEVEL, "u.")
