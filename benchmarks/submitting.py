"""How long a job sent to a warm Ray takes until it runs, and what a second `submit` of it does.

python -m benchmarks.submitting
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from tests.cluster.head import head
from tests.conftest import ROOT

ROUNDS = 5
BAR_S = 5.0


def main() -> None:
    waits, sends, again = [], [], []
    with head() as there, tempfile.TemporaryDirectory() as folder:
        os.environ |= there.environ
        from pipelines.ray_jobs import RayJobs

        jobs = RayJobs(there.dashboard)
        for i in range(ROUNDS + 1):
            # Of a plan that is done: the next one has the cores for itself.
            arguments = ["submit", "jobs/txt2img.yaml", "--limit", "1", "--set", f"sink.path=file://{folder}/{i}"]
            start = time.perf_counter()
            first = _command(*arguments, "--address", there.dashboard)
            sends.append(time.perf_counter() - start)
            while jobs.get(first["id"]).phase == "queued":
                time.sleep(0.02)
            waits.append(time.perf_counter() - start)
            again.append(_command(*arguments, "--address", there.dashboard)["submitted"])
            jobs.cancel(first["id"])
            while jobs.get(first["id"]).phase == "running":
                time.sleep(0.1)
        num_runs = len(jobs.list())
    # The first one brings the code to the cluster.
    print(
        json.dumps(
            {
                "submit_to_running_s": round(statistics.median(waits[1:]), 2),
                "slowest_s": round(max(waits[1:]), 2),
                "with_upload_of_the_code_s": round(waits[0], 2),
                "command_returns_s": round(statistics.median(sends[1:]), 2),
                "reached": max(waits[1:]) <= BAR_S,
                "jobs": num_runs,
                "second_submits_that_made_a_run": sum(again),
            }
        )
    )


def _command(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", *arguments, "--json"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


if __name__ == "__main__":
    main()
