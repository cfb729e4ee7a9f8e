"""The door between the two rooms: an operation on one batch of rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from ldm_ops.device import Device

Row = Mapping[str, Any]


class Op(BaseModel, ABC):
    """The parameters of one stage. Holds no weights; cheap to import and to pickle.

    `reads` names the columns of a row that `run` may look at, `writes` the columns that it returns.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    reads: ClassVar[frozenset[str]]
    writes: ClassVar[frozenset[str]]
    device: Device = "auto"

    run_only: ClassVar[frozenset[str]] = frozenset({"device"})
    """Fields that change how the work is done but not what comes out: they are no part of a row's key."""

    parts: ClassVar[tuple[str, ...]] = ()
    """How the names of a model's folders begin whose weights `load` reads; empty for all of them."""

    @abstractmethod
    def load(self, folder: Path) -> Any:
        """Load the weights from a local folder in diffusers' layout; slow, once per worker. Ops that take adapters
        have them as a second parameter."""

    @abstractmethod
    def run(self, model: Any, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """One output per row, in the same order, for one device batch.

        All rows agree in what must be equal inside a batch (size, steps, scheduler, guidance). The caller fixes the
        batch's length and pads it, so the shapes on the device never vary. Raises on any row that cannot be done; the
        caller finds out which one it was.
        """

    def bucket(self, row: Row) -> tuple[Any, ...]:
        """What must be equal inside one device batch."""
        return ()

    @staticmethod
    def is_out_of_memory(error: BaseException) -> bool:
        """Whether a smaller batch may help."""
        # By name: torch is not imported here, and its CPU allocator raises a plain RuntimeError.
        named = type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
        # Beside its own allocator's errors CUDA has some for pinned memory and for libraries' workspaces.
        said = ("allocate memory", "not enough memory", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")
        return named or any(words in str(error) for words in said)


class RowRefused(ValueError):
    """A row that the model cannot make; `kind` becomes the manifest's error_type."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
