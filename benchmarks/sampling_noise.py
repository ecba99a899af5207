"""CPU time of the noise of one sampled token: as a hash, and drawn by one generator a row.

    python benchmarks/sampling_noise.py [--rows 16] [--vocabulary 32000]

Both sides run in turns in one process, on one thread. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from spt_ds.rng import gumbel_noise, keyed_generator

TURNS = 20


def drawn(rows: int, vocabulary: int) -> Callable[[int], torch.Tensor]:
    """One generator a row, whose n-th draw belongs to the n-th token."""
    generators = [keyed_generator(0, "sample", row) for row in range(rows)]

    def noise(position: int) -> torch.Tensor:
        each = [torch.empty(vocabulary).exponential_(generator=one) for one in generators]
        return -torch.stack(each).log()

    return noise


def hashed(rows: int, vocabulary: int) -> Callable[[int], torch.Tensor]:
    """What `GumbelNoise` makes."""
    seeds = torch.arange(rows)
    return lambda position: gumbel_noise(seeds, position, vocabulary).float()


def main() -> None:
    """Print the median CPU time of each side and the operations of the hash."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sides = {"drawn": drawn(args.rows, args.vocabulary), "hash": hashed(args.rows, args.vocabulary)}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for position in range(TURNS):
        for name, noise in sides.items():
            begin = time.process_time()
            noise(position)
            times[name].append(1e3 * (time.process_time() - begin))
    found = {f"{name} ms": round(statistics.median(each), 2) for name, each in times.items()}
    for key, value in found.items():
        print(f"{key}: {value}")
    print(json.dumps({"rows": args.rows, "vocabulary": args.vocabulary, **found}))


if __name__ == "__main__":
    main()
