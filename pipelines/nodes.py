"""What only one machine has is refused where a cluster has several."""

from __future__ import annotations

from pipelines.adapters import AND
from pipelines.errors import JobError
from pipelines.plans import read_shard
from pipelines.shards import Shard
from pipelines.storage import Store


def refuse_local_sink(store: Store, path: str) -> None:
    """Refuse to scatter an output over the disks of several nodes.

    Raises:
        JobError: `file://` in front says that the folder is shared.
    """
    import ray

    nodes = sum(node["Alive"] for node in ray.nodes())
    if store.local is not None and nodes > 1 and not path.startswith("file://"):
        raise JobError(
            f"sink.path {path} is a folder of one machine, the cluster has {nodes} nodes; use s3://…, or "
            "file:///… for a folder that all of them share"
        )


def refuse_local_images(store: Store, shard: Shard) -> None:
    """Refuse images of one machine's disk where other nodes would not find them.

    Raises:
        JobError: `file://` in front says that the folder is shared.
    """
    import ray

    if sum(node["Alive"] for node in ray.nodes()) < 2:
        return
    rows = read_shard(store, shard.file, shard.index)
    for name in ("image", "mask_image", "control_image", "latents", "lora"):
        said = (value for value in rows[name].to_pylist() if value is not None)
        places = (place for value in said for place in (value.split(AND) if name == "lora" else [value]))
        where = next((place for place in places if place.startswith("/")), None)
        if where is not None:
            raise JobError(
                f"{name} {where} is a file of one machine, the cluster has several nodes; put the files on s3://… and "
                "the like, or name them file:///… where all nodes share the folder"
            )
