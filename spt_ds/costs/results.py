"""What the results of `spt-ds bench` tell together: ratios to the naive twin, and agreement."""

from __future__ import annotations

import os
import platform
from typing import Any

ARRAYS = ("tokens", "gradient")  # compared, not printed
# Key of a result, and what the naive twin's over ours is called.
RATIOS = {
    "cost": "times less",
    "peak_mib": "times less memory",
    "row_steps": "times fewer row-steps",
}


def without_arrays(result: dict[str, Any]) -> dict[str, Any]:
    """A result without what is too large to print."""
    return {key: value for key, value in result.items() if key not in ARRAYS}


def _pairs(results: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(name, naive, other) for each good result beside the naive one of as many prompts."""
    good = [result for result in results if "error" not in result]
    naive = {result["prompts"]: result for result in good if result["case"] == "naive"}
    return [
        (f"{result['case']} K={result['prompts']}", naive[result["prompts"]], result)
        for result in good
        if result["case"] != "naive" and result["prompts"] in naive
    ]


def ratios(results: list[dict[str, Any]]) -> dict[str, float]:
    """How many times less each result costs than the naive one of as many prompts."""
    return {
        f"{name}: {text}": round(naive[key] / ours[key], 2)
        for name, naive, ours in _pairs(results)
        for key, text in RATIOS.items()
        if key in ours
    }


def agreement(results: list[dict[str, Any]]) -> dict[str, Any]:
    """How far each result agrees with the naive twin's and with float64.

    For decoding it is whether the tokens are the same, for a step the relative gaps of loss and
    gradient.
    """
    out: dict[str, Any] = {}
    for name, naive, ours in _pairs(results):
        if "tokens" in ours:
            out[name] = ours["tokens"] == naive["tokens"]
        elif ours["case"] in ("prefix", "compiled", "ours"):  # suffix is another function
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
    """Relative gaps of the loss and of the gradient, the latter as norm of difference over norm."""
    import numpy as np

    loss = abs(result["loss"] - right["loss"]) / abs(right["loss"])
    gradient = np.linalg.norm(result["gradient"] - right["gradient"]) / np.linalg.norm(
        right["gradient"]
    )
    return {"loss": float(f"{loss:.2e}"), "gradient": float(f"{gradient:.2e}")}


def machine() -> dict[str, Any]:
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


def row(result: dict[str, Any]) -> str:
    """One result as a line for the screen."""
    name = f"{result['case']:<7} K={result['prompts']}"
    if "error" in result:
        return f"{name}  {result['error']}"
    parts = [f"{result['cost']:9.3f} {result['cost_unit']}", f"peak {result['peak_mib']:7.0f} MiB"]
    if "share_of_one_more" in result:
        parts.append(f"one prompt more costs {result['share_of_one_more']:.1%} of a step")
    for objective, share in result.get("share_of_paper", {}).items():
        parts.append(f"{objective} {share:.3f} of the paper's step")
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
