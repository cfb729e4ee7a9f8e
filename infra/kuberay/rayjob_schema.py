"""KubeRay's CRD of RayJob → the strict JSON Schema that ships with the package.

    python infra/kuberay/rayjob_schema.py ray.io_rayjobs.yaml > pipelines/kuberay/rayjob.schema.json

The CRD is `helm-chart/kuberay-operator/crds/ray.io_rayjobs.yaml` of the KubeRay release. The schema refuses what
`kubectl create --validate=strict` and the API server refuse together: fields that are not there (the server would
drop them without a word), wrong types, values out of range, keyed lists with one key twice. What the operator itself
refuses is in `pipelines/rayjob_rules.py`. Descriptions are left out, and what occurs more than once stands in `$defs`.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

KEPT = (
    "type", "enum", "pattern", "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems", "minProperties",
)  # fmt: skip
BITS = {"int32": 31, "int64": 63}
OBJECT_META = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        **{name: {"type": "string"} for name in ("name", "generateName", "namespace", "uid", "resourceVersion")},
        **{name: {"type": "string"} for name in ("selfLink", "creationTimestamp", "deletionTimestamp")},
        **{name: {"type": "object", "additionalProperties": {"type": "string"}} for name in ("labels", "annotations")},
        **{name: {"type": "integer"} for name in ("generation", "deletionGracePeriodSeconds")},
        "finalizers": {"type": "array", "items": {"type": "string"}},
        "managedFields": {"type": "array"},
        "ownerReferences": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["apiVersion", "kind", "name", "uid"],
                "properties": {
                    **{name: {"type": "string"} for name in ("apiVersion", "kind", "name", "uid")},
                    **{name: {"type": "boolean"} for name in ("controller", "blockOwnerDeletion")},
                },
            },
        },
    },
}
WORTH_SHARING = 120
"""Characters of JSON from which on a part that occurs again is written once."""


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """One node of a structural schema as JSON Schema; `uniqueBy` are the keys of a keyed list, with their defaults."""
    out = {name: schema[name] for name in KEPT if name in schema}
    properties = schema.get("properties", {})
    if schema.get("x-kubernetes-int-or-string"):
        out["type"] = ["integer", "string"]
    if schema.get("nullable") and isinstance(out.get("type"), str):
        out["type"] = [out["type"], "null"]
    if (bits := BITS.get(schema.get("format", ""))) is not None:
        out = {"minimum": -(1 << bits), "maximum": (1 << bits) - 1} | out
    if properties:
        out["properties"] = {name: strict(child) for name, child in properties.items()}
    # The server fills in defaults before it looks whether all is there.
    required = [name for name in schema.get("required", ()) if "default" not in properties.get(name, {})]
    if required:
        out["required"] = required
    if isinstance(schema.get("additionalProperties"), dict):
        out["additionalProperties"] = strict(schema["additionalProperties"])
    elif properties and not schema.get("x-kubernetes-preserve-unknown-fields"):
        out["additionalProperties"] = False
    if "items" in schema:
        out["items"] = strict(schema["items"])
        keys = schema.get("x-kubernetes-list-map-keys", ())
        if keys:
            of_item = schema["items"]["properties"]
            out["uniqueBy"] = {key: of_item[key].get("default") for key in keys}
        if schema.get("x-kubernetes-list-type") == "set":
            out["uniqueItems"] = True
    return out


def shared(schemas: dict[str, Any]) -> dict[str, Any]:
    """The same with `$ref` in the place of parts that occur more than once."""
    seen: Counter[str] = Counter()

    def count(node: Any) -> None:
        if isinstance(node, dict):
            text = json.dumps(node, sort_keys=True)
            seen[text] += 1
            if seen[text] > 1:
                return
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            count(child)

    count(schemas)
    names = {text: str(i) for i, text in enumerate(t for t, n in seen.items() if n > 1 and len(t) >= WORTH_SHARING)}
    definitions: dict[str, Any] = {}

    def replace(node: Any) -> Any:
        if isinstance(node, list):
            return [replace(child) for child in node]
        if not isinstance(node, dict):
            return node
        name = names.get(json.dumps(node, sort_keys=True))
        if name is None:
            return {key: replace(child) for key, child in node.items()}
        if name not in definitions:
            definitions[name] = {}
            definitions[name] = {key: replace(child) for key, child in node.items()}
        return {"$ref": f"#/$defs/{name}"}

    out = {key: replace(child) for key, child in schemas.items()}
    return {**out, "$defs": definitions}


def main() -> None:
    crd = yaml.load(Path(sys.argv[1]).read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    versions = {}
    for version in crd["spec"]["versions"]:
        if not version["served"]:
            continue
        api = f"{crd['spec']['group']}/{version['name']}"
        schema = strict(version["schema"]["openAPIV3Schema"])
        schema["properties"] |= {"apiVersion": {"const": api}, "kind": {"const": "RayJob"}, "metadata": OBJECT_META}
        versions[api] = schema | {"required": ["apiVersion", "kind", "metadata", "spec"]}
    json.dump(shared(versions), sys.stdout, separators=(",", ":"), sort_keys=True)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
