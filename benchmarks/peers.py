"""Prompt tuning here and by PEFT on a real base: CPU time, memory and losses, all in one run.

    python benchmarks/real_base.py BASE
    python -m benchmarks.peers BASE [--examples 16] [--micro 8] [--bits 32] [--virtual 8]

Each row trains on the same examples in a process of its own, forward and backward. PEFT's rows are
a padded loop of one's own over batches sorted by length, the same over shuffled ones, the Trainer
of transformers (whose loss is a mean over batches), and for K prompts K passes, as PEFT applies one
prompt to a batch. The last two rows generate replies under four prompts: here in one batch, with
PEFT one batch for each prompt. "One by one" is prefix placement with `train.micro_batch: 1`, whose
K rows are as many as those of K padded examples in a pass of PEFT. Losses in prefix placement must
agree within 1e-4 where the base has 32 bits. The last line is one JSON object, the exit code is 1
where they do not.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spt_ds.batch import Batch
from spt_ds.config.load import load_config
from spt_ds.costs.meters import peak_bytes, reset_peak
from spt_ds.costs.random_bases import micro_batch
from spt_ds.model.backbone import Backbone, base_dtype, build_backbone
from spt_ds.model.conversation import Endings
from spt_ds.model.decode import decode
from spt_ds.model.loading import load_base_config
from spt_ds.model.reference import functions_of
from spt_ds.model.spt import Spt, build_trainables

CPU = torch.device("cpu")
NEW_TOKENS = 16
CLOSE = 1e-4
PEFT = ("peft sorted", "peft shuffled", "trainer")
CASES = (
    *((case, 1) for case in ("ours prefix", "ours suffix", *PEFT)),
    *((case, 4) for case in ("ours prefix", "one by one", "ours suffix", "peft sorted")),
    *((case, 4) for case in ("ours replies", "peft replies")),
)


def chosen(batch: Batch, rows: list[int]) -> Batch:
    """Some examples of a batch, in this order."""
    ends = np.cumsum(batch.context_lens), np.cumsum(batch.response_lens)
    contexts, responses = (
        [ids[end[row] - lens[row] : end[row]] for row in rows]
        for ids, end, lens in (
            (batch.context_ids, ends[0], batch.context_lens),
            (batch.response_ids, ends[1], batch.response_lens),
        )
    )
    return Batch(
        np.concatenate(contexts),
        np.concatenate(responses),
        tuple(map(len, contexts)),
        tuple(map(len, responses)),
        tuple(range(len(rows))),
        (1.0,) * len(rows),
    )


def micro_batches(batch: Batch, size: int, order: list[int]) -> Iterator[Batch]:
    """The examples of `batch` in `order`, so many at a time."""
    for start in range(0, len(order), size):
        yield chosen(batch, order[start : start + size])


def ours(args: argparse.Namespace, prompts: int, position: str) -> tuple[Backbone, Spt]:
    """The base and a bank whose prompts are those of `start`."""
    options = [
        *(f"model.base={args.base}", f"model.base_bits={args.bits}", f"prompts.count={prompts}"),
        *(f"prompts.tokens={args.virtual}", f"prompts.position={position}"),
        *("losses.selection=0", "losses.fusion=0", "losses.contrastive=0"),
    ]
    config = load_config("demo", options)
    base = load_base_config(config.model)
    backbone = build_backbone(config.model, base, CPU, strict=True)
    functions = functions_of(config.reference, 0)
    spt = Spt(config, build_trainables(config, backbone, functions, [], 0), functions)
    with torch.no_grad():
        spt.trainables.bank.weight.copy_(start(prompts, args.virtual, backbone.embed_size))
    return backbone, spt


def start(prompts: int, virtual: int, size: int) -> torch.Tensor:
    """The same prompts on every side, [K, P, D]."""
    return 0.1 * torch.randn(prompts, virtual, size, generator=torch.Generator().manual_seed(0))


def peft_model(args: argparse.Namespace) -> Any:
    """The base with one prompt of PEFT's."""
    from peft import PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(args.base, dtype=base_dtype(args.bits))
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=args.virtual)
    return get_peft_model(lm, settings)


def set_prompt(model: Any, prompt: torch.Tensor) -> None:
    """Let PEFT's model answer under this prompt."""
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(prompt)


def padded(batch: Batch, *, replies: bool = True, left: bool = False) -> dict[str, torch.Tensor]:
    """Token ids, mask and labels as PEFT's users make them; padding on the right or the left."""
    contexts = np.split(batch.context_ids, np.cumsum(batch.context_lens)[:-1])
    responses = np.split(batch.response_ids, np.cumsum(batch.response_lens)[:-1])
    rows = [
        (np.concatenate([c, r]), np.concatenate([np.full(len(c), -100), r])) if replies else (c, c)
        for c, r in zip(contexts, responses, strict=True)
    ]
    longest = max(len(ids) for ids, _ in rows)
    out = {name: torch.zeros(len(rows), longest, dtype=torch.long) for name in ("ids", "mask")}
    labels = torch.full((len(rows), longest), -100)
    for row, (ids, targets) in enumerate(rows):
        place = slice(longest - len(ids), None) if left else slice(0, len(ids))
        out["ids"][row, place] = torch.from_numpy(ids)
        out["mask"][row, place] = 1
        labels[row, place] = torch.from_numpy(targets)
    return {"input_ids": out["ids"], "attention_mask": out["mask"], "labels": labels}


def train_ours(
    args: argparse.Namespace, data: Batch, prompts: int, position: str, micro: int
) -> Any:
    """A function that takes one pass over the data and returns the mean loss a token."""
    backbone, spt = ours(args, prompts, position)
    batches = list(micro_batches(data, micro, list(range(len(data)))))

    def work() -> float:
        total = 0.0
        for batch in batches:
            out = backbone(spt.micro_losses, batch, len(batch), len(data.response_ids))
            out.total.backward()
            total += float(out.parts[0])
        return total

    return work


def train_peft(args: argparse.Namespace, data: Batch, prompts: int, order: list[int]) -> Any:
    """The same through PEFT: each batch once under each prompt."""
    model = peft_model(args)
    bank = start(prompts, args.virtual, model.config.hidden_size)
    batches = [
        (padded(batch), len(batch.response_ids)) for batch in micro_batches(data, args.micro, order)
    ]

    def work() -> float:
        total = 0.0
        for inputs, targets in batches:
            for prompt in bank:
                set_prompt(model, prompt)
                loss = model(**inputs).loss * (targets / len(data.response_ids) / prompts)
                loss.backward()
                total += float(loss)
        return total

    return work


def train_trainer(args: argparse.Namespace, data: Batch) -> Any:
    """One epoch of the Trainer, whose data loader shuffles."""
    from transformers import Trainer, TrainingArguments

    model = peft_model(args)
    set_prompt(model, start(1, args.virtual, model.config.hidden_size)[0])
    settings = TrainingArguments(
        output_dir=str(args.out),
        per_device_train_batch_size=args.micro,
        num_train_epochs=1,
        learning_rate=0.0,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )

    def collate(rows: list[int]) -> dict[str, torch.Tensor]:
        return padded(chosen(data, rows))

    trainer = Trainer(
        model=model, args=settings, train_dataset=range(len(data)), data_collator=collate
    )
    return lambda: float(trainer.train().training_loss)


def reply_ours(args: argparse.Namespace, data: Batch, prompts: int) -> Any:
    """Greedy replies of all examples in one batch, in turn under each prompt."""
    backbone, spt = ours(args, prompts, "before_text")
    options = load_config("demo", [f"generate.max_new_tokens={NEW_TOKENS}"]).generate
    options = options.model_copy(update={"mode": "random", "min_new_tokens": NEW_TOKENS})
    return lambda: backbone(decode, spt, data, options, Endings((2,), 2), False) and 0.0


def reply_peft(args: argparse.Namespace, data: Batch, prompts: int) -> Any:
    """The same number of replies, one call of generate for each prompt."""
    model = peft_model(args)
    bank = start(prompts, args.virtual, model.config.hidden_size)

    def work() -> float:
        for k, prompt in enumerate(bank):
            set_prompt(model, prompt)
            own = padded(chosen(data, list(range(k, len(data), prompts))), replies=False, left=True)
            del own["labels"]
            model.generate(**own, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
        return 0.0

    return work


def row(args: argparse.Namespace, case: str, prompts: int) -> dict[str, Any]:
    """Costs of one case in this process."""
    torch.set_num_threads(1)
    data = micro_batch("embedded:valid", args.base, args.examples, 10**9, 512)
    order = list(range(len(data)))
    if case == "peft shuffled":
        order = np.random.default_rng(0).permutation(order).tolist()
    make: dict[str, Callable[[], Any]] = {
        "ours prefix": lambda: train_ours(args, data, prompts, "before_text", args.micro),
        "one by one": lambda: train_ours(args, data, prompts, "before_text", 1),
        "ours suffix": lambda: train_ours(args, data, prompts, "before_reply", args.micro),
        "peft sorted": lambda: train_peft(args, data, prompts, order),
        "peft shuffled": lambda: train_peft(args, data, prompts, order),
        "trainer": lambda: train_trainer(args, data),
        "ours replies": lambda: reply_ours(args, data, prompts),
        "peft replies": lambda: reply_peft(args, data, prompts),
    }
    work = make[case]()
    reset_peak(CPU)
    held = peak_bytes(CPU)
    costs, loss = [], 0.0
    for _ in range(args.repeats):
        began = time.process_time()
        loss = work()
        costs.append((time.process_time() - began) / len(data))
    extra = (peak_bytes(CPU) - held) >> 20
    return {"case": case, "K": prompts, "cpu_s": min(costs), "extra_mib": extra, "loss": loss}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("base", help="folder of the base")
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--micro", type=int, default=8, help="examples of a forward pass")
    parser.add_argument("--bits", type=int, default=32, choices=(16, 32))
    parser.add_argument("--virtual", type=int, default=8, help="P")
    parser.add_argument("--repeats", type=int, default=2, help="passes; the cheapest counts")
    parser.add_argument("--out", type=Path, default=Path("runs/peers"), help="of the Trainer")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(row(args, args.case[0], int(args.case[1]))))
        return 0
    rows: list[dict[str, Any]] = []
    for case, prompts in CASES:
        command = [sys.executable, "-m", "benchmarks.peers", *sys.argv[1:], "--case", case]
        done = subprocess.run([*command, str(prompts)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{case}, K = {prompts}:\n{done.stderr[-3000:]}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        found = rows[-1]
        print(
            f"{case:14} K = {prompts}  {found['cpu_s']:7.3f} CPU s an example "
            f"{found['extra_mib']:6} MiB more  loss {found['loss']:.6f}",
            flush=True,
        )
    alike: dict[int, list[float]] = {}
    for each in rows:
        if each["case"] in ("ours prefix", "one by one", "peft sorted", "peft shuffled"):
            alike.setdefault(each["K"], []).append(each["loss"])
    gaps = [(max(losses) - min(losses)) / max(losses) for losses in alike.values()]
    kept = args.bits == 16 or max(gaps) < CLOSE
    print(json.dumps({"rows": rows, "kept": kept}))
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
