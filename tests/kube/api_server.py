"""A Kubernetes API server in memory, that real clients talk to over HTTP: discovery, CRUD, dry runs, status, merge
patches, watches, label selectors, pages, owners, pod logs, access reviews, and strict validation of RayJobs.

Written after the Kubernetes API conventions; where it differs it is stricter: what it does not know is a 404.
"""

from __future__ import annotations

import asyncio
import copy
import json
import re
import threading
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from aiohttp import web

from pipelines.rayjob_schema import misfits, versions
from tests.kube.certificate import write_certificate
from tests.stores import free_port

Object = dict[str, Any]

KINDS = {
    ("v1", "namespaces"): ("Namespace", False),
    ("v1", "nodes"): ("Node", False),
    ("v1", "pods"): ("Pod", True),
    ("v1", "configmaps"): ("ConfigMap", True),
    ("v1", "secrets"): ("Secret", True),
    ("v1", "serviceaccounts"): ("ServiceAccount", True),
    ("v1", "persistentvolumeclaims"): ("PersistentVolumeClaim", True),
    ("ray.io/v1", "rayjobs"): ("RayJob", True),
    ("ray.io/v1", "rayclusters"): ("RayCluster", True),
    ("kueue.x-k8s.io/v1beta1", "localqueues"): ("LocalQueue", True),
    ("kueue.x-k8s.io/v1beta1", "workloads"): ("Workload", True),
    ("apiextensions.k8s.io/v1", "customresourcedefinitions"): ("CustomResourceDefinition", False),
    ("authorization.k8s.io/v1", "selfsubjectaccessreviews"): ("SelfSubjectAccessReview", False),
}
VERBS = {"GET": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
REASONS = {
    400: "BadRequest", 401: "Unauthorized", 403: "Forbidden", 404: "NotFound", 409: "AlreadyExists", 410: "Expired",
    422: "Invalid", 500: "InternalError",
}  # fmt: skip
UNKNOWN = ": unknown field;"


class Refusal(Exception):
    """An answer of the API server that is no success."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class Fault:
    """The next requests of that kind are answered so; code 0 cuts the connection after the work was done."""

    method: str
    path: str
    code: int
    message: str = "injected"
    times: int = 1


@dataclass
class FakeKube:
    """What the server holds, and how it behaves."""

    token: str = "let-me-in"
    groups: set[str] = field(default_factory=lambda: {api.partition("/")[0] for api, _ in KINDS if "/" in api})
    """API groups that are installed."""
    denied: set[tuple[str, str]] = field(default_factory=set)
    """(verb, resource) that the user has no right to; a subresource is `pods/log`."""
    missing_fields: set[str] = field(default_factory=set)
    """Fields of a RayJob's spec that this KubeRay does not know yet."""
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    cut_log_after: int | None = None
    """Lines after which the connection of the next log that is followed breaks off."""
    url: str = ""

    def __post_init__(self) -> None:
        self.lock = threading.RLock()
        self.objects: dict[tuple[str, str, str, str], Object] = {}
        self.events: list[tuple[int, str, tuple[str, str, str, str], Object]] = []
        self.version = 0
        self.oldest = 0
        self.logs: dict[tuple[str, str], Path] = {}
        self.put("v1", "namespaces", {"metadata": {"name": "default"}})
        fields = {name: {} for name in versions()["ray.io/v1"]["properties"]["spec"]["properties"]}
        schema = {"openAPIV3Schema": {"properties": {"spec": {"properties": fields}}}}
        crd = {"metadata": {"name": "rayjobs.ray.io"}, "spec": {"versions": [{"name": "v1", "schema": schema}]}}
        self.put("apiextensions.k8s.io/v1", "customresourcedefinitions", crd)

    def old_kuberay(self, *missing: str) -> None:
        """A CRD that lacks these fields."""
        self.missing_fields |= set(missing)
        crd = self.objects["apiextensions.k8s.io/v1", "customresourcedefinitions", "", "rayjobs.ray.io"]
        fields = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
        for name in missing:
            fields.pop(name)

    # What operator and tests do, without a right being asked for.

    def put(self, api: str, plural: str, body: Object, namespace: str = "default") -> Object:
        """Make an object, or put another in its place."""
        kind, namespaced = KINDS[api, plural]
        with self.lock:
            out = copy.deepcopy(body)
            meta = out.setdefault("metadata", {})
            if namespaced:
                meta.setdefault("namespace", namespace)
            key = (api, plural, meta.get("namespace", ""), meta["name"])
            before = self.objects.get(key)
            now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            kept = before["metadata"] if before else {"uid": str(uuid.uuid4()), "creationTimestamp": now}
            meta |= {name: kept[name] for name in ("uid", "creationTimestamp")}
            self.version += 1
            meta["resourceVersion"] = str(self.version)
            out |= {"apiVersion": api, "kind": kind}
            self.objects[key] = out
            self.events.append((self.version, "MODIFIED" if before else "ADDED", key, copy.deepcopy(out)))
            return copy.deepcopy(out)

    def all(self, api: str, plural: str) -> list[Object]:
        with self.lock:
            return [copy.deepcopy(one) for key, one in self.objects.items() if key[:2] == (api, plural)]

    def remove(self, one: Object) -> None:
        """Take an object away, and all that it owns."""
        with self.lock:
            plural = next(p for (api, p), (kind, _) in KINDS.items() if (api, kind) == (one["apiVersion"], one["kind"]))
            meta = one["metadata"]
            gone = self.objects.pop((one["apiVersion"], plural, meta.get("namespace", ""), meta["name"]), None)
            if gone is None:
                return
            self.version += 1
            key = (one["apiVersion"], plural, meta.get("namespace", ""), meta["name"])
            self.events.append((self.version, "DELETED", key, gone))
            for other in self.owned(meta["uid"]):
                self.remove(other)

    def owned(self, uid: str) -> list[Object]:
        with self.lock:
            return [
                copy.deepcopy(one)
                for one in self.objects.values()
                if any(owner["uid"] == uid for owner in one["metadata"].get("ownerReferences", ()))
            ]

    # HTTP

    async def handle(self, request: web.Request) -> web.StreamResponse:
        path = request.path
        self.requests.append((request.method, path))
        fault = next(
            (f for f in self.faults if f.times and f.method == request.method and re.search(f.path, path)), None
        )
        try:
            if fault is not None and fault.code:
                fault.times -= 1
                raise Refusal(fault.code, fault.message)
            if request.headers.get("Authorization") != f"Bearer {self.token}":
                raise Refusal(401, "Unauthorized")
            body = json.loads(await request.text() or "null") if request.can_read_body else None
            answer = await self.answer(request, body)
        except Refusal as refusal:
            status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
            status |= {"message": str(refusal), "reason": REASONS.get(refusal.code, ""), "code": refusal.code}
            return web.json_response(status, status=refusal.code)
        if fault is not None:
            fault.times -= 1
            assert request.transport is not None
            request.transport.abort()
        return answer

    async def answer(self, request: web.Request, body: Any) -> web.StreamResponse:
        path = request.path.rstrip("/")
        if (found := self.discovery(path)) is not None:
            return web.json_response(found)
        way = re.fullmatch(
            r"/(?:api/(?P<core>v1)|apis/(?P<api>[^/]+/[^/]+))(?:/namespaces/(?P<ns>[^/]+))?"
            r"/(?P<plural>[a-z]+)(?:/(?P<name>[^/]+))?(?:/(?P<sub>[a-z]+))?",
            path,
        )
        if way is None and (named := re.fullmatch(r"/api/v1/namespaces/([^/]+)", path)):
            api, namespace, plural, name, sub = "v1", "", "namespaces", named[1], ""
        elif way is None:
            raise Refusal(404, "the server could not find the requested resource")
        else:
            api, namespace, plural = way["core"] or way["api"], way["ns"] or "", way["plural"]
            name, sub = way["name"] or "", way["sub"] or ""
        if (api, plural) not in KINDS or ("/" in api and api.partition("/")[0] not in self.groups):
            raise Refusal(404, "the server could not find the requested resource")
        verb = VERBS[request.method]
        if verb == "get" and not name:
            verb = "watch" if request.query.get("watch") in ("true", "1") else "list"
        group = api.partition("/")[0] if "/" in api else ""
        what = f"{plural}{'/' + sub if sub else ''}"
        if (verb, what) in self.denied:
            where = f' in the namespace "{namespace}"' if namespace else " at the cluster scope"
            resource = f'resource "{what}" in API group "{group}"'
            full = f"{plural}.{group}" if group else plural
            raise Refusal(403, f'{full} is forbidden: User "ann" cannot {verb} {resource}{where}')
        if plural == "selfsubjectaccessreviews":
            asked = body["spec"]["resourceAttributes"]
            of = asked["resource"] + (f"/{asked['subresource']}" if asked.get("subresource") else "")
            return web.json_response(
                {**body, "status": {"allowed": (asked["verb"], of) not in self.denied}}, status=201
            )
        if sub == "log":
            return await self.log(request, namespace, name)
        if verb == "watch":
            return await self.watch(request, api, plural, namespace)
        with self.lock:
            query = dict(request.query)
            match verb:
                case "list":
                    return web.json_response(self.listed(api, plural, namespace, query))
                case "get":
                    return web.json_response(self.existing(api, plural, namespace, name))
                case "create":
                    return web.json_response(self.created(api, plural, namespace, body, query), status=201)
                case "delete":
                    return web.json_response(self.deleted(api, plural, namespace, name, body or {}, query))
                case _:
                    kind = request.content_type
                    return web.json_response(self.changed(api, plural, namespace, name, sub, body, kind, query))

    def discovery(self, path: str) -> Object | None:
        apis = [api for api in dict.fromkeys(api for api, _ in KINDS) if "/" not in api or self.installed(api)]
        groups = [
            {
                "name": api.partition("/")[0],
                "versions": [{"groupVersion": api, "version": api.partition("/")[2]}],
                "preferredVersion": {"groupVersion": api, "version": api.partition("/")[2]},
            }
            for api in apis
            if "/" in api
        ]
        if path == "/version":
            return {"major": "1", "minor": "32", "gitVersion": "v1.32.4"}
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
        for group in groups:
            if path == f"/apis/{group['name']}":
                return {"kind": "APIGroup", "apiVersion": "v1", **group}
        for api in apis:
            if path == (f"/apis/{api}" if "/" in api else f"/api/{api}"):
                verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
                resources = [
                    {"name": p, "singularName": k.lower(), "namespaced": n, "kind": k, "verbs": verbs}
                    for (of, p), (k, n) in KINDS.items()
                    if of == api
                ]
                return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": api, "resources": resources}
        return None

    def installed(self, api: str) -> bool:
        return api.partition("/")[0] in self.groups

    def existing(self, api: str, plural: str, namespace: str, name: str) -> Object:
        found = self.objects.get((api, plural, namespace, name))
        if found is None:
            full = f"{plural}.{api.partition('/')[0]}" if "/" in api else plural
            raise Refusal(404, f'{full} "{name}" not found')
        return found

    def listed(self, api: str, plural: str, namespace: str, query: dict[str, str]) -> Object:
        keys = sorted(key for key in self.objects if key[:2] == (api, plural) and namespace in ("", key[2]))
        found = [self.objects[key] for key in keys if matches(self.objects[key], query.get("labelSelector", ""))]
        start = int(query.get("continue", "0"))
        limit = int(query.get("limit", "0")) or len(found) or 1
        more = {"continue": str(start + limit)} if start + limit < len(found) else {}
        meta = {"resourceVersion": str(self.version), **more}
        items = found[start : start + limit]
        return {"kind": f"{KINDS[api, plural][0]}List", "apiVersion": api, "metadata": meta, "items": items}

    def created(self, api: str, plural: str, namespace: str, body: Object, query: dict[str, str]) -> Object:
        name = body.get("metadata", {}).get("name", "")
        if body.get("metadata", {}).get("namespace", namespace) != namespace:
            raise Refusal(400, "the namespace of the provided object does not match the namespace sent on the request")
        if (api, plural, namespace, name) in self.objects:
            full = f"{plural}.{api.partition('/')[0]}" if "/" in api else plural
            raise Refusal(409, f'{full} "{name}" already exists')
        self.validate(plural, body, query)
        if query.get("dryRun") == "All":
            return body
        return self.put(api, plural, {k: v for k, v in body.items() if k != "status"}, namespace)

    def changed(
        self, api: str, plural: str, namespace: str, name: str, sub: str, body: Any, kind: str, query: dict[str, str]
    ) -> Object:
        before = self.existing(api, plural, namespace, name)
        if kind in ("application/merge-patch+json", "application/strategic-merge-patch+json"):
            after = merged(before, body)
        elif kind == "application/json":
            after = body
        else:
            raise Refusal(415, f"the body of the request was in an unknown format: {kind}")
        said = after["metadata"].get("resourceVersion")
        if said not in (None, before["metadata"]["resourceVersion"]):
            message = "the object has been modified; please apply your changes to the latest version and try again"
            raise Refusal(409, f'Operation cannot be fulfilled on {plural} "{name}": {message}')
        # A status is changed by its own door alone.
        after = (
            {**before, "status": after.get("status")} if sub == "status" else {**after, "status": before.get("status")}
        )
        after = {key: value for key, value in after.items() if value is not None}
        if before.get("immutable") and any(after.get(part) != before.get(part) for part in ("data", "binaryData")):
            raise Refusal(
                422, f'ConfigMap "{name}" is invalid: data: Forbidden: field is immutable when `immutable` is set'
            )
        self.validate(plural, after, query)
        return after if query.get("dryRun") == "All" else self.put(api, plural, after, namespace)

    def deleted(
        self, api: str, plural: str, namespace: str, name: str, options: Object, query: dict[str, str]
    ) -> Object:
        found = self.existing(api, plural, namespace, name)
        uid = options.get("preconditions", {}).get("uid", found["metadata"]["uid"])
        if uid != found["metadata"]["uid"]:
            raise Refusal(409, f"Precondition failed: UID in precondition: {uid}, in object: another")
        policy = options.get("propagationPolicy") or query.get("propagationPolicy", "Background")
        if policy == "Foreground" and self.owned(found["metadata"]["uid"]):
            now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            found["metadata"] |= {"deletionTimestamp": now, "finalizers": ["foregroundDeletion"]}
            return self.put(api, plural, found, namespace)
        self.remove(found)
        return {"kind": "Status", "apiVersion": "v1", "status": "Success"}

    def validate(self, plural: str, body: Object, query: dict[str, str]) -> None:
        if plural != "rayjobs":
            return
        name = body["metadata"].get("name", "")
        lines = misfits({key: value for key, value in body.items() if key != "status"})
        lines += [f"spec.{one}{UNKNOWN} not here" for one in self.missing_fields & set(body["spec"])]
        unknown = [line.partition(UNKNOWN)[0] for line in lines if UNKNOWN in line]
        wrong = [line for line in lines if UNKNOWN not in line]
        if wrong:
            raise Refusal(422, f'RayJob.ray.io "{name}" is invalid: {"; ".join(wrong)}')
        if unknown and query.get("fieldValidation") == "Strict":
            said = ", ".join(f'unknown field "{one}"' for one in unknown)
            raise Refusal(400, f'RayJob in version "v1" cannot be handled as a RayJob: strict decoding error: {said}')

    async def watch(self, request: web.Request, api: str, plural: str, namespace: str) -> web.StreamResponse:
        since = int(request.query.get("resourceVersion") or 0)
        if 0 < since < self.oldest:
            raise Refusal(410, f"too old resource version: {since} ({self.oldest})")
        answer = web.StreamResponse(headers={"Content-Type": "application/json"})
        await answer.prepare(request)
        until = asyncio.get_running_loop().time() + float(request.query.get("timeoutSeconds", "30"))
        while asyncio.get_running_loop().time() < until:
            with self.lock:
                fresh = [event for event in self.events if event[0] > since]
            for at, kind, key, body in fresh:
                since = at
                here = key[:2] == (api, plural) and namespace in ("", key[2])
                if here and matches(body, request.query.get("labelSelector", "")):
                    await answer.write(json.dumps({"type": kind, "object": body}).encode() + b"\n")
            await asyncio.sleep(0.02)
        return answer

    async def log(self, request: web.Request, namespace: str, name: str) -> web.StreamResponse:
        with self.lock:
            pod = self.existing("v1", "pods", namespace, name)
        file = self.logs.get((namespace, name))
        if file is None:
            raise Refusal(400, f'container in pod "{name}" is waiting to start: ContainerCreating')
        answer = web.StreamResponse(headers={"Content-Type": "text/plain"})
        await answer.prepare(request)
        async for i, line in self._lines(file, namespace, name, request.query.get("follow") == "true"):
            if self.cut_log_after is not None and i >= self.cut_log_after:
                self.cut_log_after = None
                assert request.transport is not None
                request.transport.abort()
                return answer
            await answer.write(line)
        del pod
        return answer

    async def _lines(self, file: Path, namespace: str, name: str, follow: bool) -> AsyncIterator[tuple[int, bytes]]:
        with file.open("rb") as lines:
            i = 0
            while True:
                with self.lock:
                    pod = self.objects.get(("v1", "pods", namespace, name), {})
                over = pod.get("status", {}).get("phase", "Failed") in ("Succeeded", "Failed")
                while line := lines.readline():
                    yield i, line
                    i += 1
                if over or not follow:
                    return
                await asyncio.sleep(0.02)

    @contextmanager
    def serve(self, folder: Path) -> Iterator[FakeKube]:
        """Answer on a port of this machine, in a thread; kubectl sends no token where there is no TLS."""
        self.certificate = folder / "kube.pem"
        context = write_certificate(self.certificate)
        loop, started, port = asyncio.new_event_loop(), threading.Event(), free_port()

        async def start() -> web.AppRunner:
            app = web.Application(client_max_size=4 << 20)
            app.router.add_route("*", "/{path:.*}", self.handle)
            runner = web.AppRunner(app, shutdown_timeout=0.2)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", port, ssl_context=context).start()
            return runner

        def work() -> None:
            runner = loop.run_until_complete(start())
            started.set()
            loop.run_forever()
            loop.run_until_complete(runner.cleanup())

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        assert started.wait(10)
        self.url = f"https://127.0.0.1:{port}"
        try:
            yield self
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(timeout=10)

    def kubeconfig(self, file: Path, token: str | None = None, namespace: str | None = None) -> Path:
        """The way here, as a user has it."""
        context = {"cluster": "fake", "user": "ann", **({"namespace": namespace} if namespace else {})}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "fake",
            "clusters": [
                {"name": "fake", "cluster": {"server": self.url, "certificate-authority": str(self.certificate)}}
            ],
            "users": [{"name": "ann", "user": {"token": token or self.token}}],
            "contexts": [{"name": "fake", "context": context}],
        }
        file.write_text(yaml.safe_dump(config))
        return file


def matches(one: Object, selector: str) -> bool:
    """Equality selectors alone: `a=b,c=d`."""
    labels = one["metadata"].get("labels", {})
    return all(labels.get(key) == value for key, _, value in (s.partition("=") for s in selector.split(",") if s))


def merged(before: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    out = dict(before) if isinstance(before, dict) else {}
    for key, value in patch.items():
        if value is None:
            out.pop(key, None)
        else:
            out[key] = merged(out.get(key), value)
    return out
