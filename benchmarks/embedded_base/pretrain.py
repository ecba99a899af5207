"""Train the small base that the package ships: a byte-level BPE and a Llama-architecture model.

    python -m benchmarks.embedded_base.pretrain --text *.txt.xz --persona-csv valid.csv test.csv \
        --demo spt_ds/assets/dialogues --out spt_ds/assets/base --state base.pt --tokens 60e6

The learning rate is constant and falls to zero over the last fifth of `--tokens`. `--resume` goes
on from `--state`, which is saved every few minutes, as if the run had not stopped; `--tokens` may
then be another number.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.embedded_base import measure
from benchmarks.embedded_base.batches import Layout, Packer
from benchmarks.embedded_base.documents import KINDS, Pools, endless, load_pools, rendered
from benchmarks.embedded_base.network import Shape, initial_weights, to_llama
from benchmarks.embedded_base.team import Plan, Shared, work
from spt_ds.errors import DataError
from spt_ds.log import get_logger

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"  # ids 0, 1, 2
_TOKENIZER_DOCUMENTS = 40_000
_HELD_DOCUMENTS = 200  # of each kind


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


def pools_of(args: argparse.Namespace) -> Pools:
    """Return the dialogues that the arguments name."""
    return load_pools(args.text, args.persona_csv, args.demo, args.held_share, args.seed)


def make_packer(args: argparse.Namespace) -> Packer:
    """Return what makes the micro-batches; it holds all the text."""
    layout = Layout(
        args.rows,
        args.row_tokens,
        args.long_every,
        args.max_position,
        tuple(args.shares),
        args.head_importance,
        args.partner_importance,
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out)
    return Packer(pools_of(args), tokenizer, layout, args.seed)


def export(args: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    """Write the weights of `--state` in bf16, and `pretraining.json` with their figures."""
    state = torch.load(args.state, weights_only=True)
    to_llama(state["weights"], shape).bfloat16().save_pretrained(args.out)
    progress = state["progress"]
    report: dict[str, Any] = {
        "steps": progress["step"],
        "tokens": progress["tokens"],
        "minutes": round(progress["elapsed_s"] / 60, 1),
        "workers": args.workers,
        "parameters": sum(value.numel() for value in state["weights"].values()),
        "vocabulary": shape.vocab,
        "row_tokens": args.row_tokens,
        "tokens_per_step": args.micro_batches * args.rows * args.row_tokens,
        "learning_rates": {"matrices": args.matrix_lr, "other": args.other_lr},
        "shares": dict(zip(KINDS, args.shares, strict=True)),
    }
    # The figures are those of the rounded weights: what a user loads.
    model, tokenizer = measure.load(args.out)
    pools = pools_of(args)
    for name, talks in (("persona", pools.held_persona), ("general", pools.held_general)):
        documents = rendered(talks[:_HELD_DOCUMENTS], args.seed)
        measured = measure.held_out(model, tokenizer, documents)
        report[f"held_out_{name}"] = measure.rounded(measured)
    if args.demo:
        report |= measure.figures(args.out, str(args.demo / "valid.jsonl"))
    text = json.dumps(report, indent=2) + "\n"
    (args.out / "pretraining.json").write_text(text, encoding="utf-8")
    get_logger().info("exported to %s: %s", args.out, json.dumps(report))
    return report


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--text", type=Path, nargs="+", required=True, help="dialogues, an utterance a line; .xz")
    add("--persona-csv", type=Path, nargs="+", required=True, help="Synthetic-Persona-Chat CSV")
    add("--demo", type=Path, help="demo dialogues; they and people of valid and test are left out")
    add("--out", type=Path, required=True, help="folder for weights and tokenizer")
    add("--state", type=Path, required=True, help="file for the state of the training")
    add("--resume", action="store_true", help="go on from --state, with the tokenizer in --out")
    add("--export-only", action="store_true", help="write --state to --out, train nothing")
    add("--tokens", type=float, default=60e6, help="tokens of the whole run, padding not counted")
    add("--workers", type=int, default=2, help="processes of one thread each")
    add("--shares", type=float, nargs=4, default=(0.3, 0.4, 0.1, 0.2), help="of documents.KINDS")
    add("--held-share", type=float, default=0.02, help="dialogues held out, 0 to 1")
    add("--vocab", type=int, default=4096, help="entries of the tokenizer")
    add("--hidden", type=int, default=256, help="hidden size")
    add("--intermediate", type=int, default=512, help="width of the feed-forward part")
    add("--layers", type=int, default=3, help="number of layers")
    add("--heads", type=int, default=4, help="attention heads")
    add("--kv-heads", type=int, default=2, help="key/value heads")
    add("--head-size", type=int, default=32, help="size of a head")
    add("--max-position", type=int, default=1024, help="longest text, and length of long rows")
    add("--rows", type=int, default=8, help="rows of a micro-batch")
    add("--row-tokens", type=int, default=256, help="tokens of a row; documents are packed")
    add("--long-every", type=int, default=12, help="every so-manieth micro-batch has long rows")
    add("--micro-batches", type=int, default=6, help="micro-batches of a step")
    add("--head-importance", type=float, default=0.1, help="weight of persona sentences' loss")
    add("--partner-importance", type=float, default=0.5, help="weight of the partner's turns' loss")
    add("--matrix-lr", type=float, default=5e-3, help="peak learning rate of Muon")
    add("--other-lr", type=float, default=3e-3, help="peak learning rate of AdamW")
    add("--warmup-tokens", type=float, default=1e6, help="tokens of linear warm-up")
    add("--decay-share", type=float, default=0.2, help="share of --tokens of the final decay")
    add("--weight-decay", type=float, default=0.1, help="weight decay")
    add("--log-every", type=int, default=20, help="steps between progress lines")
    add("--save-minutes", type=float, default=3, help="minutes between saved states")
    add("--seed", type=int, default=0, help="seed of weights, documents and what is held out")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m benchmarks.embedded_base.pretrain`."""
    args = _parser().parse_args(argv)
    if (args.resume or args.export_only) and not args.state.is_file():
        raise DataError(f"--resume: --state is {args.state}, no such file; start without --resume")
    if not (args.resume or args.export_only):
        documents = endless(pools_of(args), args.shares, random.Random(args.seed))
        texts = (document.text for document in islice(documents, _TOKENIZER_DOCUMENTS))
        train_tokenizer(texts, args.vocab, args.max_position).save_pretrained(args.out)
    shape = Shape(
        len(PreTrainedTokenizerFast.from_pretrained(args.out)),
        args.hidden,
        args.layers,
        args.heads,
        args.kv_heads,
        args.head_size,
        args.intermediate,
        args.max_position,
    )
    if not args.export_only:
        train(args, shape)
    export(args, shape)


def train(args: argparse.Namespace, shape: Shape) -> None:
    """Train with `--workers` processes until `--tokens` are seen."""
    plan = Plan(
        int(args.tokens),
        args.micro_batches,
        args.matrix_lr,
        args.other_lr,
        int(args.warmup_tokens),
        args.decay_share,
        args.weight_decay,
        args.log_every,
        args.save_minutes,
    )
    weights, momentum = initial_weights(shape, args.seed), {}
    if args.resume:
        saved = torch.load(args.state, weights_only=True)
        weights, momentum = saved["weights"], saved["momentum"]
    get_logger().info("%d parameters", sum(value.numel() for value in weights.values()))
    shared = Shared.of(weights, momentum, args.workers)
    # Read once here: the workers get the dialogues, not the files.
    packer = make_packer(args)
    mp.spawn(  # type: ignore[attr-defined]
        work, (shared, shape, plan, packer, args.state, args.resume), nprocs=args.workers, join=True
    )


if __name__ == "__main__":
    main()
