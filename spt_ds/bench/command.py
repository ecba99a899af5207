"""`spt-ds bench`: a training step at a given shape, ours beside a naive twin, in one run.

Each case runs in a process of its own, so that its peak memory is its own. On a CPU the cost is CPU seconds of the
process, on a GPU milliseconds between synchronisations. FLOPs are counted as 4N per token (frozen weights: forward and
the gradient of activations, none of weights), attention left out. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from spt_ds.errors import SptError

CASES = ("naive", "prefix", "suffix")
RATIOS = (("cost", "times less"), ("peak_mib", "times less memory"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases one after another and print a table and a JSON line."""
    args = _arguments(argv)
    context = multiprocessing.get_context("spawn")
    results = []
    for case in args.cases.split(","):
        if case not in CASES:
            raise SystemExit(f"spt-ds bench: unknown case {case!r}; there are {', '.join(CASES)}")
        for prompts in _numbers(args.prompts):
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(case, prompts, args, send))
            process.start()
            send.close()
            try:
                result = receive.recv()
            except EOFError:
                process.join()
                result = {"case": case, "prompts": prompts, "error": f"ended with exit code {process.exitcode}"}
            process.join()
            results.append(result)
            print(_row(result), flush=True)
    report: dict[str, Any] = {
        "command": "spt-ds bench " + " ".join(sys.argv[2:] if argv is None else argv),
        "results": results,
    }
    report |= {"ratios": _ratios(results), "machine": platform.processor() or platform.machine()}
    print(json.dumps(report))
    return int(any("error" in result for result in results))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="spt-ds bench", description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="opt-125m", help="tiny, opt-125m, opt-1.3b, llama-7b, llama-70b")
    parser.add_argument("--cases", default="naive,prefix,suffix", help="comma-separated; naive is the reference's way")
    parser.add_argument("--prompts", default="4", help="K; comma-separated for several")
    parser.add_argument("--tokens", type=int, default=8, help="P")
    parser.add_argument("--batch", type=int, default=4, help="examples of the micro-batch")
    parser.add_argument("--bits", type=int, default=32, choices=[16, 32])
    parser.add_argument("--steps", type=int, default=3, help="measured steps after one to warm up; the median counts")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--data", default="embedded:train", help="dialogues whose lengths are used")
    parser.add_argument(
        "--tokenizer", default="embedded", help="folder or hub id of the tokenizer that makes the lengths"
    )
    parser.add_argument("--max-tokens", type=int, default=512, help="longest text; the naive twin pads to it")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--checkpointing", default="off", choices=["off", "non_reentrant", "reentrant"])
    return parser.parse_args(argv)


def _child(case: str, prompts: int, args: argparse.Namespace, send: Any) -> None:
    try:
        send.send(measure(case, prompts, args))
    except SptError as error:
        send.send({"case": case, "prompts": prompts, "error": str(error)})


def measure(case: str, prompts: int, args: argparse.Namespace) -> dict[str, Any]:
    """Losses, gradient norms, cost and peak memory of one case."""
    import torch

    from spt_ds.bench.naive import naive_loss
    from spt_ds.bench.shapes import build, micro_batch
    from spt_ds.config.load import load_config
    from spt_ds.model.spt import Counts

    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    overrides = [f"prompts.count={prompts}", f"prompts.tokens={args.tokens}", f"model.base_bits={args.bits}"]
    overrides += [
        f"prompts.placement={'suffix' if case == 'suffix' else 'prefix'}",
        f"model.attention={args.attention}",
    ]
    overrides += [f"model.activation_checkpointing={args.checkpointing}", "losses.contrastive=0"]
    config = load_config("demo", overrides)
    backbone, spt = build(args.shape, config, device)
    batch = micro_batch(args.data, args.tokenizer, args.batch, backbone.vocabulary, args.max_tokens)
    counts = Counts(len(batch), len(batch.response_ids))

    def step() -> torch.Tensor:
        if case == "naive":
            loss = naive_loss(backbone, spt, batch, args.max_tokens, recompute=True)
        else:
            loss = backbone(spt.micro_losses, batch, counts).total
        spt.trainables.zero_grad()
        loss.backward()
        return loss.detach()

    before = peak_bytes(device)
    costs, loss = timed(step, device, args.steps)
    unit = "CPU s" if device.type == "cpu" else "s"
    lens = batch.context_lens, batch.response_lens
    weights = sum(p.numel() for name, p in backbone.named_parameters() if "embed" not in name)
    tokens = _tokens(case, *lens, prompts, args)
    cost = statistics.median(costs)
    return {
        "case": case, "prompts": prompts, "loss": float(loss), "cost": cost, "cost_unit": unit,
        "peak_mib": peak_bytes(device) / 2**20, "before_mib": before / 2**20, "tokens_read": tokens,
        "real_share": 1.0 if case != "naive" else _real(*lens, prompts, args) / tokens,
        "tflops": 4 * weights * tokens / 1e12, "tokens_per_cost": tokens / cost,
        "gradient": {n: float(p.grad.norm()) for n, p in spt.trainables.named_parameters() if p.grad is not None},
    }  # fmt: skip


def timed(step: Callable[[], Any], device: Any, steps: int) -> tuple[list[float], Any]:
    """Costs of `steps` calls after one warm-up: CPU seconds, or seconds between synchronisations on a GPU."""
    import torch

    gpu = device.type == "cuda"
    clock = time.perf_counter if gpu else time.process_time
    out, costs = step(), []
    for _ in range(steps):
        if gpu:
            torch.cuda.synchronize()
        start = clock()
        out = step()
        if gpu:
            torch.cuda.synchronize()
        costs.append(clock() - start)
    return costs, out


def peak_bytes(device: Any) -> int:
    """Largest memory so far: of the allocator on a GPU, resident on a CPU (Linux reports KiB)."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _real(contexts: tuple[int, ...], responses: tuple[int, ...], prompts: int, args: argparse.Namespace) -> int:
    return prompts * sum(args.tokens + c + r for c, r in zip(contexts, responses, strict=True))


def _tokens(case: str, contexts: tuple[int, ...], responses: tuple[int, ...], prompts: int, args: Any) -> int:
    """Positions that the base's layers see in one forward pass."""
    if case == "naive":
        return prompts * args.batch * (args.tokens + args.max_tokens)
    last = len(responses)  # the last target of each row is never read
    if case == "prefix":
        return _real(contexts, responses, prompts, args) - prompts * last
    return sum(contexts) + prompts * (sum(args.tokens + r for r in responses) - last)


def _ratios(results: list[dict[str, Any]]) -> dict[str, float]:
    good = [result for result in results if "error" not in result]
    naive = {result["prompts"]: result for result in good if result["case"] == "naive"}
    out = {}
    for result in good:
        base = naive.get(result["prompts"])
        if base is not None and result is not base:
            for key, text in RATIOS:
                out[f"{result['case']} K={result['prompts']}: {text}"] = round(base[key] / result[key], 2)
    return out


def _row(result: dict[str, Any]) -> str:
    if "error" in result:
        return f"{result['case']:<7} K={result['prompts']}  {result['error']}"
    cost = f"{result['cost']:9.3f} {result['cost_unit']}"
    return (
        f"{result['case']:<7} K={result['prompts']}  loss {result['loss']:.6f}  {cost}"
        f"  peak {result['peak_mib']:8.0f} MiB  {result['tokens_read']:6d} tokens read  real {result['real_share']:.0%}"
    )


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]
