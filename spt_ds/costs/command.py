"""`spt-ds bench`: what a piece of work costs at a given shape, beside a naive twin, in one run.

Each case runs in a process of its own, so that its peak memory is its own. On a CPU the cost is CPU
seconds of the process, on a GPU seconds between synchronisations. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from spt_ds.costs.results import agreement, machine, ratios, row, without_arrays
from spt_ds.errors import ConfigError, SptError
from spt_ds.log import say_loading
from spt_ds.run.command import run_command

SUBJECTS = {  # module in spt_ds.costs and function that measures
    # Its naive twin makes K passes, padded to one length, checkpointed, with all logits in fp32.
    "step": ("step", "measure"),
    "more": ("side_by_side", "measure_more"),  # one prompt more in the bank
    "objectives": ("side_by_side", "measure_objectives"),  # beside the paper's
    "load": ("load", "measure"),  # reading the base, proving it usable, tokenising
    "decode": ("decode", "measure"),  # naive: the whole batch once per distinct prompt
    "head": ("head", "measure"),  # naive: all vocabulary logits at once
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases one after another and print a table and a JSON line.

    The exit code is 1 when a case failed, 2 for a case that does not exist.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    return run_command(_parser(), given, lambda args: _measure_all(args, given))


def _measure_all(args: argparse.Namespace, given: Sequence[str]) -> int:
    say_loading()
    subject, _ = _subject(args)
    cases = (
        args.cases.split(",") if args.cases else list(getattr(subject, "DEFAULT", subject.CASES))
    )
    unknown = [case for case in cases if case not in subject.CASES]
    if unknown:
        raise ConfigError(f"no case {unknown[0]!r}; {args.subject} has {', '.join(subject.CASES)}")
    results = []
    for case in cases:
        for prompts in (int(part) for part in args.prompts.split(",")):
            result = _in_own_process(case, prompts, args)
            print(row(result), flush=True)
            results.append(result)
    report = {
        "command": " ".join(["spt-ds bench", *given]),
        "machine": machine(),
        "ratios": ratios(results),
        "same": agreement(results),
        "results": [without_arrays(result) for result in results],
    }
    print(json.dumps(report))
    return int(any("error" in result for result in results))


def _subject(args: argparse.Namespace) -> tuple[ModuleType, str]:
    module, function = SUBJECTS[args.subject]
    return importlib.import_module(f"spt_ds.costs.{module}"), function


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spt-ds bench", description=__doc__.split("\n")[0])
    parser.add_argument("subject", choices=SUBJECTS, help="what to measure")
    parser.add_argument(
        "--shape", default="opt-125m", help="tiny, opt-125m, opt-1.3b, llama-7b, llama-70b"
    )
    parser.add_argument(
        "--cases", help="comma-separated; default those of the subject, naive first"
    )
    parser.add_argument("--prompts", default="4", help="K; comma-separated for several")
    parser.add_argument("--tokens", type=int, default=8, help="P")
    parser.add_argument("--batch", type=int, default=4, help="examples")
    parser.add_argument("--bits", type=int, default=32, choices=[4, 8, 16, 32])
    parser.add_argument(
        "--base-matmul", default="base_bits", help="step: as model.base_matmul (default base_bits)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=3,
        help="measured calls after one to warm up; the median counts",
    )
    parser.add_argument(
        "--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice"
    )
    parser.add_argument("--data", default="embedded:train", help="dialogues whose lengths are used")
    parser.add_argument(
        "--tokenizer",
        default="embedded",
        help="folder or hub id of the tokenizer that makes the lengths",
    )
    parser.add_argument(
        "--max-tokens", type=int, default=512, help="longest text; the naive step pads to it"
    )
    parser.add_argument("--attention", default="auto", help="as model.attention")
    parser.add_argument(
        "--checkpointing", default="off", choices=["off", "non_reentrant", "reentrant"]
    )
    parser.add_argument("--examples", type=int, default=2000, help="load: dialogues to tokenise")
    parser.add_argument("--new-tokens", type=int, default=32, help="decode: tokens per reply")
    parser.add_argument(
        "--targets", type=int, default=128, help="head: target tokens of the micro-batch"
    )
    parser.add_argument(
        "--head-chunk-mib", type=int, default=128, help="head: as losses.head_chunk_mib"
    )
    return parser


def _in_own_process(case: str, prompts: int, args: argparse.Namespace) -> dict[str, Any]:
    # Not a fork, which would begin with the memory of this process and count it.
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(case, prompts, args, send))
    process.start()
    # Else this process holds the pipe open, and a child that dies is waited for without end.
    send.close()
    try:
        result: dict[str, Any] = receive.recv()
    except EOFError:
        process.join()
        result = {"error": f"ended with exit code {process.exitcode}"}
    process.join()
    return {"case": case, "prompts": prompts, **result}


def _child(case: str, prompts: int, args: argparse.Namespace, send: Any) -> None:
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        subject, function = _subject(args)
        send.send(getattr(subject, function)(case, prompts, args))
    except SptError as error:
        send.send({"error": str(error)})


if __name__ == "__main__":
    raise SystemExit(main())
