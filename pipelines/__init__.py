"""How a job becomes rows, shards and committed files.

`load_job`, `check`, `plan`, `run`, `status` and `read_manifest` are the command line as functions.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if sys.version_info < (3, 11):  # noqa: UP036 - `submit` sends this code where no installer has looked
    raise SystemExit(f"this Python is {sys.version.split()[0]}, ldm-batch needs 3.11; give the cluster a newer one")

if TYPE_CHECKING:
    from pipelines.errors import LdmError as LdmError
    from pipelines.job import Job as Job
    from pipelines.job import load_job as load_job
    from pipelines.manifest import read_manifest as read_manifest
    from pipelines.planner import check as check
    from pipelines.planner import plan as plan
    from pipelines.runner import run as run
    from pipelines.totals import status as status

_HOME = {
    "Job": "job",
    "LdmError": "errors",
    "check": "planner",
    "load_job": "job",
    "plan": "planner",
    "read_manifest": "manifest",
    "run": "runner",
    "status": "totals",
}
__all__ = ["Job", "LdmError", "check", "load_job", "plan", "read_manifest", "run", "status"]


def __getattr__(name: str) -> Any:
    # Lazily, so that `ldm-batch --help` pays for none of it.
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(f"pipelines.{_HOME[name]}"), name)
    raise AttributeError(f"module 'pipelines' has no attribute {name!r}")
