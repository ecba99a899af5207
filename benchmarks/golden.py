"""Checks the `reference` recipe against numbers measured from the public SPT reference.

    python benchmarks/golden.py tests/data/golden_opt_tiny_k3

FOLDER holds config.json, opt_weights.npz, spt_weights.npz and golden.npz; K, P, D, B and the number
of layers are free. Losses must agree within 1e-5 and gradients within 1e-6 in fp32, both within
1e-12 in fp64. The last line is one JSON object with the largest differences; the exit code is 1
when a limit is passed.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from spt_ds.api import load
from spt_ds.batch import Batch, Contrast
from spt_ds.config.load import load_config
from spt_ds.model.attention import PACKED
from spt_ds.model.backbone import Backbone
from spt_ds.model.conversation import Endings
from spt_ds.model.decode import decode
from spt_ds.model.prompt_bank import PromptBank
from spt_ds.model.reference import functions_of, jumping_softplus
from spt_ds.model.retriever import Retriever
from spt_ds.model.spt import Spt, Trainables

LIMITS = {torch.float32: (1e-5, 1e-6), torch.float64: (1e-12, 1e-12)}
NEVER = 10_000  # no token of a case: the golden replies go on to the limit
GRADS = {"prompt": "bank.weight", "W": "retriever.context.weight", "b": "retriever.context.bias"}


def load_case(
    folder: Path, dtype: torch.dtype, backend: str = "sdpa"
) -> tuple[Backbone, Spt, Batch, dict[str, Any]]:
    """Return backbone, method, micro-batch and golden arrays of one case."""
    golden = dict(np.load(folder / "golden.npz"))
    base = AutoConfig.from_pretrained(folder)
    lm = AutoModelForCausalLM.from_config(base, dtype=torch.float32, attn_implementation=PACKED)
    weights = {
        name: torch.from_numpy(array) for name, array in np.load(folder / "opt_weights.npz").items()
    }
    missing, unexpected = lm.load_state_dict(weights, strict=False)
    if set(missing) - {"lm_head.weight"} or unexpected:
        raise SystemExit(f"{folder}: weights do not fit the configuration: {missing} {unexpected}")
    lm.tie_weights()
    backbone = Backbone(lm.to(dtype), backend)
    spt_weights = {
        name: torch.from_numpy(array) for name, array in np.load(folder / "spt_weights.npz").items()
    }
    retriever = Retriever(base.hidden_size, shared=True, activation=jumping_softplus)
    trainables = Trainables(PromptBank(spt_weights["prompts"].clone()), retriever)
    with torch.no_grad():
        retriever.context.weight.copy_(spt_weights["W"])
        retriever.context.bias.copy_(spt_weights["b"])
    length = golden["input_ids"].shape[1]
    config = load_config("reference", [f"reference.pool_length_tokens={length}"])
    return (
        backbone,
        Spt(config, trainables.to(dtype), functions_of(config.reference, base.pad_token_id)),
        _batch(golden, base.pad_token_id),
        golden,
    )


def _batch(golden: dict[str, Any], ignored: int) -> Batch:
    contexts, responses = [], []
    for ids, mask, target in zip(
        golden["input_ids"], golden["attention_mask"], golden["lm_target"], strict=True
    ):
        first = (
            int(np.nonzero(target != ignored)[0][0]) + 1
        )  # lm_target is shifted by one against the inputs
        contexts.append(ids[:first])
        responses.append(ids[first : int(mask.sum())])
    return Batch(
        np.concatenate(contexts),
        np.concatenate(responses),
        tuple(len(c) for c in contexts),
        tuple(len(r) for r in responses),
        tuple(range(len(contexts))),
        (1.0,) * len(contexts),
    )


def compute(backbone: Backbone, spt: Spt, batch: Batch, golden: dict[str, Any]) -> dict[str, Any]:
    """Return every loss and its gradients under golden's names."""
    size = len(batch)
    pairs = np.array([(i, j) for i in range(size) for j in range(i + 1, size)])
    dtype = {torch.float64: np.float64, torch.float32: np.float32}[spt.trainables.bank.weight.dtype]
    contrast = Contrast(
        tuple((0, b) for b in range(size)),
        pairs,
        golden["ctr_target"].astype(dtype),
        len(pairs),
    )
    out: dict[str, Any] = {}

    def record(name: str, loss: torch.Tensor) -> None:
        parameters = dict(spt.trainables.named_parameters())
        grads = torch.autograd.grad(
            loss, [parameters[p] for p in GRADS.values()], allow_unused=True
        )
        out[f"loss_{name}"] = loss.detach()
        for key, grad, parameter in zip(GRADS, grads, GRADS.values(), strict=True):
            out[f"g_{key}_{name}"] = (
                torch.zeros_like(parameters[parameter]) if grad is None else grad
            )

    def micro(weights: tuple[float, float]) -> Any:
        chosen = spt.config.losses.model_copy(
            update={"selection": weights[0], "fusion": weights[1]}
        )
        one = Spt(spt.config.model_copy(update={"losses": chosen}), spt.trainables, spt.functions)
        return backbone(one.micro_losses, batch, size, len(batch.response_ids))

    def contrastive() -> torch.Tensor:
        _, pooled, scores = backbone(spt.score, spt.pack(batch))
        return spt.contrastive(pooled, scores.detach()[None], contrast, 0)[0]

    plain = micro((0.0, 0.0))
    record("nll", plain.total)
    # The losses are linear in their weights: a weighted run minus the plain one leaves the single
    # loss.
    for name, weights in (("kl", (1.0, 0.0)), ("fusion", (0.0, 1.0))):
        record(name, micro(weights).total - micro((0.0, 0.0)).total)
    record("ctr", contrastive())
    full = spt.config.losses
    record("total", micro((full.selection, full.fusion)).total + full.contrastive * contrastive())
    out["nll_per_prompt"], out["sim_scores"] = plain.nll, plain.scores
    return out


def compare(folder: Path, dtype: torch.dtype, backend: str = "sdpa") -> dict[str, float]:
    """Return the largest absolute difference from the golden numbers per kind."""
    backbone, spt, batch, golden = load_case(folder, dtype, backend)
    suffix = "64" if dtype == torch.float64 else ""
    worst = {"loss": 0.0, "gradient": 0.0, "score": 0.0}
    for name, value in compute(backbone, spt, batch, golden).items():
        kind = (
            "gradient"
            if name.startswith("g_")
            else "loss"
            if name.startswith(("loss", "nll"))
            else "score"
        )
        gap = float(np.abs(value.double().numpy() - golden[name + suffix]).max())
        worst[kind] = max(worst[kind], gap)
    grid = jumping_softplus(torch.from_numpy(golden["act_x"])).numpy()
    worst["activation"] = float(np.abs(grid - golden["act_y"]).max())
    return worst


def write_base(folder: Path, out: Path) -> None:
    """Write the base of a case as a folder that a run can name."""
    lm = load_case(folder, torch.float32)[0].lm
    weights = {
        name: torch.from_numpy(array) for name, array in np.load(folder / "opt_weights.npz").items()
    }
    lm.config.save_pretrained(out)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(folder / name, out / name)


def infer(folder: Path, run: Path) -> float:
    """Decode the contexts of a case with a run that was imported over its base.

    Returns the largest difference of a score. SystemExit where the choice of a prompt or a token
    is another.
    """
    golden = dict(np.load(folder / "golden.npz"))
    real = golden["infer_attention_mask"].astype(bool)
    # The reference pools over the padding too.
    bot = load(run, reference__pool_length_tokens=real.shape[1], generate__max_new_tokens=8)
    session = bot._session
    contexts = [ids[mask] for ids, mask in zip(golden["infer_input_ids"], real, strict=True)]
    lens, count = tuple(map(len, contexts)), len(contexts)
    empty = np.zeros(0, dtype=np.int64)
    rows = Batch(
        np.concatenate(contexts), empty, lens, (0,) * count, tuple(range(count)), (1.0,) * count
    )
    endings = Endings((NEVER,), session.spt.functions.pool.pad_id)  # type: ignore[attr-defined]
    with torch.no_grad():
        out = session.backbone(decode, session.spt, rows, session.config.generate, endings, False)
    if out.chosen != golden["infer_selected"].tolist():
        raise SystemExit(f"{run}: other prompts: {out.chosen}, expected {golden['infer_selected']}")
    if out.tokens != golden["infer_tokens"].tolist():
        raise SystemExit(f"{run}: the prompts give other tokens than {folder}")
    return float(np.abs(out.scores.numpy() - golden["infer_sim_scores"]).max())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--backend", default="sdpa", choices=["sdpa", "eager"])
    parser.add_argument(
        "--run", type=Path, help="also decode with this run, imported from the case's checkpoint"
    )
    args = parser.parse_args()
    failed, result = False, {}
    for dtype, (loss_limit, gradient_limit) in LIMITS.items():
        worst = compare(args.folder, dtype, args.backend)
        name = str(dtype).removeprefix("torch.")
        result[name] = worst
        failed |= (
            max(worst["loss"], worst["score"]) > loss_limit or worst["gradient"] > gradient_limit
        )
        print(f"{name}: " + ", ".join(f"{kind} {gap:.2e}" for kind, gap in worst.items()))
    if args.run:
        gap = infer(args.folder, args.run)
        result["decoding"] = {"score": gap}
        failed |= gap > LIMITS[torch.float32][0]
        print(f"{args.run}: the same prompts and tokens, scores {gap:.2e}")
    print(
        json.dumps({"case": args.folder.name, "passed": not failed, "largest_difference": result})
    )
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
