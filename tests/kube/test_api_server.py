"""The fake API server against Kubernetes' own client, so that the tests on it mean something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from kubernetes import client, config, watch

from tests.kube.api_server import FakeKube


@pytest.fixture
def official(kube: FakeKube, tmp_path: Path) -> Any:
    return config.new_client_from_config(str(tmp_path / "kubeconfig"))


def job(name: str) -> dict[str, Any]:
    head = {"rayStartParams": {}, "template": {"spec": {"containers": [{"name": "h", "image": "a"}]}}}
    spec = {"entrypoint": "true", "rayClusterSpec": {"headGroupSpec": head}}
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": name}, "spec": spec}


def test_the_official_client_creates_patches_watches_and_deletes(kube: FakeKube, official: Any) -> None:
    api = client.CustomObjectsApi(official)
    of = {"group": "ray.io", "version": "v1", "namespace": "default", "plural": "rayjobs"}
    made = api.create_namespaced_custom_object(**of, body=job("a"))
    with pytest.raises(client.ApiException, match="already exists") as caught:
        api.create_namespaced_custom_object(**of, body=job("a"))
    assert (caught.value.status, caught.value.reason) == (409, "Conflict")
    changed = api.patch_namespaced_custom_object(**of, name="a", body={"spec": {"suspend": True}})
    assert changed["spec"]["entrypoint"] == "true"
    # A status has a door of its own.
    api.patch_namespaced_custom_object(**of, name="a", body={"status": {"jobStatus": "RUNNING"}})
    assert "status" not in api.get_namespaced_custom_object(**of, name="a")
    api.patch_namespaced_custom_object_status(**of, name="a", body={"status": {"jobStatus": "RUNNING"}})
    assert api.get_namespaced_custom_object(**of, name="a")["status"] == {"jobStatus": "RUNNING"}
    stale = {"metadata": {"resourceVersion": made["metadata"]["resourceVersion"]}, "spec": {"suspend": False}}
    with pytest.raises(client.ApiException, match="please apply your changes to the latest version"):
        api.patch_namespaced_custom_object(**of, name="a", body=stale)
    api.delete_namespaced_custom_object(**of, name="a")
    with pytest.raises(client.ApiException, match='rayjobs.ray.io ."a." not found'):
        api.get_namespaced_custom_object(**of, name="a")
    seen = [e["type"] for e in watch.Watch().stream(api.list_namespaced_custom_object, **of, timeout_seconds=1)]
    assert seen == ["ADDED", "MODIFIED", "MODIFIED", "MODIFIED", "DELETED"]


def test_a_watch_from_a_version_long_gone_is_410(kube: FakeKube, official: Any) -> None:
    kube.oldest = 1000
    pods = client.CoreV1Api(official)
    with pytest.raises(client.ApiException) as caught:
        list(watch.Watch().stream(pods.list_namespaced_pod, "default", resource_version="1", timeout_seconds=1))
    assert caught.value.status == 410


@pytest.mark.parametrize(("change", "status"), [({"entrypoint": 7}, 422), ({"entryPoint": "x"}, 400)])
def test_a_wrong_rayjob_is_refused(kube: FakeKube, official: Any, change: dict[str, Any], status: int) -> None:
    body = job("a")
    body["spec"] |= change
    with pytest.raises(client.ApiException) as caught:
        client.CustomObjectsApi(official).create_namespaced_custom_object(
            "ray.io", "v1", "default", "rayjobs", body, field_validation="Strict"
        )
    assert caught.value.status == status


def test_who_has_no_token_or_no_right_is_refused(kube: FakeKube, official: Any) -> None:
    kube.denied.add(("list", "pods"))
    with pytest.raises(client.ApiException, match="cannot list resource") as caught:
        client.CoreV1Api(official).list_namespaced_pod("default")
    assert caught.value.status == 403
    kube.token = "another"
    with pytest.raises(client.ApiException) as caught:
        client.CoreV1Api(official).list_namespaced_pod("default")
    assert caught.value.status == 401
