"""Figure: pictures a second into an object store that is 30 ms away, and the requests that they take.

    python -m benchmarks.object_store [--pictures 256] [--per-shard 64] [--delay-ms 30] [--rounds 3]

The store is `benchmarks/s3_server.py`, on this machine, which answers each request so much later. Two comparisons, in
turn: one writer in one process, `ShardWriter` from pixels to the committed part against pyarrow's S3 files one after
the other, as `write_images` opens them, of pictures that are encoded already; and under Ray, the run's last step
against `write_images` itself. Afterwards every picture is read back by botocore and Pillow and compared.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pyarrow.fs import S3FileSystem

from benchmarks import sink
from benchmarks.finished import finished
from benchmarks.pictures import distinct
from benchmarks.s3_server import counts
from pipelines import read_manifest
from pipelines.cluster import ray_cluster
from pipelines.images import encode
from tests.conftest import free_port
from tests.faults.outside import Options, s3

FEW = 24


@contextmanager
def far_away(delay_ms: float) -> Iterator[str]:
    port = free_port()
    server = subprocess.Popen([sys.executable, "-m", "benchmarks.s3_server", str(port), str(delay_ms)])
    try:
        for _ in range(200):
            try:
                counts(url := f"http://127.0.0.1:{port}")
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        yield url
    finally:
        server.kill()
        server.wait()


def one_after_the_other(filesystem: S3FileSystem, images: list[bytes], prefix: str) -> float:
    """Objects a second, as pyarrow opens files if told nothing."""
    start = time.perf_counter()
    for i, image in enumerate(images):
        with filesystem.open_output_stream(f"{prefix}/{i}.png") as file:
            file.write(image)
    return len(images) / (time.perf_counter() - start)


def compare(out: str, options: Options, pictures: sink.Pictures) -> None:
    client = s3(options)
    bucket, _, prefix = out.removeprefix("s3://").partition("/")
    rows = read_manifest(out, storage_options=options).to_pylist()
    assert sorted(row["seed"] for row in rows) == list(range(len(pictures)))

    def whole(row: dict[str, Any]) -> None:
        body = client.get_object(Bucket=bucket, Key=f"{prefix}/{row['uri']}")["Body"].read()
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(body))), pictures[row["seed"]])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(whole, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--per-shard", type=int, default=64)
    parser.add_argument("--delay-ms", type=float, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    pictures = distinct(args.pictures, args.size)
    images = [encode(one, "png", png_encoder="fpng") for one in pictures[:FEW]]
    with ray_cluster(None), far_away(args.delay_ms) as url, tempfile.TemporaryDirectory() as nowhere:
        os.chdir(Path(nowhere))
        options: Options = {"endpoint_url": url, "key": "key", "secret": "secret"}
        theirs = S3FileSystem(
            access_key="key", secret_key="secret", endpoint_override=url, scheme="http", region="us-east-1"
        )
        rates: dict[str, list[float]] = {}
        for n in range(args.rounds + 1):
            line: dict[str, Any] = {}
            for encoder in ("fpng", "pillow"):
                for where in ("alone", "ray"):
                    out = f"s3://bucket/{where}-{encoder}-{n}"
                    place = {"path": out, "png_encoder": encoder, "storage_options": options}
                    writer, shards = finished(pictures, args.per_shard, place)
                    counts(url)
                    if where == "ray":
                        line[f"{where}, {encoder}"] = sink.ours(writer, shards).rate
                    else:
                        start = time.perf_counter()
                        for shard in shards:
                            writer(shard)
                        line[f"{where}, {encoder}"] = len(pictures) / (time.perf_counter() - start)
                    asked = counts(url)
                    line["requests beside pictures, a shard"] = (sum(asked.values()) - len(pictures)) / len(shards)
                    assert set(asked) == {"PUT"}, asked
                    if n == args.rounds:
                        compare(out, options, pictures)
            counts(url)
            line["alone, pyarrow"] = one_after_the_other(theirs, images, f"bucket/pyarrow-{n}")
            line["requests an object, pyarrow"] = sum(counts(url).values()) / len(images)
            line["ray, write_images"] = sink.peer(pictures[: 2 * FEW], FEW, f"bucket/peer-{n}", theirs).rate
            counts(url)
            # The first round opens connections and starts Ray's processes.
            if n:
                for name, value in line.items():
                    rates.setdefault(name, []).append(value)
                print(json.dumps({name: round(value, 2) for name, value in line.items()}), flush=True)
    for ours, peer in (("alone", "alone, pyarrow"), ("ray", "ray, write_images")):
        for encoder in ("fpng", "pillow"):
            found = sink.spread(a / b for a, b in zip(rates[f"{ours}, {encoder}"], rates[peer], strict=True))
            print(json.dumps({f"{ours}, {encoder} over {peer}": found, "load": os.getloadavg()[0]}))


if __name__ == "__main__":
    main()
