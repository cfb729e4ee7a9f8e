"""A Kubernetes API server, as little of it as submitting needs; every refusal is one line.

The `kubernetes` package (extra `[k8s]`) reads the kubeconfig, logs in and keeps TLS; what goes over the wire is plain
JSON, so that a server of any version is understood.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from pipelines.errors import JobError, LdmError

POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
TIMEOUT_S = (10.0, 60.0)
"""To connect, and between two pieces of an answer."""

SILENT_S = 3600.0
"""A log that is followed may have nothing to say for as long."""


class Refused(LdmError):
    """The API server's own word; `status` is that of HTTP, 0 where nobody answered."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class KubeApi:
    """The cluster of a kubeconfig's context, or the one that this process runs in."""

    def __init__(self, context: str | None = None) -> None:
        """
        Raises:
            JobError: the extra is missing, or there is no such cluster to be found.
        """
        try:
            from kubernetes import client, config
        except ImportError:
            raise JobError("--kube needs Kubernetes' client; install the extra: pip install 'ldm-batch[k8s]'") from None
        self.said = f"--context {context}" if context else "--kube"
        self.settings: Any = client.Configuration()
        # The client itself looks at the variable once, when it is imported.
        file = os.environ.get("KUBECONFIG") or str(Path("~/.kube/config").expanduser())
        try:
            contexts, current = config.list_kube_config_contexts(file)
            known = {one["name"]: one for one in contexts}
            chosen = known.get(context) if context else current
            if chosen is None:
                raise JobError(f"--context {context}: no such context; the kubeconfig has {', '.join(known) or 'none'}")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config.load_kube_config(file, context, client_configuration=self.settings)
            self.namespace: str = chosen["context"].get("namespace") or "default"
        except JobError:
            raise
        except Exception as error:  # noqa: BLE001 - a kubeconfig can be wrong in every way, and the client checks none
            try:
                if context or not isinstance(error, config.ConfigException):
                    raise config.ConfigException(str(error))
                config.load_incluster_config(client_configuration=self.settings)
                self.namespace = POD_NAMESPACE.read_text(encoding="utf-8").strip()
            except (config.ConfigException, OSError):
                reason = " ".join(str(error).split())[:200]
                raise JobError(
                    f"{self.said}: no cluster to be found ({reason}); set KUBECONFIG, or log in with your cloud's tool"
                ) from None
        self.pool: Any = client.rest.RESTClientObject(self.settings).pool_manager

    def get(self, path: str, **query: str) -> dict[str, Any]:
        return self._json("GET", path, query)

    def create(self, path: str, body: dict[str, Any], **query: str) -> dict[str, Any]:
        return self._json("POST", path, query, body, "application/json")

    def patch(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """A merge patch: null takes a field away."""
        return self._json("PATCH", path, {}, body, "application/merge-patch+json")

    def delete(self, path: str, **options: Any) -> None:
        """`options` as of `DeleteOptions`; with `preconditions` only the very object that they name."""
        self._json("DELETE", path, {}, {"apiVersion": "v1", "kind": "DeleteOptions", **options}, "application/json")

    def find(self, path: str, **query: str) -> dict[str, Any] | None:
        """`get`, or None where there is no such thing."""
        try:
            return self.get(path, **query)
        except Refused as refused:
            if refused.status == 404:
                return None
            raise

    def items(self, path: str, selector: str) -> list[dict[str, Any]]:
        """All objects with these labels, page after page."""
        found: list[dict[str, Any]] = []
        query = {"labelSelector": selector, "limit": "500"}
        while True:
            try:
                page = self.get(path, **query)
            except Refused as refused:
                if refused.status != 410 or "continue" not in query:
                    raise
                # The list has grown too old between two pages; from its beginning.
                found, query = [], {"labelSelector": selector, "limit": "500"}
                continue
            found += page.get("items", [])
            more = page.get("metadata", {}).get("continue")
            if not more:
                return found
            query["continue"] = more

    def lines(self, path: str, **query: str) -> Iterator[str]:
        """Lines of an answer as they come; it may break off without a word."""
        import urllib3

        answer = self._request("GET", path, query, None, None, (TIMEOUT_S[0], SILENT_S))
        rest = b""
        try:
            for piece in answer.stream(1 << 16):
                *whole, rest = (rest + piece).split(b"\n")
                for line in whole:
                    yield line.decode("utf-8", "replace")
        except (urllib3.exceptions.HTTPError, OSError):
            return
        finally:
            answer.close()
        if rest:
            yield rest.decode("utf-8", "replace")

    def _json(
        self, method: str, path: str, query: dict[str, str], body: Any = None, kind: str | None = None
    ) -> dict[str, Any]:
        answer = self._request(method, path, query, body, kind, TIMEOUT_S)
        try:
            value = json.loads(answer.data or b"{}")
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise Refused(f"{self.settings.host}: answers no JSON; is that a Kubernetes API server?", 0)
        return value

    def _request(
        self, method: str, path: str, query: dict[str, str], body: Any, kind: str | None, timeout: tuple[float, float]
    ) -> Any:
        import urllib3

        url = f"{self.settings.host.rstrip('/')}{path}" + (f"?{urlencode(query)}" if query else "")
        headers = {"Accept": "application/json", **({"Content-Type": kind} if kind else {})}
        for auth in self.settings.auth_settings().values():
            if auth["in"] == "header" and auth["value"]:
                headers[auth["key"]] = auth["value"]
        again = urllib3.Retry(
            total=3,
            connect=1,
            backoff_factor=0.3,
            status_forcelist=(429, 502, 503, 504),
            allowed_methods={"GET"},
            raise_on_status=False,
        )
        try:
            answer = self.pool.request(
                method,
                url,
                body=None if body is None else json.dumps(body),
                headers=headers,
                timeout=urllib3.Timeout(connect=timeout[0], read=timeout[1]),
                retries=again,
                preload_content=False,
            )
            if answer.status >= 400:
                raise Refused(self._sentence(answer.status, answer.data), answer.status)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            reason = str(getattr(error, "reason", None) or error).splitlines()[0]
            reason = reason.rpartition(": ")[2][:200]
            raise Refused(
                f"{self.said}: no Kubernetes API answers at {self.settings.host} ({reason}); check the context and the "
                "way there",
                0,
            ) from None
        return answer

    def _sentence(self, status: int, body: bytes) -> str:
        try:
            message = str(json.loads(body)["message"])
        except (ValueError, TypeError, KeyError):
            message = body[:200].decode("utf-8", "replace")
        message = " ".join(message.split())[:600] or "no reason given"
        match status:
            case 401:
                return f"{self.said}: {self.settings.host} does not take these credentials; log in again"
            case 403:
                return f"{self.said}: {message}; ask whoever runs the cluster for that right"
            case 409:
                return f"{self.said}: {message}; somebody else was first, run the same command again"
            case 410:
                return f"{self.said}: {message}; run the same command again"
            case _:
                return f"{self.said}: {message} (HTTP {status})"


def refuse_no_namespace(said: str | None) -> None:
    """
    Raises:
        JobError: `said` can be the name of none (RFC 1123, a label).
    """
    if said is not None and not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", said):
        raise JobError(
            f"--namespace {said[:80]!r}: no name of a namespace; give a-z, 0-9 and -, such as `kubectl get namespaces` "
            "shows"
        )


def place(namespace: str, plural: str, name: str = "", group: str = "") -> str:
    """Where objects of a kind lie in a namespace; `group` is such as `ray.io/v1`."""
    root = f"/apis/{group}" if group else "/api/v1"
    return f"{root}/namespaces/{quote(namespace, safe='')}/{plural}" + (f"/{quote(name, safe='')}" if name else "")
