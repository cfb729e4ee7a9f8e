"""Where an output can lie: a folder, or a bucket of an S3 server that is started for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.faults.outside import Options, s3

STORES = ("local", "moto", "ceph")


@dataclass
class Place:
    """`folder` is for what goes with an output; `url` for the outputs themselves, "" for folders."""

    folder: Path
    url: str = ""
    options: Options | None = None

    def out(self, name: str, shared: bool = False) -> str:
        if self.url:
            return f"{self.url}/{name}"
        return f"{'file://' if shared else ''}{self.folder / name / 'out'}"


@contextmanager
def place(store: str, folder: Path) -> Iterator[Place]:
    """A place of that kind, gone at the end but for the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if store == "local":
        yield Place(folder)
    elif store == "ceph":
        from tests.stores.ceph import start_ceph

        with start_ceph() as server:
            yield Place(folder, "s3://bkt", server.storage_options)
    elif store == "moto":
        from tests.conftest import start_moto

        process, url = start_moto()
        try:
            options = {"endpoint_url": url, "key": "test", "secret": "test"}
            s3(options).create_bucket(Bucket="bkt")
            yield Place(folder, "s3://bkt", options)
        finally:
            process.kill()
            process.wait()
    else:
        raise SystemExit(f"--stores {store}: unknown; one of {', '.join(STORES)}")
