"""Sign a picture with C2PA's content credentials (https://spec.c2pa.org): who made it, and that a model did."""

from __future__ import annotations

import importlib.util
import io
import json
from functools import cached_property
from pathlib import Path
from typing import Any

from pipelines.errors import JobError
from pipelines.job import Signing
from pipelines.version import version

TRAINED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


class Signer:
    """Callable on an encoded picture; returns it with a signed manifest inside. Holds paths, never a key.

    Each signature has an id and, for most algorithms, a nonce of its own: the bytes differ each time.
    """

    def __init__(self, signing: Signing) -> None:
        self.signing = signing

    def __call__(self, data: bytes, mime_type: str) -> bytes:
        """The signed picture.

        Raises:
            JobError: the package is missing, a file cannot be read, or certificate, key and algorithm do not fit.
        """
        if importlib.util.find_spec("c2pa") is None:
            raise JobError("sink.c2pa needs the package c2pa-python; pip install 'ldm-batch[c2pa]', or leave it out")
        import c2pa

        signed = io.BytesIO()
        try:
            with c2pa.Builder(self._claim, context=self._context) as builder:
                builder.sign(self._signer, mime_type, io.BytesIO(data), signed)
        except c2pa.C2paError as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise JobError(
                f"sink.c2pa: {self.signing.certificate} cannot sign ({reason}); give a certificate for signing with "
                "those above it, its own key (PKCS#8, without a passphrase), and the algorithm of that key"
            ) from None
        return signed.getvalue()

    def __getstate__(self) -> dict[str, Any]:
        return {"signing": self.signing}

    @cached_property
    def _signer(self) -> Any:
        import c2pa

        algorithm = c2pa.C2paSigningAlg[self.signing.algorithm.upper()]
        return c2pa.Signer.from_info(
            c2pa.C2paSignerInfo(
                algorithm,
                _read("certificate", self.signing.certificate),
                _read("private_key", self.signing.private_key),
                None,
            )
        )

    @cached_property
    def _context(self) -> Any:
        import c2pa

        # Its own thumbnail is of 1024 px whatever the picture's size: many times the bytes of a small picture.
        return c2pa.Context(settings=c2pa.Settings.from_dict({"builder": {"thumbnail": {"enabled": False}}}))

    @cached_property
    def _claim(self) -> str:
        action = {"action": "c2pa.created", "digitalSourceType": TRAINED}
        return json.dumps(
            {
                "claim_generator_info": [{"name": "ldm-batch", "version": version("ldm-batch")}],
                "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [action]}}],
            }
        )


def _read(field: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise JobError(f"sink.c2pa.{field}: {path} cannot be read ({error.strerror}); give a PEM file") from None
