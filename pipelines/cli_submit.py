"""The commands that send a job to a cluster and look after it there."""

from __future__ import annotations

import json
import os
import shlex
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipelines.errors import EXIT_INTERRUPTED, EXIT_TERMINATED, JobError
from pipelines.terminal import Extend, JobPath, Join, Json, Limit, Set, Slice, Takeover, emit, fail, one_line_errors

if TYPE_CHECKING:
    from pipelines.backend import Backend, Parcel, Submission

Address = Annotated[
    str | None,
    typer.Option(help="The dashboard of a Ray cluster, http://head:8265; else RAY_API_SERVER_ADDRESS.", metavar="URL"),
]
Kube = Annotated[bool, typer.Option("--kube", help="A RayJob on Kubernetes; needs the extra k8s.")]
Namespace = Annotated[str | None, typer.Option(help="With --kube; the context's own if left out.", metavar="NAME")]
Context = Annotated[str | None, typer.Option(help="With --kube: of the kubeconfig.", metavar="NAME")]
Which = Annotated[str, typer.Argument(help="A job file, or the id of what was submitted.", show_default=False)]
Form = Annotated[Literal["yaml", "json"], typer.Option("-o", "--output", help="Of --dry-run.")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")]

FOLLOWED = {"succeeded": 0, "suspended": EXIT_TERMINATED}
"""Exit codes of what was followed to its end; 1 for all else."""


def submit(
    job: JobPath,
    address: Address = None,
    kube: Kube = False,
    namespace: Namespace = None,
    context: Context = None,
    follow: Follow = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be sent; send nothing.")] = False,
    form: Form = "yaml",
    set_: Set = None,
    limit: Limit = None,
    extend: Extend = False,
    join: Join = False,
    takeover: Takeover = False,
    slice_: Slice = None,
    as_json: Json = False,
) -> None:
    """Send a job to a cluster; the same job twice is one. It goes on without this machine."""
    with one_line_errors(as_json), tempfile.TemporaryDirectory(prefix="ldm-batch-") as folder:
        from pipelines.parcel import pack
        from pipelines.slices import Slice as Part

        if slice_ is not None:
            Part.parse(slice_)
        arguments = [
            *([] if limit is None else ["--limit", str(limit)]),
            *_flags(extend=extend),
            *([] if slice_ is None else ["--slice", slice_]),
        ]
        loaded, parcel = pack(job, set_ or (), arguments, Path(folder))
        # How it meets another run changes nothing of what it is: it keeps its id.
        parcel = replace(parcel, arguments=(*arguments, *_flags(join=join, takeover=takeover)))
        if dry_run:
            typer.echo(_shown(_manifests(loaded, parcel, kube, namespace), "json" if as_json else form))
            return
        back_end, where = _back_end(address, kube, namespace, context)
        there, made = back_end.submit(parcel)
        emit(as_json, asdict(there) | {"submitted": made}, lambda: _submitted(there, made, where))
        if follow:
            with _looking_on(there.id, where, as_json):
                for line in back_end.logs(there.id, follow=True):
                    typer.echo(line, err=as_json)
                code = _end(back_end, there.id)
            raise typer.Exit(code)


def render(
    job: JobPath,
    form: Form = "yaml",
    set_: Set = None,
    limit: Limit = None,
    extend: Extend = False,
    join: Join = False,
    takeover: Takeover = False,
    slice_: Slice = None,
    as_json: Json = False,
) -> None:
    """Print the RayJob that `submit --kube` would send, for kubectl and Kustomize."""
    submit(
        job,
        kube=True,
        dry_run=True,
        form=form,
        set_=set_,
        limit=limit,
        extend=extend,
        join=join,
        takeover=takeover,
        slice_=slice_,
        as_json=as_json,
    )


def logs(
    job: Which,
    address: Address = None,
    kube: Kube = False,
    namespace: Namespace = None,
    context: Context = None,
    follow: Follow = False,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Show what a submitted job says; --json makes one object of each line."""
    with one_line_errors(as_json):
        back_end, where = _back_end(address, kube, namespace, context)
        id = _id(job, set_)
        with _looking_on(id, where, as_json):
            for line in back_end.logs(id, follow):
                typer.echo(json.dumps({"line": line}) if as_json else line)


def list_(
    address: Address = None,
    kube: Kube = False,
    namespace: Namespace = None,
    context: Context = None,
    as_json: Json = False,
) -> None:
    """List what was submitted to a cluster."""
    with one_line_errors(as_json):
        back_end, where = _back_end(address, kube, namespace, context)
        found = back_end.list()
        emit(
            as_json,
            {"submissions": [asdict(one) for one in found]},
            lambda: "\n".join(map(told, found)) or f"nothing was submitted{where and ' with'}{where}",
        )


def cancel(
    job: Which,
    address: Address = None,
    kube: Kube = False,
    namespace: Namespace = None,
    context: Context = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """End a submitted job for good; what is committed stays in its output."""
    _act("cancel", "is asked to end", job, address, kube, namespace, context, set_, as_json)


def suspend(
    job: Which,
    address: Address = None,
    kube: Kube = False,
    namespace: Namespace = None,
    context: Context = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Stop a submitted job after the shards in flight, for `resume`."""
    _act("suspend", "stops after the shards in flight", job, address, kube, namespace, context, set_, as_json)


def resume(
    job: Which,
    address: Address = None,
    kube: Kube = False,
    namespace: Namespace = None,
    context: Context = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Go on with a job that was suspended, or has ended, where it stopped."""
    _act("resume", "goes on", job, address, kube, namespace, context, set_, as_json)


def cluster_status(
    job: str,
    address: str | None,
    kube: bool,
    namespace: str | None,
    context: str | None,
    overrides: list[str] | None,
    as_json: bool,
) -> None:
    """What a cluster says of a submitted job."""
    back_end, _ = _back_end(address, kube, namespace, context)
    there = back_end.get(_id(job, overrides))
    emit(as_json, asdict(there), lambda: told(there))


def add_to(app: typer.Typer) -> None:
    """The commands under their names."""
    for command in (submit, render, logs, cancel, suspend, resume):
        app.command()(command)
    app.command("list")(list_)


def told(one: Submission) -> str:
    """A submission in one line."""
    parts = [one.id, one.phase, f"attempt {one.attempt}", one.created_at]
    return " · ".join([*parts, *([one.message] if one.message else [])])


def _flags(**given: bool) -> list[str]:
    """The options of `run` that are set."""
    return [f"--{name}" for name, is_set in given.items() if is_set]


def _act(
    verb: Literal["cancel", "suspend", "resume"],
    words: str,
    job: str,
    address: str | None,
    kube: bool,
    namespace: str | None,
    context: str | None,
    overrides: list[str] | None,
    as_json: bool,
) -> None:
    with one_line_errors(as_json):
        back_end, where = _back_end(address, kube, namespace, context)
        id = _id(job, overrides)
        before = back_end.get(id)
        {"cancel": back_end.cancel, "suspend": back_end.suspend, "resume": back_end.resume}[verb](id)
        try:
            there = back_end.get(id)
        except JobError:
            # Kubernetes knows nothing of what is deleted.
            there = replace(before, phase="cancelled", message="")
        emit(as_json, asdict(there), lambda: f"{there.id} {words}\nnext:\n  ldm-batch status {there.id}{where}")


@contextmanager
def _looking_on(id: str, where: str, as_json: bool) -> Iterator[None]:
    """Ctrl-C ends the looking, never the job."""
    try:
        yield
    except KeyboardInterrupt:
        message = f"looked away; {id} goes on, `ldm-batch cancel {id}{where}` ends it"
        fail(message, EXIT_INTERRUPTED, as_json)


def _end(back_end: Backend, id: str) -> int:
    """How a job ended whose log has: some moments later its cluster knows, too."""
    until = time.monotonic() + 30
    while (there := back_end.get(id)).phase in ("queued", "running") and time.monotonic() < until:
        time.sleep(0.2)
    if there.phase not in ("succeeded", "running"):
        typer.echo(told(there), err=True)
    return FOLLOWED.get(there.phase, 1)


def _submitted(one: Submission, made: bool, where: str) -> str:
    head = f"submitted {one.id}" if made else f"{one.id} is there already, and is {one.phase}; nothing was sent"
    seen = [] if one.dashboard is None else [f"dashboard: {one.dashboard}"]
    commands = [f"  ldm-batch {verb} {one.id}{where}" for verb in ("logs -f", "status", "suspend", "cancel")]
    return "\n".join([head, *seen, "next:", *commands])


def _back_end(address: str | None, kube: bool, namespace: str | None, context: str | None) -> tuple[Backend, str]:
    """A cluster, and the options that name it, for the next command."""
    if kube:
        if address is not None:
            raise JobError("--address and --kube are two clusters; give one of them")
        options = [f" --{k} {shlex.quote(v)}" for k, v in (("namespace", namespace), ("context", context)) if v]
        with _needing_k8s():
            from pipelines.kube_jobs import KubeJobs
        return KubeJobs(namespace, context), " --kube" + "".join(options)
    if namespace is not None or context is not None:
        raise JobError("--namespace and --context go with --kube; add it, or leave them out")
    from pipelines.ray_jobs import RayJobs

    url = address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if not url:
        raise JobError("no cluster is named; give --address http://head:8265, or --kube")
    return RayJobs(url), f" --address {shlex.quote(url)}" if address else ""


def _manifests(job: Any, parcel: Parcel, kube: bool, namespace: str | None) -> list[dict[str, Any]]:
    if not kube:
        from pipelines.ray_jobs import request

        return [request(parcel, 1)]
    with _needing_k8s():
        from pipelines.kube_api import refuse_no_namespace
        from pipelines.rayjob import manifests
    refuse_no_namespace(namespace)
    return manifests(job, parcel, namespace=namespace)


@contextmanager
def _needing_k8s() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise JobError(f"--kube: {error.name} is missing; pip install 'ldm-batch[k8s]'") from None


def _shown(manifests: list[dict[str, Any]], form: str) -> str:
    import yaml

    if form == "json":
        whole = {"apiVersion": "v1", "kind": "List", "items": manifests} if len(manifests) > 1 else manifests[0]
        return json.dumps(whole, indent=1)
    # Nothing is one object twice any more, which YAML would write as a reference.
    apart = json.loads(json.dumps(manifests))
    return str(yaml.safe_dump_all(apart, sort_keys=False, allow_unicode=True)).rstrip()


def _id(job: str, overrides: list[str] | None) -> str:
    """Of a job file: the id that `submit` gives it."""
    if not job.endswith((".yaml", ".yml")):
        if overrides:
            raise JobError(f"--set goes with a job file; {job} is an id")
        return job
    from pipelines.parcel import pack

    with tempfile.TemporaryDirectory(prefix="ldm-batch-") as folder:
        return pack(Path(job), overrides or (), (), Path(folder))[1].id
