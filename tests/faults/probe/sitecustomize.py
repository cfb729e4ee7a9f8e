"""Python runs this at the start of every process whose PYTHONPATH begins here.

Each shard that a worker begins or ends is noted, a line in the file that LDM_BATCH_NOTES names.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import os
import sys
import time
from typing import Any


class _AfterImport(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "pipelines.worker":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            module.Worker.__call__ = _noting(module.Worker.__call__)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _noting(compute: Any) -> Any:
    @functools.wraps(compute)
    def noted(worker: Any, shard: Any) -> Any:
        number = shard["shard"][0].as_py() if shard.num_rows else -1
        _note("begin", number, shard.num_rows)
        made = compute(worker, shard)
        _note("end", number, made.num_rows)
        return made

    return noted


def _note(what: str, shard: int, num_rows: int) -> None:
    line = f"{time.time():.3f} {os.getpid()} {what} {shard} {num_rows}\n"
    # One write, and the end of the file moves with it: lines of several processes do not mix.
    descriptor = os.open(os.environ["LDM_BATCH_NOTES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, line.encode())
    os.close(descriptor)


if "LDM_BATCH_NOTES" in os.environ:
    sys.meta_path.insert(0, _AfterImport())
