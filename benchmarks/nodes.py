"""The demo job on one machine, and on three nodes of which one is killed and one is added midway: the same digest?

python -m benchmarks.nodes
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

from tests.conftest import ROOT
from tests.faults.nodes import nodes
from tests.faults.processes import family, kill
from tests.faults.soak import Output, finish, start

LIMIT_S = 900.0


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        demo = Output(ROOT / "jobs/txt2img.yaml", f"file://{folder}/one", {})
        code, alone = finish(start(demo, "--set", f"sink.path={demo.path}", log=Path(folder) / "one.log"), LIMIT_S)
        assert code == 0, alone
        out = Path(folder) / "three"
        with nodes(3, cpus=1) as cluster:
            arguments = ("--set", f"sink.path=file://{out}", "--address", cluster.address)
            running = start(demo, *arguments, log=Path(folder) / "three.log", **cluster.environ)
            while len(list(out.glob("manifest/*/*.parquet"))) < 2:
                time.sleep(0.1)
            before = [process for process in family(cluster.pid) if process.kind == "raylet"]
            hit = kill(before[-1])
            while not [p for p in family(cluster.pid) if p.kind == "raylet" and p.pid not in {b.pid for b in before}]:
                time.sleep(0.1)
            code, three = finish(running, LIMIT_S)
    assert code == 0, three
    digests = alone["totals"]["digest"], three["totals"]["digest"]
    print(
        json.dumps(
            {
                "same_digest": digests[0] == digests[1],
                "digest": digests[0],
                "rows": [alone["num_new_rows"], three["num_new_rows"]],
                "node_killed": hit,
                "node_added": True,
                "seconds": [alone["duration_s"], three["duration_s"]],
            }
        )
    )


if __name__ == "__main__":
    main()
