"""The vocabulary of `builtin:shapes`: a CLIP tokenizer in which each word of the caption grammar is one token."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import CLIPTokenizer

from ldm_ops.builtin.draw import BACKGROUNDS, COLORS, POSITIONS, SHAPES, SIZES

MAX_TOKENS = 32
START, END = "<|startoftext|>", "<|endoftext|>"


def grammar() -> list[str]:
    """Every word of a caption, longest first so that a short word's merges cannot cut a longer one."""
    words = {"a", "on", "background", *SIZES, *COLORS, *SHAPES, *BACKGROUNDS}
    words.update(word for phrase in POSITIONS for word in phrase.split())
    return sorted(words, key=lambda word: (-len(word), word))


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 byte values, which CLIP's tokenizer shares."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(rest))]


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write vocab.json and merges.txt into `folder` and load them again."""
    alphabet = byte_alphabet()
    pieces = alphabet + [letter + "</w>" for letter in alphabet]
    merges: list[str] = []
    for word in grammar():
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            merge = f"{symbols[0]} {symbols[1]}"
            symbols = [symbols[0] + symbols[1], *symbols[2:]]
            if merge not in merges:
                merges.append(merge)
                pieces.append(symbols[0])
    vocabulary = {piece: i for i, piece in enumerate([*dict.fromkeys(pieces), START, END])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS, pad_token=END)
    for word in grammar():
        if tokenizer.tokenize(word) != [word + "</w>"]:
            raise ValueError(f"{word!r} is not one token: {tokenizer.tokenize(word)}")
    tokenizer.save_pretrained(folder)
    return tokenizer
