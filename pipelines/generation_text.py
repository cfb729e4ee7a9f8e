"""How a picture was made, written into its own file, and read back out of one.

PNG holds it as the text `parameters` that A1111's web UI began and most tools read; JPEG and WebP as the EXIF user
comment. An XMP packet says, in IPTC's words, that a trained model made the picture
(https://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from typing import Any

from PIL import Image

from ldm_ops.schedulers import scheduler_name

SAMPLERS = {
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "deis": "DEIS",
    "dpm++_2m": "DPM++ 2M",
    "dpm++_2m_sde": "DPM++ 2M SDE",
    "dpm++_2s": "DPM++ 2S",
    "dpm2": "DPM2",
    "dpm2_a": "DPM2 a",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "lcm": "LCM",
    "lms": "LMS",
    "pndm": "PLMS",
    "unipc": "UniPC",
}
"""Our names of samplers: theirs. `_karras` is their ` Karras`; a sampler that they have no name for keeps ours."""

ADAPTERS = {
    "vae": "VAE hash",
    "controlnet": "ControlNet hash",
    "textual_inversion": "TI hashes",
    "lora": "Lora hashes",
}
"""Kinds of adapters: how the text calls them. Hashes are the first 12 digits, with the scale where there is one."""

_FIELD = re.compile(r'\s*([A-Za-z][\w ./-]*):\s*("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')
_USER_COMMENT, _EXIF_IFD = 0x9286, 0x8769

MAX_EXIF_CHARS = 16_000
"""A JPEG segment has at most 64 KiB, and a character of UTF-16 up to four bytes."""

XMP = (
    b'<?xpacket begin="\xef\xbb\xbf" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    b'Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/>'
    b'</rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)


def describe(row: Mapping[str, Any], width: int, height: int) -> str:
    """The `parameters` text of a manifest row: prompt, negative prompt, then `Steps: 25, Sampler: Euler a, …`."""
    lines = [row["prompt"] or ""]
    if row["negative_prompt"]:
        lines.append(f"Negative prompt: {row['negative_prompt']}")
    fields = {
        "Steps": row["num_inference_steps"],
        "Sampler": _sampler(row["scheduler"]),
        "CFG scale": _number(row["guidance_scale"]),
        "Seed": row["seed"],
        "Size": f"{width}x{height}",
        "Model hash": row["model_revision"],
        "Denoising strength": _number(row["strength"]),
    }
    for kind, name in ADAPTERS.items():
        # By content: the same picture must not tell under which names its weights lay.
        said = [
            one["revision"][:12] + ("" if one["scale"] is None else f":{one['scale']:g}")
            for stage in (row.get("stages") or ())[:1]
            for one in stage["adapters"] or ()
            if one["kind"] == kind
        ]
        fields[name] = " ".join(said) or None
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in fields.items() if value is not None))
    return "\n".join(lines)


def _sampler(name: str | None) -> str | None:
    if name is None:
        return None
    plain = name.removesuffix("_karras")
    return SAMPLERS.get(plain, plain) + (" Karras" if name.endswith("_karras") else "")


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:g}"


def _quoted(value: Any) -> str:
    text = str(value)
    plain = not any(c in text for c in ',:"\n')
    return text if plain else '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ") + '"'


def parse(text: str) -> dict[str, Any]:
    """The row that a `parameters` text describes: prompt, and what else of our columns it names.

    Raises:
        ValueError: it is no such text.
    """
    *body, last = text.strip().split("\n")
    fields = {name.strip(): _unquoted(value) for name, value in _FIELD.findall(last)}
    if "Steps" not in fields and "Seed" not in fields:
        raise ValueError("no line with Steps and Seed")
    prompt, negative = body, []
    for i, line in enumerate(body):
        if line.startswith("Negative prompt:"):
            prompt, negative = body[:i], [line.removeprefix("Negative prompt:").strip(), *body[i + 1 :]]
            break
    row: dict[str, Any] = {"prompt": "\n".join(prompt).strip(), "negative_prompt": "\n".join(negative).strip()}
    plain = {
        "Steps": "num_inference_steps",
        "CFG scale": "guidance_scale",
        "Seed": "seed",
        "Denoising strength": "strength",
    }
    row |= {ours: fields[theirs] for theirs, ours in plain.items() if theirs in fields}
    if match := re.fullmatch(r"(\d+)x(\d+)", fields.get("Size", "")):
        row |= {"width": match[1], "height": match[2]}
    if sampler := fields.get("Sampler"):
        karras = "karras" in fields.get("Schedule type", "").lower() and "karras" not in sampler.lower()
        named = "pndm" if sampler.lower() == "plms" else sampler + (" Karras" if karras else "")
        with contextlib.suppress(ValueError):
            named = scheduler_name(named)
        row["scheduler"] = named
    return row


def _unquoted(value: str) -> str:
    value = value.strip()
    return re.sub(r"\\(.)", r"\1", value[1:-1]) if value.startswith('"') and value.endswith('"') else value


def read(image: Image.Image) -> str | None:
    """The `parameters` text that an opened image carries, None where there is none. Decodes no pixel."""
    text = image.info.get("parameters")
    if isinstance(text, str):
        return text
    comment = image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    if isinstance(comment, str):
        comment = comment.encode("latin-1", "replace")
    if not isinstance(comment, bytes):
        return None
    encoding = {b"UNICODE\0": "utf-16-be", b"ASCII\0\0\0": "ascii"}.get(comment[:8])
    return comment[8:].decode(encoding, "replace") if encoding else None


def exif(text: str) -> bytes:
    """An EXIF block whose user comment is `text`, cut where JPEG has no room for more."""
    text = text[:MAX_EXIF_CHARS]
    block = Image.Exif()
    block.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"UNICODE\0" + text.encode("utf-16-be")
    return block.tobytes()
