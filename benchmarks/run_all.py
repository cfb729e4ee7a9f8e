"""Every figure of speed that this machine can measure, the peers' in the same runs, as one table and as JSON.

    python -m benchmarks.run_all [FIGURE …] [--json speed.json] [--quick]

Each figure is a script of its own, which says what is measured; they run one after the other, as nothing else may run
beside them. `--quick` takes a third of the rounds. Figures of a GPU are left out where there is none.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Lines = list[dict[str, Any]]
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Found:
    """What a script said: our figure, its peer's, how many times better, and whether that is enough."""

    figure: str
    peer: str
    ratio: str
    reached: bool


@dataclass(frozen=True)
class Figure:
    """One line of the table; `limit` is what nothing can go beyond."""

    number: str
    what: str
    command: tuple[str, ...]
    rounds: int
    read: Callable[[Lines], Found]
    bar: str
    limit: str


def line_with(lines: Lines, name: str) -> dict[str, Any]:
    return next(line for line in reversed(lines) if name in line)


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def busy(bar: float) -> Callable[[Lines], Found]:
    def read(lines: Lines) -> Found:
        found = line_with(lines, "busy")
        ours, peer = median(found["busy"]), median(found["ray_defaults"])
        return Found(f"{ours:.1%}", f"{peer:.1%}", f"{(1 - peer) / max(1e-4, 1 - ours):.1f} × less idle", ours >= bar)

    return read


def sink(lines: Lines) -> Found:
    ratios = line_with(lines, "ray, fpng")["ray, fpng"]["rate_over_peer"]
    rounds = [line for line in lines if "ray, peer" in line]
    ours, peer = (median([line[name] for line in rounds]) for name in ("ray, fpng", "ray, peer"))
    return Found(f"{ours:.0f} pictures/s", f"{peer:.1f} pictures/s", f"{ratios[1]:.1f} ×", ratios[1] >= 12)


def object_store(lines: Lines) -> Found:
    [ratios] = [line[name] for line in lines for name in line if name == "ray, fpng over ray, write_images"]
    rounds = [line for line in lines if "ray, fpng" in line]
    ours, peer = (median([line[name] for line in rounds]) for name in ("ray, fpng", "ray, write_images"))
    beside = max(line["requests beside pictures, a shard"] for line in rounds)
    enough = ratios[1] >= 20 and beside <= 1
    return Found(
        f"{ours:.0f} pictures/s, {beside:.2g} requests a shard beside theirs",
        f"{peer:.1f} pictures/s",
        f"{ratios[1]:.1f} ×",
        enough,
    )


def mixed_table(lines: Lines) -> Found:
    found = line_with(lines, "bars")
    enough = found["useful"] >= 0.95 and found["fewer_calls"] >= 3
    return Found(f"{found['useful']:.1%}", "", f"{found['fewer_calls']:.1f} × fewer calls", enough)


def text(lines: Lines) -> Found:
    found = line_with(lines, "encoded_rows")
    enough = found["encoded_rows"] <= found["bar"] and found["same_bits_as_alone"] and found["same_bits_as_peer"]
    ours, peer = found["encoded_rows"], found["peer_encoded_rows"]
    return Found(f"{ours} rows", f"{peer} rows", f"{peer / ours:.1f} × fewer", enough)


def generation(lines: Lines) -> Found:
    rounds = [line for line in lines if "bare" in line]
    ratio = line_with(lines, "median_ratio")["median_ratio"]
    ours, peer = (median([line[name] for line in rounds]) for name in ("job", "bare"))
    return Found(f"{ours:.1f} pictures/s", f"{peer:.1f} pictures/s", f"{ratio:.2f} ×", ratio >= 0.95)


def script(table: str, bar: float) -> Callable[[Lines], Found]:
    def read(lines: Lines) -> Found:
        mine = [line for line in lines if line.get("table") == table]
        rounds = [line for line in mine if "job" in line]
        ratio = line_with(mine, "median_ratio")["median_ratio"]
        ours, peer = (median([line[name] for line in rounds]) for name in ("job", "script"))
        return Found(f"{ours:.1f} pictures/s", f"{peer:.1f} pictures/s", f"{ratio:.2f} ×", ratio >= bar)

    return read


def scale_out(lines: Lines) -> Found:
    found = line_with(lines, "linear")
    one, eight = found["batches_per_s"]
    peer = f"{found['ray_defaults_linear']:.3f} linear"
    return Found(f"{one:g} → {eight:g} batches/s", peer, f"{found['linear']:.3f} linear", found["linear"] >= 0.97)


def million(lines: Lines) -> Found:
    found = line_with(lines, "driver_mb")
    held = found["driver_mb"]
    enough = found["rows_per_s"] >= 5000 and held["most"] <= 1500 and held["end"] <= 1.1 * held["tenth"]
    return Found(
        f"{found['rows_per_s']} rows/s", "", f"{held['tenth']} → {held['end']} MB, most {held['most']}", enough
    )


def shards(lines: Lines) -> Found:
    found = line_with(lines, "shards_per_s")
    each = f"{found['driver_cpu_ms_per_shard']} ms of the driver"
    return Found(f"{found['shards_per_s']} shards/s", "", each, found["shards_per_s"] >= 60)


def pool(lines: Lines) -> Found:
    found = line_with(lines, "all_s")
    return Found(f"{found['all_s']} s", f"{found['one_s']} s for one", f"{found['ratio']:.2f} ×", found["ratio"] <= 1.2)


def on_gpu(number: int) -> Callable[[Lines], Found]:
    def read(lines: Lines) -> Found:
        mine = [line for line in lines if line.get("figure") == number]
        ours = ", ".join(f"{line['ours']} {line['images_per_s']:.3g}" for line in mine)
        peers = max(rate for line in mine for rate in line["peers_images_per_s"].values())
        ratios = ", ".join(" and ".join(f"{ratio:.2f} ×" for ratio in line["ratios"]) for line in mine)
        # Of each case one of ours has to: as it is, or compiled.
        cases = {line["case"]: False for line in mine}
        for line in mine:
            cases[line["case"]] |= line["reached"]
        return Found(f"{ours} images/s", f"{peers:.3g} images/s", ratios, all(cases.values()))

    return read


STORE = ("object_store", "--pictures", "512")

FIGURES = (
    Figure("1a", "device that sleeps 50 ms a batch: busy", ("handover", "busy-50"), 2, busy(0.97), "97 %", "100 %"),
    Figure("1b", "the same, 250 ms", ("handover", "busy-250"), 2, busy(0.995), "99.5 %", "100 %"),
    Figure("2", "PNG files of 512 px", ("sink",), 3, sink, "12 ×", "disk"),
    Figure("3", "object store 30 ms away", STORE, 3, object_store, "20 ×, 1 a shard", "server"),
    Figure("4", "mixed table: useful work", ("mixed_table",), 0, mixed_table, "95 %, 3 ×", "100 %"),
    Figure("5", "text encoder, prompts 10 times each", ("text",), 0, text, "distinct + 1", ""),
    Figure("6a", "whole job against a bare loop", ("generation",), 3, generation, "0.95 ×", ""),
    Figure("6b", "against a Ray Data script, rows alike", ("ray_script",), 3, script("uniform", 1.0), "1.0 ×", ""),
    Figure("6c", "the same, a mixed table", ("ray_script",), 3, script("mixed", 2.0), "2.0 ×", ""),
    Figure("7", "8 workers against one", ("handover", "scale-out"), 0, scale_out, "0.97 linear", "1"),
    Figure("8", "1,000,000 rows", ("handover", "million"), 0, million, "5,000/s, flat, 1.5 GB", ""),
    Figure("9", "shards through one driver", ("handover", "shards"), 0, shards, "60/s", ""),
    Figure("start", "two workers against one: loaded", ("pool",), 3, pool, "1.2 ×", "1"),
    *(
        Figure(str(number), what, ("gpu", "--figures", "--only", str(number)), 3, on_gpu(number), bar, limit)
        for number, what, bar, limit in (
            (10, "SDXL 1024 px to PNG", "2.0 ×, 1.4/s; 2.2 × a Ray script: not measured", "2.81/s"),
            (11, "SD 1.5 512 px, 50 steps", "3.5 and 1.6 ×, 3.8/s", "9.5/s"),
            (12, "few steps 512 px to PNG", "6 ×, 60/s, GPU busy 90 %", "138 to 235/s"),
            (13, "encode 256 and 512 px", "1.5 ×, 1000 and 270/s; 2 × Ray defaults: not measured", "2,760 and 699/s"),
            (14, "SD x4 128 → 512 px", "2 ×", "16.3/s"),
        )
    ),
)


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def machine() -> str:
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    cpu = names[0] if names else platform.processor()
    return f"{os.cpu_count()} × {cpu}, {gpu}; Python {platform.python_version()}, torch {torch.__version__}"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def output_of(command: tuple[str, ...], rounds: int) -> Lines:
    """The JSON lines that a script prints; it may end with an error where a bar of its own is missed."""
    more = ("--rounds", str(rounds)) if rounds else ()
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{command[0]}", *command[1:], *more],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="*", help=", ".join(figure.number for figure in FIGURES))
    parser.add_argument("--json", type=Path, default=Path("speed.json"))
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    chosen = [figure for figure in FIGURES if not args.figures or figure.number in args.figures]
    heard: dict[tuple[str, ...], Lines] = {}
    results: list[dict[str, Any]] = []
    print(f"{machine()}\n\n| # | figure | here | peer | ratio | bar | limit | |\n|---|---|---|---|---|---|---|---|")
    gpu = has_gpu()
    for figure in chosen:
        said = {name: value for name, value in asdict(figure).items() if name not in ("read", "rounds")}
        try:
            if figure.command[0] == "gpu" and not gpu:
                raise RuntimeError("no GPU here")
            if figure.command not in heard:
                rounds = max(1, figure.rounds // 3) if args.quick and figure.rounds else figure.rounds
                heard[figure.command] = output_of(figure.command, rounds)
            found = figure.read(heard[figure.command])
        except (RuntimeError, StopIteration, KeyError, TypeError, ValueError) as error:
            reason = str(error) or type(error).__name__
            results.append(said | {"unmeasured": reason})
            print(f"| {figure.number} | {figure.what} | unmeasured: {reason} | | | {figure.bar} | {figure.limit} | |")
            continue
        results.append(said | asdict(found) | {"lines": heard[figure.command]})
        verdict = "reached" if found.reached else "**missed**"
        cells = (figure.number, figure.what, found.figure, found.peer, found.ratio, figure.bar, figure.limit, verdict)
        print("| " + " | ".join(cells) + " |", flush=True)
    value = {"machine": machine(), "at": datetime.now(UTC).isoformat(timespec="seconds"), "figures": results}
    args.json.write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main()
