"""An S3 server in memory that answers every request after the same time, and counts them: a store that is far away.

    python -m benchmarks.s3_server PORT DELAY_MS

It knows what an output and pyarrow's writer ask for, and checks no signature.
"""

from __future__ import annotations

import asyncio
import sys
import urllib.request
import uuid
from collections import Counter
from xml.sax.saxutils import escape

from aiohttp import web

COUNTS = "/_counts"


class Bucket:
    def __init__(self, delay_s: float) -> None:
        self.delay_s = delay_s
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.counts: Counter[str] = Counter()

    async def counted(self, _: web.Request) -> web.Response:
        """What was asked since the last time that somebody asked this."""
        counts, self.counts = self.counts, Counter()
        return web.json_response(counts)

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.read()
        await asyncio.sleep(self.delay_s)
        name, query = request.path, request.query
        kind = next((f" {word}" for word in ("uploads", "partNumber", "uploadId", "list-type") if word in query), "")
        self.counts[f"{request.method}{kind}"] += 1
        if "aws-chunked" in request.headers.get("Content-Encoding", ""):
            body = _unchunked(body)
        if kind == " uploads":
            upload = uuid.uuid4().hex
            self.uploads[upload] = {}
            return _xml("InitiateMultipartUploadResult", f"<UploadId>{upload}</UploadId>")
        if kind == " partNumber":
            self.uploads[query["uploadId"]][int(query["partNumber"])] = body
            return web.Response(headers={"ETag": '"part"'})
        if kind == " uploadId":
            parts = self.uploads.pop(query["uploadId"])
            self.objects[name] = b"".join(parts[n] for n in sorted(parts))
            return _xml("CompleteMultipartUploadResult", '<ETag>"whole"</ETag>')
        if kind == " list-type":
            return self._list(f"{name.rstrip('/')}/", query.get("prefix", ""))
        if request.method == "PUT":
            if "If-None-Match" in request.headers and name in self.objects:
                return web.Response(status=412)
            self.objects[name] = body
            return web.Response(headers={"ETag": '"whole"'})
        if request.method == "DELETE":
            self.objects.pop(name, None)
            return web.Response(status=204)
        if request.method == "HEAD" and name.count("/") == 1:
            return web.Response()
        if name not in self.objects:
            return web.Response(status=404)
        return web.Response(body=self.objects[name], headers={"ETag": '"whole"'})

    def _list(self, bucket: str, prefix: str) -> web.Response:
        found = [name for name in sorted(self.objects) if name.startswith(bucket + prefix)]
        entries = "".join(
            f"<Contents><Key>{escape(name[len(bucket) :])}</Key><Size>{len(self.objects[name])}</Size>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for name in found
        )
        return _xml("ListBucketResult", f"<KeyCount>{len(found)}</KeyCount><IsTruncated>false</IsTruncated>{entries}")


def _xml(name: str, body: str) -> web.Response:
    text = f'<?xml version="1.0"?><{name} xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{body}</{name}>'
    return web.Response(text=text, content_type="application/xml")


def _unchunked(body: bytes) -> bytes:
    """https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-streaming.html: size in hex, line, data, line."""
    pieces, at = [], 0
    while size := int(body[at : (end := body.index(b"\r\n", at))].partition(b";")[0], 16):
        pieces.append(body[end + 2 : end + 2 + size])
        at = end + 4 + size
    return b"".join(pieces)


def counts(url: str) -> dict[str, int]:
    """Requests by method and kind since the last call."""
    import json

    with urllib.request.urlopen(url + COUNTS, timeout=60) as reply:
        return dict(json.load(reply))


def main() -> None:
    port, delay_ms = int(sys.argv[1]), float(sys.argv[2])
    bucket = Bucket(delay_ms / 1000)
    app = web.Application(client_max_size=1 << 30)
    app.router.add_get(COUNTS, bucket.counted)
    app.router.add_route("*", "/{name:.*}", bucket.handle)
    web.run_app(app, host="127.0.0.1", port=port, print=lambda _: None, access_log=None)


if __name__ == "__main__":
    main()
