"""How many schedules of the simulation break each protocol: ours, and those that look right.

    python -m benchmarks.schedules [10000]

"Broken" is what pyarrow and hashlib find: a row missing or twice, a file missing or torn.
"""

from __future__ import annotations

import sys
import time

from tests.faults.naive import PROTOCOLS
from tests.faults.simulation import Protocol, Violation, simulate


def is_broken(seed: int, protocol: Protocol) -> bool:
    try:
        simulate(seed, protocol)
    except Violation:
        return True
    return False


if __name__ == "__main__":
    num_schedules = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    for name, protocol in PROTOCOLS.items():
        start = time.process_time()
        broken = sum(is_broken(seed, protocol) for seed in range(num_schedules))
        print(
            f"{name:26} {broken:6} of {num_schedules} broken, {broken / num_schedules:.2%}, "
            f"{time.process_time() - start:.0f} s of CPU",
            flush=True,
        )
