"""The script that makes the strict schema of a CRD, on a small one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from tests.conftest import ROOT

QUANTITY = {
    "anyOf": [{"type": "integer"}, {"type": "string"}],
    "pattern": "^[0-9]+(Gi)?$",
    "x-kubernetes-int-or-string": True,
}
KEYED = {
    "type": "array",
    "x-kubernetes-list-type": "map",
    "x-kubernetes-list-map-keys": ["port", "protocol"],
    "items": {
        "type": "object",
        "properties": {"port": {"type": "integer"}, "protocol": {"type": "string", "default": "TCP"}},
        "required": ["port", "protocol"],
    },
}
FIELDS: dict[str, Any] = {
    "size": QUANTITY,
    "ports": KEYED,
    "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": True, "properties": {"a": {"type": "string"}}},
    "tags": {"type": "object", "additionalProperties": {"type": "string"}},
    "maybe": {"type": "string", "nullable": True},
    "small": {"type": "integer", "format": "int32", "description": "left out"},
}


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    spec = {"type": "object", "properties": FIELDS, "required": ["size"]}
    whole = {"type": "object", "properties": {"metadata": {"type": "object"}, "spec": spec}}
    served = {"name": "v1", "served": True, "schema": {"openAPIV3Schema": whole}}
    crd = {"spec": {"group": "ray.io", "versions": [served, {"name": "v0", "served": False}]}}
    file: Path = tmp_path_factory.mktemp("crd") / "crd.yaml"
    file.write_text(yaml.safe_dump(crd))
    script = ROOT / "infra" / "kuberay" / "rayjob_schema.py"
    said = subprocess.run([sys.executable, script, file], capture_output=True, text=True, check=True)
    made: dict[str, Any] = json.loads(said.stdout)
    assert set(made) == {"ray.io/v1", "$defs"}
    assert "left out" not in said.stdout
    return {**made["ray.io/v1"], "$defs": made["$defs"]}


@pytest.mark.parametrize(
    ("spec", "fits"),
    [
        ({"size": 1}, True),
        ({"size": "1Gi"}, True),
        ({"size": "1GB"}, False),
        ({"size": 1.5}, False),
        ({}, False),
        ({"size": 1, "sise": 1}, False),
        # The server fills in the protocol.
        ({"size": 1, "ports": [{"port": 1}]}, True),
        ({"size": 1, "ports": [{"protocol": "TCP"}]}, False),
        ({"size": 1, "free": {"a": "x", "b": 1}}, True),
        ({"size": 1, "free": {"a": 1}}, False),
        ({"size": 1, "tags": {"anything": "x"}}, True),
        ({"size": 1, "tags": {"anything": 1}}, False),
        ({"size": 1, "maybe": None}, True),
        ({"size": 1, "small": 1 << 31}, False),
    ],
)
def test_the_schema_is_as_strict_as_the_server(schema: dict[str, Any], spec: dict[str, Any], fits: bool) -> None:
    manifest = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "a"}, "spec": spec}
    assert Draft202012Validator(schema).is_valid(manifest) is fits


def test_a_keyed_list_names_its_keys_and_what_they_are_if_left_out(schema: dict[str, Any]) -> None:
    assert schema["properties"]["spec"]["properties"]["ports"]["uniqueBy"] == {"port": None, "protocol": "TCP"}
