"""Dead letters: the rows that failed, to look at in groups, to take along as a table, and to try again."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from pipelines import manifest
from pipelines.errors import JobError, NotWhole
from pipelines.plans import Plan, read_plans
from pipelines.storage import Store

PLANNED = "plan"
"""The stage of a row that was wrong in its table: made again, it is as wrong."""

COLUMNS = (
    "key",
    "id",
    "stage",
    "error_type",
    "error_message",
    "attempt",
    "prompt",
    "image",
    "seed",
    "source_uri",
    "source_row",
)
EXAMPLES = 3
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""The last four are the same signs in full width, which some spreadsheets read alike."""


@dataclass
class Group:
    """Failed rows of one stage and error type; `examples` are the first EXAMPLES of them, by COLUMNS."""

    stage: str
    error_type: str
    num_rows: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)


def groups(output: str, storage_options: dict[str, Any] | None = None) -> list[Group]:
    """The failed rows of an output by stage and error type, the largest group first.

    Raises:
        NotWhole: no plan is there, or a part is not whole.
    """
    found: dict[tuple[str, str], Group] = {}
    for row in _rows(output, storage_options):
        stage, kind = row["stage"] or "", row["error_type"] or ""
        group = found.setdefault((stage, kind), Group(stage, kind))
        group.num_rows += 1
        if len(group.examples) < EXAMPLES:
            group.examples.append(row)
    return sorted(found.values(), key=lambda group: (-group.num_rows, group.stage, group.error_type))


def write_csv(output: str, path: Path, storage_options: dict[str, Any] | None = None) -> int:
    """Write the failed rows as CSV, COLUMNS of them; how many.

    A cell that a spreadsheet would compute has an apostrophe in front (OWASP, CSV injection).

    Raises:
        NotWhole: no plan is there, or a part is not whole.
        JobError: nothing can be written at `path`.
    """
    num_rows = 0
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            for row in _rows(output, storage_options):
                writer.writerow({name: _plain(value) for name, value in row.items()})
                num_rows += 1
    except OSError as error:
        raise JobError(f"--csv {path}: cannot be written ({error.strerror}); choose another file") from None
    return num_rows


def _plain(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _rows(output: str, storage_options: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    store = Store(output, storage_options)
    if not read_plans(store):
        raise NotWhole(f"{output} holds no plan of ldm-batch; check the path")
    for table in manifest.read_tables(store, [*COLUMNS, "status"]):
        yield from table.filter(pc.equal(table["status"], "failed")).select(COLUMNS).to_pylist()


class Retry:
    """Callable on an output and its plans: the failed rows that may go well another time.

    `error_types` are those to try again, all if empty.
    """

    def __init__(self, error_types: Collection[str] = ()) -> None:
        self.error_types = frozenset(error_types)
        self.num_hopeless = 0

    def __call__(self, store: Store, plans: list[Plan]) -> dict[tuple[str, int], frozenset[str] | None]:
        """
        Raises:
            JobError: no row failed with one of `error_types`.
        """
        found: dict[tuple[str, int], frozenset[str] | None] = {}
        seen: set[str] = set()
        for plan in plans:
            names = manifest.part_names(store, f"{manifest.FOLDER}/{plan.plan_id}")
            for name, head, part in manifest.read_parts(store, names):
                if not head.num_failed:
                    continue
                table = manifest.read_part(part, ("key", "status", "stage", "error_type"), store.uri(name))
                rows = table.filter(pc.equal(table["status"], "failed")).to_pylist()
                seen.update(row["error_type"] for row in rows)
                asked = [row for row in rows if not self.error_types or row["error_type"] in self.error_types]
                keys = frozenset(row["key"] for row in asked if row["stage"] != PLANNED)
                self.num_hopeless += len(asked) - len(keys)
                if keys:
                    found[plan.plan_id, head.shard] = keys
        if unknown := self.error_types - seen:
            raise JobError(
                f"--error-type {min(unknown)}: no row of {store.url} failed so; "
                + (f"one of {', '.join(sorted(seen))}" if seen else "none failed at all")
            )
        return found
