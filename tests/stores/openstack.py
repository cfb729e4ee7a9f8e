"""OpenStack Swift and its S3 front: proxy, account, container and object server in one process, one replica.

It has create-if-absent, but looks and then writes: of writers at the same moment several win.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec

from tests.stores import BUCKET, Server, Unavailable, free_port, serving

_USER, _PASSWORD = "test:tester", "testing"
_SWIFT_CONF = """[swift-hash]
swift_hash_path_suffix = suffix
swift_hash_path_prefix = prefix
[storage-policy:0]
name = gold
default = yes
"""
_BACKEND = """[DEFAULT]
swift_dir = {folder}
devices = {folder}/devices
mount_check = false
bind_ip = 127.0.0.1
bind_port = {port}
[pipeline:main]
pipeline = {name}-server
[app:{name}-server]
use = egg:swift#{name}
"""
_PROXY = """[DEFAULT]
swift_dir = {folder}
bind_ip = 127.0.0.1
bind_port = {port}
[pipeline:main]
pipeline = catch_errors proxy-logging listing_formats s3api tempauth slo proxy-logging proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:proxy-logging]
use = egg:swift#proxy_logging
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:s3api]
use = egg:swift#s3api
s3_acl = false
location = us-east-1
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin
[filter:slo]
use = egg:swift#slo
"""
_BACKENDS = ("account", "container", "object")


@contextmanager
def start_swift() -> Iterator[Server]:
    """A Swift of one's own.

    Raises:
        Unavailable: it cannot be had here; why.
    """
    if sys.platform != "linux" or importlib.util.find_spec("swift") is None:
        raise Unavailable("OpenStack Swift is not in this environment (on Linux: pip install swift)")
    with tempfile.TemporaryDirectory() as folder:
        try:
            os.setxattr(folder, "user.swift", b"x")
        except OSError as error:
            raise Unavailable(f"Swift needs extended attributes on {folder}: {error}") from None
        server = Server(f"http://127.0.0.1:{(port := free_port())}", _USER, _PASSWORD)
        command = [sys.executable, str(Path(__file__)), folder, str(port)]
        with serving("swift", f"{server.url}/info", command):
            fsspec.filesystem("s3", skip_instance_cache=True, **server.storage_options).mkdir(BUCKET)
            yield server


def main(folder: Path, port: int) -> None:
    """Serve; a script of its own, as eventlet patches the process that it runs in."""
    import eventlet

    eventlet.monkey_patch()
    from eventlet import wsgi
    from swift.common import storage_policy, utils
    from swift.common.ring import RingBuilder
    from swift.common.wsgi import SwiftHttpProtocol, loadapp

    (folder / "devices" / "sda").mkdir(parents=True)
    (folder / "swift.conf").write_text(_SWIFT_CONF)
    utils.set_swift_dir(str(folder))
    storage_policy.reload_storage_policies()
    ports = dict(zip(_BACKENDS, (free_port() for _ in _BACKENDS), strict=True))
    for name, its_port in ports.items():
        ring = RingBuilder(part_power=2, replicas=1, min_part_hours=1)
        address = {"ip": "127.0.0.1", "port": its_port, "replication_ip": "127.0.0.1", "replication_port": its_port}
        ring.add_dev({"id": 0, "region": 1, "zone": 1, "weight": 1.0, "device": "sda", **address})
        ring.rebalance()
        ring.get_ring().save(str(folder / f"{name}.ring.gz"))
    for name, its_port in [*ports.items(), ("proxy", port)]:
        text = (_PROXY if name == "proxy" else _BACKEND).format(folder=folder, port=its_port, name=name)
        (folder / f"{name}.conf").write_text(text)
        app = loadapp(str(folder / f"{name}.conf"), global_conf={"log_name": name})
        socket = eventlet.listen(("127.0.0.1", its_port), backlog=256)
        # Not Etag but ETag, as S3's clients want it.
        options = {"protocol": SwiftHttpProtocol, "capitalize_response_headers": False, "log_output": False}
        eventlet.spawn(wsgi.server, socket, app, **options)
    while True:
        eventlet.sleep(3600)


if __name__ == "__main__":
    os.environ["TZ"] = "UTC+0"
    time.tzset()
    sys.path[0] = str(Path(__file__).parents[2])
    main(Path(sys.argv[1]), int(sys.argv[2]))
