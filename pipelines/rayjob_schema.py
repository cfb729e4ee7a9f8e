"""A RayJob against KubeRay 1.7's own definition of it, as strictly as `kubectl create --validate=strict`.

The schema is derived from the CRD by `infra/kuberay/rayjob_schema.py`; needs jsonschema, of the extra `[k8s]`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import Any

from pipelines.errors import JobError


def misfits(manifest: Any) -> list[str]:
    """Each place where a manifest is not what the API server takes, one line each; nothing where it fits."""
    if not isinstance(manifest, dict):
        return [f"expected a mapping with apiVersion, kind, metadata and spec; got {_shown(manifest)}"]
    version, kind = manifest.get("apiVersion"), manifest.get("kind")
    if kind != "RayJob" or version not in versions():
        allowed = " or ".join(sorted(versions()))
        return [f"apiVersion, kind: got {_shown(version)}, {_shown(kind)}; expected {allowed}, RayJob"]
    errors = sorted(_validator(version).iter_errors(without_nulls(manifest)), key=lambda e: [str(s) for s in e.path])
    return [line for error in errors for line in _lines(error)]


def without_nulls(value: Any) -> Any:
    """As the API server sees it: a field that is null is a field that is not there."""
    if isinstance(value, dict):
        return {key: without_nulls(child) for key, child in value.items() if child is not None}
    return [without_nulls(child) for child in value] if isinstance(value, list) else value


@cache
def versions() -> dict[str, Any]:
    """The API versions that KubeRay serves, and the schema of each."""
    text = (files("pipelines") / "kuberay" / "rayjob.schema.json").read_text(encoding="utf-8")
    schemas = json.loads(text)
    shared = schemas.pop("$defs")
    return {version: {**schema, "$defs": shared} for version, schema in schemas.items()}


@cache
def _validator(version: str) -> Any:
    try:
        from jsonschema import Draft202012Validator, validators
        from jsonschema.exceptions import ValidationError
    except ImportError:
        raise JobError("checking a RayJob needs jsonschema; install the extra: pip install 'ldm-batch[k8s]'") from None

    def unique_by(validator: Any, keys: dict[str, Any], items: Any, schema: Any) -> Iterator[Any]:
        seen: list[tuple[Any, ...]] = []
        for item in items if isinstance(items, list) else ():
            if not isinstance(item, dict):
                continue
            key = tuple(item.get(name, default) for name, default in keys.items())
            if key in seen:
                yield ValidationError(f"{', '.join(keys)} {', '.join(map(repr, key))} is given twice; keep one")
            seen.append(key)

    kind: Any = validators.extend(Draft202012Validator, {"uniqueBy": unique_by})
    return kind(versions()[version])


def _lines(error: Any) -> list[str]:
    at, came, wanted = ".".join(map(str, error.path)) or "manifest", error.instance, error.validator_value
    prefix = f"{at}." if error.path else ""
    match error.validator:
        case "additionalProperties" if isinstance(came, dict):
            allowed = list(error.schema.get("properties", ()))
            lines = []
            for name in sorted(set(came) - set(allowed), key=str):
                near = difflib.get_close_matches(str(name), allowed, n=1)
                hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(sorted(allowed))[:200]}"
                lines.append(f"{prefix}{name}: unknown field; {hint}")
            return lines
        case "required":
            missing = [name for name in wanted if name not in came]
            # One error of jsonschema for each of them, with the same instance.
            return [f"{prefix}{name}: missing; it is needed" for name in missing if repr(name) in error.message]
        case "type":
            expected = " or ".join([wanted] if isinstance(wanted, str) else wanted)
            return [f"{at}: expected {expected}; got {_shown(came)}"]
        case "enum":
            return [f"{at}: got {_shown(came)}; one of {', '.join(map(str, wanted))}"]
        case "pattern":
            quantity = wanted.startswith("^(\\+|-)?(([0-9]+")
            expected = "a quantity such as 500m, 2 or 4Gi" if quantity else f"text of the form {wanted}"
            return [f"{at}: got {_shown(came)}; expected {expected}"]
        case "minimum" | "maximum":
            return [f"{at}: got {_shown(came)}; the {error.validator} is {wanted}"]
        case "minItems":
            return [f"{at}: got {len(came)} items; at least {wanted}"]
        case _:
            return [f"{at}: {error.message[:300]}"]


def _shown(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return "a mapping" if isinstance(value, dict) else "a list"
    return repr(value)[:80]
