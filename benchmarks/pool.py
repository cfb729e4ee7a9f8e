"""How long a pool of workers takes to start, against one: whether they load the weights side by side.

    python -m benchmarks.pool [--workers 2] [--rounds 3] [--model builtin:shapes | sd15]

From the request for the actors to the last one's loaded model, each with its own process, imports and all, on a Ray
that runs. `sd15` is Stable Diffusion 1.5 in its published shapes with random weights, fp16, 2 GB on a disk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.published import save
from pipelines import load_job
from pipelines.cluster import ray_cluster
from pipelines.weights import identify
from pipelines.worker import Place, Worker


class Ready(Worker):
    def is_loaded(self) -> bool:
        return self.model is not None


def start_s(num_workers: int, arguments: tuple[Any, ...]) -> float:
    import ray

    begin = time.perf_counter()
    pool = [ray.remote(Ready).options(num_cpus=0.5).remote(*arguments) for _ in range(num_workers)]
    ray.get([one.is_loaded.remote() for one in pool])
    taken = time.perf_counter() - begin
    for one in pool:
        ray.kill(one)
    time.sleep(2)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", choices=("builtin:shapes", "sd15"), default="builtin:shapes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, ray_cluster(None):
        model = args.model
        if model == "sd15":
            import torch

            model = str(save("sd15", Path(temporary) / "sd15", "cpu", torch.float16))
        stage = {"op": "txt2img", "model": model, "dtype": "auto"}
        value = {"source": {"rows": ["a"]}, "stages": [stage], "sink": {"path": f"{temporary}/out"}}
        (Path(temporary) / "job.yaml").write_text(yaml.safe_dump(value))
        job = load_job(Path(temporary) / "job.yaml")
        weights, _ = identify(job.stage.model, None, None, {}, job.stage.parts)
        arguments = (Place(job.stage, 0, True, None), job.stage.bare(), weights)
        start_s(args.workers, arguments)  # reads the files into the kernel's cache
        rounds = [(start_s(1, arguments), start_s(args.workers, arguments)) for _ in range(args.rounds)]
    ratios = [many / one for one, many in rounds]
    print(
        json.dumps(
            {
                "model": args.model,
                "workers": args.workers,
                "one_s": round(statistics.median(one for one, _ in rounds), 2),
                "all_s": round(statistics.median(many for _, many in rounds), 2),
                "ratio": round(statistics.median(ratios), 2),
            }
        )
    )


if __name__ == "__main__":
    main()
