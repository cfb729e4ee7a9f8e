"""Ceph as a real store: one monitor, one OSD in memory and the S3 gateway, from the distribution's own packages.

The packages are fetched once, unpacked into a cache and run from there: no root, no service, nothing installed.
`python -m tests.stores.ceph` starts one by hand and prints where it is.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import fsspec

from tests.stores import (
    BUCKET,
    KEY,
    SECRET,
    START_LIMIT_S,
    Server,
    Unavailable,
    answers,
    free_port,
    kill,
    spawn,
    wait_for,
)

PACKAGES = ("radosgw", "ceph-mon", "ceph-osd")
# What apt adds for disks and logins (lvm2, smartmontools, sudo…) is not needed here.
_NEEDED = re.compile(r"^'[^']+' ((?:ceph|lib|python3|radosgw)\S*\.deb) ", re.MULTILINE)
_APT_LIMIT_S = 120
_TRIES = 3

_CONF = """[global]
fsid={fsid}
auth_cluster_required=none
auth_service_required=none
auth_client_required=none
mon_host=[v1:127.0.0.1:{mon_port}/0]
mon_initial_members=a
ms_bind_msgr2=false
ms_bind_ipv6=false
public_addr=127.0.0.1
osd_pool_default_size=1
osd_pool_default_min_size=1
osd_pool_default_pg_num=4
osd_pool_default_pgp_num=4
osd_crush_chooseleaf_type=0
osd_pool_default_pg_autoscale_mode=off
mon_max_pg_per_osd=2000
mon_allow_pool_size_one=true
paxos_propose_interval=0.05
paxos_min_wait=0.01
osd_objectstore=memstore
memstore_device_bytes=4294967296
osd_memory_target=939524096
osd_class_dir={lib}/rados-classes
osd_class_load_list=*
osd_class_default_list=*
erasure_code_dir={lib}/ceph/erasure-code
plugin_dir={lib}/ceph
run_dir={run}
crash_dir={run}
log_file={run}/$name.log
admin_socket={run}/$name.asok
pid_file={run}/$name.pid
mon_data={run}/mon
osd_data={run}/osd
keyring={run}/keyring
[client.rgw.a]
rgw_frontends=beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw_dns_name=localhost
rgw_data={run}/rgw
"""


@dataclass
class Ceph(Server):
    """A running one."""

    folder: Path = Path()
    root: Path = Path()
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start_gateway(self) -> None:
        """Start the gateway (again), and wait until it answers."""
        self._spawn("radosgw", "-f", "-n", "client.rgw.a")
        self._wait("the gateway", lambda: answers(self.url))

    def kill_gateway(self) -> None:
        """SIGKILL the gateway, as a machine that is gone; what it has acknowledged stays."""
        kill(self.processes.pop("radosgw"))

    def admin(self, *arguments: str) -> str:
        """What `radosgw-admin` prints."""
        return self._run("radosgw-admin", "-n", "client.rgw.a", *arguments)

    def logs(self) -> str:
        """The end of what each process said."""
        texts = (f"--- {file.name}\n{file.read_text(errors='replace')[-1500:]}" for file in self.folder.glob("*.out"))
        return "\n".join(texts)

    def _environ(self) -> dict[str, str]:
        lib = self._lib()
        path = ":".join(map(str, (lib, self.root / "lib" / lib.name, self.root / "usr/lib/ceph", lib / "ceph")))
        return {
            "PATH": f"{self.root}/usr/bin:{os.environ['PATH']}",
            "LD_LIBRARY_PATH": path,
            "PYTHONPATH": f"{self.root}/usr/lib/python3/dist-packages",
            "HOME": str(self.folder),
        }

    def _lib(self) -> Path:
        return self.root / "usr/lib" / f"{platform.machine()}-linux-gnu"

    def _command(self, name: str, arguments: tuple[str, ...]) -> list[str]:
        program = [str(self.root / "usr/bin" / name)]
        if name == "ceph":
            # The distribution's Python, as Ceph's bindings are built for it.
            python = self.root / "usr/bin/python3"
            program = [str(python) if python.exists() else "/usr/bin/python3", *program]
        return [*program, "-c", str(self.folder / "ceph.conf"), *arguments]

    def _run(self, name: str, *arguments: str, timeout_s: float = 30) -> str:
        done = subprocess.run(
            self._command(name, arguments),
            env=self._environ(),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        if done.returncode:
            raise Unavailable(f"{name} {' '.join(arguments)} ended with {done.returncode}: {done.stderr[-500:]}")
        return done.stdout

    def _spawn(self, name: str, *arguments: str) -> None:
        log = self.folder / f"{name}.out"
        self.processes[name] = spawn(self._command(name, arguments), log, self._environ())

    def _wait(self, what: str, ready: Callable[[], bool]) -> None:
        def check() -> bool:
            ended = [name for name, process in self.processes.items() if process.poll() is not None]
            if ended:
                raise Unavailable(f"{ended[0]} ended while starting\n{self.logs()}")
            return ready()

        if not wait_for(check, START_LIMIT_S):
            raise Unavailable(f"{what} did not answer in {START_LIMIT_S} s\n{self.logs()}")

    def _start(self, port: int, mon_port: int) -> None:
        fsid = str(uuid.uuid4())
        conf = _CONF.format(fsid=fsid, mon_port=mon_port, port=port, lib=self._lib(), run=self.folder)
        (self.folder / "ceph.conf").write_text(conf)
        for name in ("mon", "osd", "rgw"):
            (self.folder / name).mkdir()
        keyring, monmap = str(self.folder / "keyring"), str(self.folder / "monmap")
        self._run("ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        self._run("monmaptool", "--create", "--addv", "a", f"[v1:127.0.0.1:{mon_port}]", "--fsid", fsid, monmap)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)
        self._spawn("ceph-mon", "-f", "-i", "a")
        osd = str(uuid.uuid4())
        self._wait("the monitor", lambda: _ends_well(lambda: self._run("ceph", "osd", "new", osd, timeout_s=10)))
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._spawn("ceph-osd", "-f", "-i", "0")
        self.start_gateway()
        self.admin("user", "create", "--uid=t", "--display-name=t", f"--access-key={KEY}", f"--secret-key={SECRET}")
        fsspec.filesystem("s3", skip_instance_cache=True, **self.storage_options).mkdir(BUCKET)


def _ends_well(action: Callable[[], object]) -> bool:
    try:
        action()
    except (Unavailable, subprocess.TimeoutExpired):
        return False
    return True


@contextmanager
def start_ceph() -> Iterator[Ceph]:
    """A Ceph of one's own, gone at the end.

    Raises:
        Unavailable: it cannot be had here; why.
    """
    root = unpacked()
    with ExitStack() as stack:
        for n in count(1):
            try:
                server = stack.enter_context(_started(root))
            except Unavailable:
                # An OSD may be refused by a monitor that is as young as itself, and a free port be taken.
                if n == _TRIES:
                    raise
            else:
                break
        yield server


@contextmanager
def _started(root: Path) -> Iterator[Ceph]:
    # Short: the path of a Unix socket may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="ceph-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        port = free_port()
        server = Ceph(f"http://127.0.0.1:{port}", folder=Path(folder), root=root)
        try:
            server._start(port, free_port())
            yield server
        finally:
            for process in server.processes.values():
                kill(process)


def unpacked(name: str = "ceph", packages: tuple[str, ...] = PACKAGES, needed: re.Pattern[str] = _NEEDED) -> Path:
    """The folder that holds programs of Debian's, Ceph's if not told otherwise, fetched where that was not done before.

    Raises:
        Unavailable: they cannot be had here; why.
    """
    if sys.platform != "linux":
        raise Unavailable(f"{name} is fetched on Linux alone")
    if not shutil.which("apt-get") or not shutil.which("dpkg"):
        raise Unavailable(f"{name} is fetched with apt-get and dpkg, which are not here")
    release = platform.freedesktop_os_release()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ldm-batch-tests"
    root = cache / f"{name}-{release.get('ID', 'linux')}-{release.get('VERSION_ID', '')}-{platform.machine()}"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        # Several test processes start at once; one fetches.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not root.exists():
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                _fetch(Path(folder), packages, needed)
                (Path(folder) / "root").rename(root)
    return root


def _fetch(folder: Path, packages: tuple[str, ...], needed: re.Pattern[str]) -> None:
    for name in ("lists", "archives", "debs"):
        (folder / name).mkdir()
    # Without the machine's own archive, as what lies there already would be left out of the answer.
    options = ["-o", f"Dir::Cache::archives={folder}/archives"]
    try:
        _download(folder / "debs", options, packages, needed)
    except Unavailable:
        # A machine that has never asked, or not for long: with lists of our own.
        options += ["-o", f"Dir::State::lists={folder}/lists", "-o", f"Dir::Cache={folder}"]
        _apt(["update", "-qq"], options)
        _download(folder / "debs", options, packages, needed)
    for deb in sorted((folder / "debs").glob("*.deb")):
        subprocess.run(["dpkg", "-x", deb, folder / "root"], check=True)


def _download(folder: Path, options: list[str], packages: tuple[str, ...], needed: re.Pattern[str]) -> None:
    found = _apt(["install", "-qq", "-y", "--no-install-recommends", "--print-uris", *packages], options)
    names = [name.partition("_")[0] for name in needed.findall(found)]
    _apt(["download", "-qq", "-o", "APT::Sandbox::User=root", *names], options, folder)


def _apt(arguments: list[str], options: list[str], cwd: Path | None = None) -> str:
    command = ["apt-get", "-o", "Debug::NoLocking=1", "-o", "Acquire::Retries=2", *options, *arguments]
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=_APT_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"apt-get {arguments[0]} took more than {_APT_LIMIT_S} s") from None
    if done.returncode:
        raise Unavailable(f"apt-get {arguments[0]}: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout


if __name__ == "__main__":
    begun = time.monotonic()
    unpacked()
    fetched = time.monotonic()
    with start_ceph() as server, suppress(KeyboardInterrupt):
        sys.stdout.write(
            f"fetched in {fetched - begun:.1f} s, started in {time.monotonic() - fetched:.1f} s; Ctrl-C ends it\n"
            f"AWS_ENDPOINT_URL={server.url} AWS_ACCESS_KEY_ID={KEY} AWS_SECRET_ACCESS_KEY={SECRET} s3://{BUCKET}\n"
        )
        signal.pause()
