"""`spt-ds bench`: what a piece of work costs at a given shape, ours beside a naive twin, in one
run.

Each case runs in a process of its own, so that its peak memory is its own. On a CPU the cost is CPU
seconds of the process, on a GPU seconds between synchronisations. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import platform
import sys
from collections.abc import Sequence
from typing import Any

from spt_ds.errors import ConfigError, SptError
from spt_ds.run.command import run_command

SUBJECTS = {
    "step": (
        "spt_ds.bench.step"
    ),  # naive: K passes padded to one length, checkpointed, all logits in fp32
    "more": "spt_ds.bench.more",  # one prompt more in the bank
    "load": "spt_ds.bench.load",  # reading the base, proving it usable, tokenising
    "decode": "spt_ds.bench.decode",  # naive: the whole batch once per distinct prompt
    "head": "spt_ds.bench.head",  # naive: all vocabulary logits at once
}
BULKY = ("tokens", "gradient")  # compared, not printed
# Key of a result, and what the naive twin's over ours is called.
RATIOS = {
    "cost": "times less",
    "peak_mib": "times less memory",
    "row_steps": "times fewer row-steps",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases one after another and print a table and a JSON line; exit code 1 when one
    failed.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    return run_command(_parser(), given, lambda args: _measure_all(args, given))


def _measure_all(args: argparse.Namespace, given: Sequence[str]) -> int:
    subject = importlib.import_module(SUBJECTS[args.subject])
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
            print(_row(result), flush=True)
            results.append(result)
    report: dict[str, Any] = {"command": " ".join(["spt-ds bench", *given]), "machine": _machine()}
    report |= {"ratios": _ratios(results), "same": _same(results)}
    shown = [
        {key: value for key, value in result.items() if key not in BULKY} for result in results
    ]
    print(json.dumps({**report, "results": shown}))
    return int(any("error" in result for result in results))


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
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(case, prompts, args, send))
    process.start()
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
        send.send(importlib.import_module(SUBJECTS[args.subject]).measure(case, prompts, args))
    except SptError as error:
        send.send({"error": str(error)})


def _pairs(results: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(name, naive, other) for each good result beside the naive one of as many prompts."""
    good = [result for result in results if "error" not in result]
    naive = {result["prompts"]: result for result in good if result["case"] == "naive"}
    return [
        (f"{result['case']} K={result['prompts']}", naive[result["prompts"]], result)
        for result in good
        if result["case"] != "naive" and result["prompts"] in naive
    ]


def _ratios(results: list[dict[str, Any]]) -> dict[str, float]:
    return {
        f"{name}: {text}": round(naive[key] / ours[key], 2)
        for name, naive, ours in _pairs(results)
        for key, text in RATIOS.items()
        if key in ours
    }


def _same(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether the tokens are the naive twin's; how far losses and gradients lie from it and from
    float64, relative.
    """
    out: dict[str, Any] = {}
    for name, naive, ours in _pairs(results):
        if "tokens" in ours:
            out[name] = ours["tokens"] == naive["tokens"]
        elif ours["case"] in ("prefix", "ours"):  # another placement is another function
            out[name] = _gaps(ours, naive)
    precise = {
        result["prompts"]: result
        for result in results
        if result["case"] == "precise" and "loss" in result
    }
    for result in results:
        if (
            result["prompts"] in precise
            and result["case"] in ("naive", "prefix")
            and "loss" in result
        ):
            out[f"{result['case']} K={result['prompts']} to float64"] = _gaps(
                result, precise[result["prompts"]]
            )
    return out


def _gaps(result: dict[str, Any], right: dict[str, Any]) -> dict[str, float]:
    """Relative differences of the loss and of the gradient, the latter by norms."""
    import numpy as np

    loss = abs(result["loss"] - right["loss"]) / abs(right["loss"])
    gradient = np.linalg.norm(result["gradient"] - right["gradient"]) / np.linalg.norm(
        right["gradient"]
    )
    return {"loss": float(f"{loss:.2e}"), "gradient": float(f"{gradient:.2e}")}


def _machine() -> dict[str, Any]:
    """What the figures depend on: the device, threads, versions."""
    import torch
    import transformers

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _row(result: dict[str, Any]) -> str:
    name = f"{result['case']:<7} K={result['prompts']}"
    if "error" in result:
        return f"{name}  {result['error']}"
    parts = [f"{result['cost']:9.3f} {result['cost_unit']}", f"peak {result['peak_mib']:7.0f} MiB"]
    if "share_of_one_more" in result:
        parts.append(f"one prompt more costs {result['share_of_one_more']:.1%} of a step")
    if "per_cost" in result:
        parts.append(f"{result['per_cost']:.0f} {result['per_cost_unit']}")
    if "loss" in result:
        parts.append(f"loss {result['loss']:.6f}")
    if "tokens_read" in result:
        parts.append(f"{result['tokens_read']} tokens read, {result['real_share']:.0%} real")
    if "parts" in result:
        parts.append(", ".join(f"{part} {cost:.3f}" for part, cost in result["parts"].items()))
        parts.append(
            f"{result['tokens_per_cost']:.0f} real tokens/s, {result['examples_per_cost']:.2f}"
            " examples/s"
        )
        reached = f"{result['tflop_per_cost']:.3f} of {result['matmul_tflop_per_cost']:.3f} TFLOP/s"
        parts.append(f"{reached} ({result['share_of_matmul']:.0%} of matmul)")
    if "row_steps" in result:
        parts.append(
            f"{result['row_steps']} row-steps for {result['examples_times_tokens']} tokens"
        )
    return "  ".join([name, *parts])


if __name__ == "__main__":
    raise SystemExit(main())
