"""Put a finished shard into the output: its files, then its part, which makes it so."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from safetensors.numpy import save as save_safetensors

from pipelines import manifest, metrics, shard_file
from pipelines.blocks import KEPT, RESULT_FIELDS, rows_of, unpack
from pipelines.commit import commit_shard, content_name
from pipelines.embeddings_file import EmbeddingsHead, write_embeddings
from pipelines.errors import NotWhole
from pipelines.generation_text import describe
from pipelines.images import EXTENSIONS, MIME_TYPES, MOST_PX, encode, thumbnail
from pipelines.job import Layout, Sink
from pipelines.latents_file import LatentsHead, write_latents
from pipelines.shard_file import Picture
from pipelines.storage import Store

Put = Callable[[tuple[str, bytes]], None]

RECEIPT = pa.schema(
    [
        ("shard", pa.int32()),
        ("num_ok", pa.int64()),
        ("num_failed", pa.int64()),
        ("num_filtered", pa.int64()),
        ("num_bytes", pa.int64()),
        ("num_left", pa.int64()),
        ("outcome", pa.string()),
        ("first_error", pa.string()),
    ]
)
"""What the driver hears of a committed shard: of the rows that were made, how they ended. `num_left` of those that did
not end as ok stay in the manifest as they were. `outcome`: mine, or theirs where another run was first."""

_INTERNAL = {
    "problem",
    "batch",
    "latents",
    "image_version",
    "pixels",
    "mask_pixels",
    "control_pixels",
    "latents_data",
    "embeds_data",
    "pooled_data",
    "kept",
    "intermediates",
    "stages",
}


class ShardWriter:
    """Callable on one finished shard; safe to repeat, by anyone, at any time."""

    def __init__(
        self,
        store: Store,
        plan_id: str,
        sink: Sink,
        layout: Layout,
        run_id: str,
        model: str,
        revision: str,
        encoder: LatentsHead | EmbeddingsHead | None = None,
        sign: Callable[[bytes, str], bytes] | None = None,
    ) -> None:
        self.store = store
        self.plan_id = plan_id
        # What the store was opened with stays there.
        self.sink = sink.model_copy(update={"storage_options": {}})
        self.layout: Layout = layout
        self.encoder = encoder
        self.sign = sign
        self.constants = {"run_id": run_id, "model": model, "model_revision": revision}

    def __call__(self, shard: pa.Table) -> pa.Table:
        if shard.num_rows == 0:
            return RECEIPT.empty_table()
        # Not what the stages were given beside the picture.
        rows = rows_of(shard.drop_columns(["mask_pixels", "control_pixels"]))
        for row in rows:
            row |= self._too_long(row)
        index = rows[0]["shard"]
        path = manifest.part_path(self.plan_id, index)
        again = any(row["attempt"] is not None for row in rows)
        before = manifest.read_rows(self.store.read(path) or b"") if again else {}
        if any(row["status"] == KEPT and row["key"] not in before for row in rows):
            raise NotWhole(f"{path} was damaged while rows of it were made again; run `ldm-batch repair`")
        left = {row["key"] for row in rows if row["status"] not in ("ok", KEPT) and self._is_there(before, row["key"])}
        kept = {row["key"]: before[row["key"]] for row in rows if row["status"] == KEPT or row["key"] in left}
        passed = self._passed(shard)
        records: list[dict[str, Any]] = []
        sizes: list[int] = []
        attempt = uuid.uuid4().hex

        def files() -> Iterator[tuple[str, bytes]]:
            for file in self._files(rows, kept, passed, index, records.append):
                sizes.append(len(file[1]))
                yield file

        def part() -> bytes:
            ended = Counter(record["status"] for record in records)
            head = manifest.PartHead(
                plan_id=self.plan_id,
                shard=index,
                attempt=attempt,
                num_rows=len(records),
                num_ok=ended["ok"],
                num_failed=ended["failed"],
                num_filtered=ended["filtered"],
                keys_digest=manifest.keys_digest(record["key"] for record in records),
            )
            data = manifest.part_bytes(self._table(shard, records, passed), head)
            sizes.append(len(data))
            return data

        start = time.perf_counter()
        outcome = commit_shard(self.store, files(), path, part, attempt, manifest.attempt_of, again=again)
        metrics.record("ldm_upload_seconds", time.perf_counter() - start)
        made = [row for row in rows if row["status"] != KEPT]
        errors = [f"{r['error_type']}: {r['error_message']}" for r in made if r["status"] == "failed"]
        receipt = {
            "shard": index,
            **{f"num_{s}": sum(r["status"] == s for r in made) for s in ("ok", "failed", "filtered")},
            "num_bytes": sum(sizes),
            "num_left": len(left),
            "outcome": outcome,
            "first_error": errors[0] if errors else None,
        }
        if outcome == "mine":
            for (status, stage), num in Counter((row["status"], row["stage"] or "") for row in made).items():
                metrics.record("ldm_rows_total", num, status=status, stage=stage)
        return pa.Table.from_pylist([receipt], schema=RECEIPT)

    def _too_long(self, row: dict[str, Any]) -> dict[str, Any]:
        """What is to be changed of a row whose picture the format cannot hold: nobody else's may be lost for it."""
        most = MOST_PX.get(self.sink.format)
        if most is None:
            return {}
        pictures = [row["pixels"]] if row["status"] == "ok" and row["pixels"] is not None else []
        pictures += [unpack(early["pixels"]) for early in row["kept"] or ()]
        longest = max((max(pixels.shape[:2]) for pixels in pictures), default=0)
        if longest <= most:
            return {}
        message = f"{longest} px: {self.sink.format} holds at most {most}; use sink.format: png"
        told = {"status": "failed", "stage": "sink", "error_type": "image.too_large", "error_message": message}
        return {**told, "pixels": None, "kept": None}

    def _is_there(self, before: dict[str, dict[str, Any]], key: str) -> bool:
        """Whether what an earlier attempt made of a row is whole: a repair must not lose it, where it can no longer be
        made; it may be a thumbnail that was missing."""
        record = before.get(key)
        if record is None or record["status"] != "ok":
            return False
        file, _, member = (record["uri"] or "").partition("#")
        data = self.store.read(file)
        if data is None or not member:
            return data is not None and hashlib.sha256(data).hexdigest()[:12] in file
        try:
            body = shard_file.read(data, [member]).get(member)
        except ValueError:
            return False
        return body is not None and hashlib.sha256(body).hexdigest() == record["sha256"]

    def _files(
        self,
        rows: list[dict[str, Any]],
        kept: dict[str, dict[str, Any]],
        passed: list[pa.Field],
        index: int,
        tell: Callable[[dict[str, Any]], None],
    ) -> Iterator[tuple[str, bytes]]:
        """Path and content of all that a shard leaves beside its part; `tell` is given each row's record, which is
        whole once this has ended."""
        puts: list[tuple[str, bytes]] = []
        pictures: list[Picture] = []
        records = []
        for row in rows:
            record = kept.get(row["key"]) or self._record(row, index, puts.append, pictures.append)
            records.append(record)
            tell(record)
            # Each as soon as it is made: while it is under way, the next is encoded.
            yield from puts
            puts.clear()
        self._one_file(pictures, passed, index, puts.append)
        self._latents(rows, records, index, puts.append)
        self._embeddings(rows, records, index, puts.append)
        yield from puts

    def _record(self, row: dict[str, Any], index: int, put: Put, picture: Callable[[Picture], None]) -> dict[str, Any]:
        """The manifest row; its picture is put, or handed on where a shard's pictures make one file."""
        record = {name: value for name, value in row.items() if name not in _INTERNAL}
        record |= self.constants | {
            "attempt": row["attempt"] or 1,
            "created_at": datetime.fromtimestamp(time.time(), UTC),
        }
        stages = record["stages"] = [dict(stage) for stage in row["stages"] or ()]
        if stages:
            record |= {name: stages[-1][name] for name in ("batch_size", "device", "worker")}
            record["duration_s"] = sum(stage["duration_s"] or 0.0 for stage in stages)
        for early in row["kept"] or ():
            data = self._encode(unpack(early["pixels"]), record)
            uri, sha256 = self._name("images", index, f"{row['key']}-{early['stage']}", data, self._extension)
            put((uri, data))
            stages[early["stage"]] |= {"uri": uri, "sha256": sha256, "num_bytes": len(data)}
        is_picture = row["status"] == "ok" and row["pixels"] is not None
        record["intermediates"] = self._intermediates(row, index, put) if row["status"] == "ok" else []
        if is_picture:
            pixels = row["pixels"]
            data = self._encode(pixels, record)
            uri, sha256 = self._name("images", index, row["key"], data, self._extension)
            height, width = pixels.shape[:2]
            record |= {
                "sha256": sha256,
                "num_bytes": len(data),
                "format": self.sink.format,
                "width": width,
                "height": height,
            }
            if self.layout == "files":
                record["uri"] = uri
                put((uri, data))
            else:
                picture(Picture(f"{row['key']}.{self._extension}", data, record))
            if self.sink.thumbnails is not None:
                small = thumbnail(pixels, self.sink.thumbnails)
                record["thumbnail"], _ = self._name("thumbnails", index, row["key"], small, "jpg")
                put((record["thumbnail"], small))
        return record

    def _intermediates(self, row: dict[str, Any], index: int, put: Put) -> list[dict[str, Any]]:
        kept = []
        for step in row["intermediates"] or ():
            files = {
                "latents": (save_safetensors({"latents": unpack(step["latents"])}), "safetensors"),
                "preview": (encode(unpack(step["preview"]), "png"), "png"),
            }
            for kind, (body, extension) in files.items():
                uri, sha256 = self._name("intermediates", index, f"{row['key']}-{step['step']:04d}", body, extension)
                put((uri, body))
                kept.append({"step": step["step"], "kind": kind, "uri": uri, "sha256": sha256, "num_bytes": len(body)})
        return kept

    def _one_file(self, pictures: list[Picture], passed: list[pa.Field], index: int, put: Put) -> None:
        """Put the shard's pictures as one file, and tell each row where in it its own is."""
        if not pictures or self.layout not in ("webdataset", "parquet"):
            return
        data, members = shard_file.write(self.layout, pictures, passed)
        uri, _ = content_name(f"data/{index:06d}", data, shard_file.EXTENSIONS[self.layout])
        put((uri, data))
        for picture, member in zip(pictures, members, strict=True):
            picture.row["uri"] = f"{uri}#{member}"

    def _latents(self, rows: list[dict[str, Any]], records: list[dict[str, Any]], index: int, put: Put) -> None:
        """Put the shard's latents, a file per shape, and tell each record where its own are."""
        if not isinstance(self.encoder, LatentsHead):
            return
        shapes: dict[tuple[int, ...], list[tuple[dict[str, Any], NDArray[Any]]]] = {}
        for row, record in zip(rows, records, strict=True):
            if row["status"] == "ok" and row["latents_data"] is not None:
                latents = row["latents_data"]
                shapes.setdefault(latents.shape, []).append((record, latents))
        for (channels, height, width), members in sorted(shapes.items()):
            head = replace(self.encoder, shape=(channels, height, width), dtype=members[0][1].dtype.name)
            data = write_latents(
                self.sink.latents_format, head, [record for record, _ in members], [latents for _, latents in members]
            )
            uri, _ = self._name("data", index, f"{width}x{height}", data, self.sink.latents_format)
            put((uri, data))
            for i, (record, latents) in enumerate(members):
                body = latents.tobytes()
                record |= {
                    "uri": uri,
                    "latents_row": i,
                    "latents_shape": list(latents.shape),
                    "sha256": hashlib.sha256(body).hexdigest(),
                    "num_bytes": len(body),
                    "format": "latents",
                }

    def _embeddings(self, rows: list[dict[str, Any]], records: list[dict[str, Any]], index: int, put: Put) -> None:
        """Put the shard's text embeddings, one file, and tell each record where its own is."""
        made = [(row, record) for row, record in zip(rows, records, strict=True) if row["embeds_data"] is not None]
        if not isinstance(self.encoder, EmbeddingsHead) or not made:
            return
        arrays = [(row["embeds_data"], row["pooled_data"]) for row, _ in made]
        embeds, pooled = arrays[0]
        head = replace(self.encoder, width=embeds.shape[1], pooled_width=0 if pooled is None else len(pooled))
        data = write_embeddings(head, [record for _, record in made], arrays)
        uri, _ = self._name("data", index, "embeddings", data, "parquet")
        put((uri, data))
        for i, ((_, record), both) in enumerate(zip(made, arrays, strict=True)):
            body = b"".join(array.tobytes() for array in both if array is not None)
            record |= {
                "uri": uri,
                "embeddings_row": i,
                "sha256": hashlib.sha256(body).hexdigest(),
                "num_bytes": len(body),
                "format": "embeddings",
            }

    @property
    def _extension(self) -> str:
        return EXTENSIONS[self.sink.format]

    def _encode(self, pixels: NDArray[np.uint8], record: dict[str, Any]) -> bytes:
        height, width = pixels.shape[:2]
        text = describe(record, width, height) if self.sink.embed_metadata != "none" else None
        data = encode(pixels, self.sink.format, self.sink.quality, text, self.sink.png_encoder)
        return self.sign(data, MIME_TYPES[self.sink.format]) if self.sign is not None else data

    def _name(self, folder: str, index: int, stem: str, data: bytes, extension: str) -> tuple[str, str]:
        return content_name(f"{folder}/{index:06d}/{stem}", data, extension)

    def _passed(self, shard: pa.Table) -> list[pa.Field]:
        """The table's own columns."""
        own = set(manifest.SCHEMA.names) | _INTERNAL | {field.name for field in RESULT_FIELDS}
        return [field for field in shard.schema if field.name not in own]

    def _table(self, shard: pa.Table, records: list[dict[str, Any]], passed: list[pa.Field]) -> pa.Table:
        columns = {
            **{f.name: pa.array([record.get(f.name) for record in records], f.type) for f in manifest.SCHEMA},
            **{f.name: shard[f.name] for f in passed},
        }
        return pa.Table.from_pydict(columns, schema=pa.schema([*manifest.SCHEMA, *passed]))
