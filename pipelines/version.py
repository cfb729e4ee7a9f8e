"""Versions of packages, also where this one has come as bare code, as to the nodes of a cluster."""

from __future__ import annotations

from importlib import metadata


def version(package: str) -> str:
    """Of an installed package; "" of one that is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
