"""Train the small base that the package ships: a byte-level BPE and a Llama-architecture language
model.

    python -m spt_ds.tools.pretrain_base --text *.txt.xz --persona-csv valid.csv test.csv \
        --demo spt_ds/assets/dialogues --out spt_ds/assets/base --state base.pt --minutes 60

The learning rate falls to zero with the wall clock, so a run of any length ends well. `--resume`
goes on from `--state` (saved with every export) within the same `--minutes`; documents are then
drawn afresh.

Shape letters: B rows of a micro-batch, T tokens of a row, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from spt_ds.errors import DataError
from spt_ds.log import get_logger
from spt_ds.tools.pretrain_text import Pools, endless, load_pools, rendered

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"  # ids 0, 1, 2
_TOKENIZER_DOCUMENTS = 40_000  # enough for 8,192 merges, half a minute
_HELD_DOCUMENTS = 200  # of each kind: some 20,000 tokens


@dataclass
class Progress:
    """What a resumed run goes on from."""

    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0


def train_tokenizer(
    documents: Iterable[str], vocab_size: int, max_tokens: int
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE with <pad>, <bos>, <eos> as ids 0, 1, 2 that adds none of them by
    itself.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=max_tokens,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def token_stream(documents: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> Iterator[int]:
    """Yield the ids of all documents, each between BOS and EOS; special tokens typed in a text stay
    text.
    """
    for text in documents:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)[
            "input_ids"
        ]
        yield from (tokenizer.bos_token_id, *ids, tokenizer.eos_token_id)


def rows(stream: Iterator[int], batch: int, length: int) -> Iterator[torch.Tensor]:
    """Yield [B, T + 1] int64; a row's last token is the next row's first, so every token is a
    target once.
    """
    last = next(stream)
    while True:
        flat = [last, *islice(stream, batch * length)]
        if len(flat) <= batch * length:
            return
        last = flat[-1]
        yield torch.tensor(flat).unfold(0, length + 1, length)


def loss_sum(model: LlamaForCausalLM, row: torch.Tensor, bf16: bool) -> torch.Tensor:
    """Return the summed cross entropy (nats, fp32) of each next token of `row` [B, T + 1]; pads are
    no targets.
    """
    with torch.autocast(row.device.type, dtype=torch.bfloat16, enabled=bf16):
        logits = model(row[:, :-1], use_cache=False).logits  # [B, T, V]
    targets = row[:, 1:].masked_fill(row[:, 1:] == 0, -100)
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), reduction="sum"
    )


@torch.no_grad()
def held_out(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[str],
    length: int,
    bf16: bool,
) -> dict[str, float]:
    """Return perplexity per token and per blank-separated word (template words count) over packed
    documents.
    """
    ids = list(token_stream(documents, tokenizer))
    padded = ids + [0] * (-(len(ids) - 1) % length)
    total = sum(
        float(loss_sum(model, row.to(model.device), bf16)) for row in rows(iter(padded), 1, length)
    )
    words = sum(len(text.split()) for text in documents)
    return {
        "documents": len(documents),
        "tokens": len(ids) - 1,
        "perplexity_per_token": math.exp(total / (len(ids) - 1)),
        "perplexity_per_word": math.exp(total / words),
    }


def build(args: argparse.Namespace, vocab_size: int) -> LlamaForCausalLM:
    """Return a freshly drawn fp32 model of the asked shape."""
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        max_position_embeddings=args.max_position,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def learning_rate(args: argparse.Namespace, progress: Progress) -> float:
    """Return the linear warm-up by steps times the cosine to zero by wall clock."""
    done = min(1.0, progress.elapsed_s / (60 * args.minutes))
    if args.max_steps:
        done = max(done, progress.step / args.max_steps)
    warm = min(1.0, (progress.step + 1) / args.warmup_steps)
    return args.lr * warm * 0.5 * (1 + math.cos(math.pi * done))


def train(
    args: argparse.Namespace,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    pools: Pools,
) -> Progress:
    """Train until the time or the steps are over, exporting along the way; return where it ended."""
    optimizer = torch.optim.AdamW(
        model.parameters(), args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay
    )
    progress = Progress()
    if args.resume:
        state = torch.load(args.state, map_location=args.device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        progress = Progress(**state["progress"])
    documents = endless(pools, args.persona_share, random.Random(f"{args.seed} {progress.step}"))
    windows = rows(token_stream(documents, tokenizer), args.rows, args.row_tokens)
    started, exported, shown = time.monotonic() - progress.elapsed_s, progress.elapsed_s, 0.0
    while progress.elapsed_s < 60 * args.minutes and not (
        args.max_steps and progress.step >= args.max_steps
    ):
        rate = learning_rate(args, progress)
        for group in optimizer.param_groups:
            group["lr"] = rate
        window = next(windows).to(args.device)
        loss = loss_sum(model, window, args.bf16) / (args.rows * args.row_tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.step += 1
        progress.tokens += args.rows * args.row_tokens
        progress.elapsed_s = time.monotonic() - started
        shown += loss.item()
        if progress.step % args.log_every == 0:
            speed = f"{progress.tokens / progress.elapsed_s:.0f} tokens/s"
            mean, shown = shown / args.log_every, 0.0
            get_logger().info("step %d loss %.3f lr %.2e %s", progress.step, mean, rate, speed)
        if progress.elapsed_s - exported > 60 * args.export_minutes:
            exported = progress.elapsed_s
            export(args, model, tokenizer, pools, progress)
            if args.state:
                state = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "progress": asdict(progress),
                }
                torch.save(state, args.state)
    return progress


def export(
    args: argparse.Namespace,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    pools: Pools,
    progress: Progress,
) -> dict[str, Any]:
    """Write weights (bf16), tokenizer and `pretraining.json` to `--out`; return what the latter
    holds.
    """
    report: dict[str, Any] = {
        "steps": progress.step,
        "tokens": progress.tokens,
        "minutes": round(progress.elapsed_s / 60, 1),
        "rows_per_step": args.rows,
        "row_tokens": args.row_tokens,
        "learning_rate": args.lr,
        "persona_share_of_documents": args.persona_share,
        "parameters": sum(weight.numel() for weight in model.parameters()),
    }
    # The figures are those of the rounded weights: what a user loads.
    rounded = LlamaForCausalLM(model.config)
    rounded.load_state_dict(model.state_dict())
    rounded = rounded.bfloat16().to(args.device)
    for name, talks in (("persona", pools.held_persona), ("general", pools.held_general)):
        documents = rendered(talks[:_HELD_DOCUMENTS], args.seed)
        measured = held_out(rounded, tokenizer, documents, args.row_tokens, bf16=False)
        report[f"held_out_{name}"] = {key: round(value, 3) for key, value in measured.items()}
    args.out.mkdir(parents=True, exist_ok=True)
    rounded.to("cpu").save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "pretraining.json").write_text(
        json.dumps(report, indent=2) + "\n", encoding="utf-8"
    )
    get_logger().info("exported to %s: %s", args.out, json.dumps(report))
    return report


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--text",
        type=Path,
        nargs="+",
        required=True,
        help="dialogues, an utterance a line, blank lines between; .xz",
    )
    add(
        "--persona-csv",
        type=Path,
        nargs="+",
        required=True,
        help="Synthetic-Persona-Chat CSV files",
    )
    add(
        "--demo",
        type=Path,
        help="folder of the demo dialogues; they and the people of valid and test are left out",
    )
    add(
        "--out", type=Path, required=True, help="folder for weights, tokenizer and pretraining.json"
    )
    add(
        "--state",
        type=Path,
        help="file for the training state, saved with each export along the way",
    )
    add("--resume", action="store_true", help="go on from --state, with the tokenizer in --out")
    add(
        "--minutes",
        type=float,
        default=60,
        help="wall-clock minutes of training; the learning rate ends at zero",
    )
    add(
        "--max-steps",
        type=int,
        default=0,
        help="end after that many steps if the time is not over; 0: no limit",
    )
    add("--export-minutes", type=float, default=10, help="minutes between exports along the way")
    add(
        "--persona-share", type=float, default=0.4, help="share of documents with a persona, 0 to 1"
    )
    add(
        "--held-share",
        type=float,
        default=0.01,
        help="share of dialogues held out for perplexity, 0 to 1",
    )
    add("--vocab", type=int, default=8192, help="entries of the tokenizer")
    add("--hidden", type=int, default=256, help="hidden size")
    add("--intermediate", type=int, default=704, help="width of the feed-forward part")
    add("--layers", type=int, default=6, help="number of layers")
    add("--heads", type=int, default=4, help="number of attention heads")
    add("--max-position", type=int, default=1024, help="longest text in tokens")
    add("--rows", type=int, default=4, help="rows of an optimizer step")
    add("--row-tokens", type=int, default=512, help="tokens of a row; documents are packed")
    add("--lr", type=float, default=2e-3, help="peak learning rate of AdamW")
    add("--warmup-steps", type=int, default=100, help="steps of linear warm-up")
    add("--weight-decay", type=float, default=0.1, help="weight decay of AdamW")
    add("--bf16", action=argparse.BooleanOptionalAction, default=True, help="autocast to bfloat16")
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: CUDA where there is one",
    )
    add("--threads", type=int, default=1, help="CPU threads")
    add("--log-every", type=int, default=50, help="steps between progress lines")
    add("--seed", type=int, default=0, help="seed of weights, documents and what is held out")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m spt_ds.tools.pretrain_base`."""
    args = _parser().parse_args(argv)
    if args.resume and not (args.state and args.state.is_file()):
        raise DataError(f"--resume: --state is {args.state}, no such file; start without --resume")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(args.threads)
    pools = load_pools(args.text, args.persona_csv, args.demo, args.held_share, args.seed)
    if args.resume:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out)
    else:
        sample = islice(
            endless(pools, args.persona_share, random.Random(args.seed)), _TOKENIZER_DOCUMENTS
        )
        tokenizer = train_tokenizer(sample, args.vocab, args.max_position)
    model = build(args, len(tokenizer)).to(args.device)
    get_logger().info("%d parameters", sum(weight.numel() for weight in model.parameters()))
    progress = train(args, model, tokenizer, pools)
    export(args, model, tokenizer, pools, progress)


if __name__ == "__main__":
    main()
