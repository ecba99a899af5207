"""`python -m tests.fuzz [CASES] [TARGET...]`: try CASES inputs and print what they gave.

Goes on over findings, names each, and ends with 1 where there is one.
"""

from __future__ import annotations

import sys
import traceback

from tests.fuzz.drawing import draw, replay
from tests.fuzz.targets import TARGETS


def main(words: list[str]) -> int:
    cases = int(words[0]) if words else 5000
    chosen = [TARGETS[name] for name in words[1:]] or list(TARGETS.values())
    total = sum(target.share for target in chosen)
    findings, inputs = 0, 0
    print("| target | inputs | values | refused | seconds |\n|---|---|---|---|---|")
    for number, target in enumerate(chosen):
        try:
            kept, drawn = replay(target), draw(target, round(cases * target.share / total), number)
        except Exception:
            findings += 1
            traceback.print_exc()
            continue
        outcomes = kept.outcomes + drawn.outcomes
        inputs += outcomes.total()
        values = outcomes.pop("value", 0)
        refused = ", ".join(f"{name} {count}" for name, count in sorted(outcomes.items())) or "0"
        row = [target.name, values + outcomes.total(), values, refused, f"{drawn.seconds:.0f}"]
        print("| " + " | ".join(map(str, row)) + " |", flush=True)
    print(f"{inputs} inputs, {findings} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
