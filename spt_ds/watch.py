"""`spt-ds watch RUN`: a run in the terminal, redrawn once a second while it trains."""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from spt_ds.display import duration, printable
from spt_ds.errors import DataError
from spt_ds.log import show
from spt_ds.run.command import EXIT_DONE, run_command
from spt_ds.run.metrics_file import History, Line
from spt_ds.run.progress import Progress, RunWatch

EVERY_S = 1.0
BARS, PLAIN_BARS = "▁▂▃▄▅▆▇█", "_.-=+*%#"
LOSSES = ("loss", "nll", "nll_selected")
USAGE_LINES = 20  # newest lines whose prompt usage is summed
MOST_PROMPTS = 16
# Home, then each line cleared to its end, then all below: nothing flickers.
HOME, LINE_END, BELOW = "\x1b[H", "\x1b[K\n", "\x1b[J"
CLEAR = "\x1b[2J"


def main(argv: Sequence[str] | None = None) -> int:
    """Show a run until it ends; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="spt-ds watch",
        description="Show a run in the terminal: losses, prompt usage, speed, time left. It reads"
        " the run folder only, ends when the run does, and Ctrl-C ends it before.",
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument(
        "--once", action="store_true", help="print it once, as also where no terminal shows it"
    )
    return run_command(parser, argv, _watch)


def _watch(args: argparse.Namespace) -> int:
    if not (args.run / "config.yaml").is_file():
        raise DataError(f"{args.run}: no run folder (config.yaml is missing)")
    watch = RunWatch(args.run)
    if args.once or not sys.stdout.isatty():
        show("\n".join(page(watch.look(), watch.history, 80, bars())))
        return EXIT_DONE
    _terminal(CLEAR)
    try:
        while True:
            progress = watch.look()
            size = shutil.get_terminal_size()
            lines = page(progress, watch.history, size.columns, bars())[: size.lines - 1]
            # What the files hold is printable by then; only these codes steer the terminal.
            _terminal(HOME + "".join(printable(line) + LINE_END for line in lines) + BELOW)
            if progress.state != "training":
                return EXIT_DONE
            time.sleep(EVERY_S)
    except KeyboardInterrupt:
        return EXIT_DONE


def _terminal(text: str) -> None:
    """Write past the stream's own escaping, which would take the codes for a file's."""
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode(sys.stdout.encoding, "replace"))
    sys.stdout.buffer.flush()


def bars() -> str:
    """The characters of a small chart, lowest first, as the output's encoding has them."""
    try:
        BARS.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return PLAIN_BARS
    return BARS


def page(progress: Progress, history: History, columns: int, levels: str) -> list[str]:
    """The lines to show, none longer than `columns` characters."""
    total = "?" if progress.total_steps is None else progress.total_steps
    head = f"step {progress.step} of {total}"
    if progress.total_steps:
        head += f" ({100 * progress.step / progress.total_steps:.0f} %)"
    speed = "-" if progress.steps_per_s is None else f"{progress.steps_per_s:.3g}"
    lines = [
        f"{progress.state}: {progress.run}",
        head,
        f"{speed} steps/s, {duration(progress.left_s)} left,"
        f" last sign {duration(progress.age_s)} ago",
        "",
        *_losses(history, max(8, columns - 34), levels),
        *_validations(progress, history),
        *_usage(history, max(8, min(40, columns - 24)), levels),
    ]
    return [line[:columns] for line in lines]


def _losses(history: History, width: int, levels: str) -> list[str]:
    lines = []
    for name in LOSSES:
        values = numbers(history.steps, name)
        if values:
            lines.append(f"{name:<14} {values[-1]:>9.4f}  {sparkline(values, width, levels)}")
    return lines or ["no step is logged yet"]


def _validations(progress: Progress, history: History) -> list[str]:
    if not history.validations:
        return []
    last = history.validations[-1]
    known = [(name, numbers([last], name)) for name in LOSSES]
    text = ", ".join(f"{name} {values[0]:.4f}" for name, values in known if values)
    lines = ["", f"validation at step {last.step}: {text}"]
    if progress.best_nll is not None:
        lines.append(f"best nll_selected {progress.best_nll:.4f} at step {progress.best_step}")
    return lines


def _usage(history: History, width: int, levels: str) -> list[str]:
    """How often each prompt was chosen in the newest lines."""
    used: Counter[int] = Counter()
    for line in list(history.steps)[-USAGE_LINES:]:
        counts = line.values.get("prompt_usage")
        for prompt, count in enumerate(counts if isinstance(counts, list) else []):
            if isinstance(count, int | float) and math.isfinite(count):
                used[prompt] += max(0, int(count))
    total = sum(used.values())
    if not total:
        return []
    lines = ["", f"prompt usage, last {min(USAGE_LINES, len(history.steps))} logged steps"]
    for prompt, count in sorted(used.items())[:MOST_PROMPTS]:
        share = count / total
        lines.append(
            f"prompt {prompt:<5} {100 * share:>5.1f} %  {levels[-1] * round(share * width)}"
        )
    if len(used) > MOST_PROMPTS:
        lines.append(f"and {len(used) - MOST_PROMPTS} more prompts")
    return lines


def numbers(lines: Iterable[Line], name: str) -> list[float]:
    """The finite values of `name`, oldest first."""
    values = [line.values.get(name) for line in lines]
    return [v for v in values if isinstance(v, int | float) and math.isfinite(v)]


def sparkline(values: Sequence[float], width: int, levels: str) -> str:
    """The newest `width` values as one line of bars between their lowest and highest."""
    shown = values[-width:]
    low, high = min(shown), max(shown)
    span = (high - low) or 1.0
    last = len(levels) - 1
    return "".join(levels[round((value - low) / span * last)] for value in shown)
