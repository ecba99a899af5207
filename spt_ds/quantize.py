"""`spt-ds quantize BASE OUT`: store a quantised base, of which later runs read fewer bytes.

OUT gets safetensors files, config.json with our own section, and the tokenizer. Memory: one file
and one layer.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from spt_ds.config.model import ModelConfig
from spt_ds.errors import ConfigError
from spt_ds.log import say_loading
from spt_ds.run.command import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(_parser(), argv, _quantise)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spt-ds quantize", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("base", help="`embedded`, a folder, or a hub id")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--bits", type=int, default=4, choices=[4, 8])
    parser.add_argument("--type", default="nf4", help="4-bit code book: nf4 (default) or fp4")
    parser.add_argument(
        "--block-size", type=int, default=64, help="weights that share one scale (default 64)"
    )
    parser.add_argument(
        "--double-quant", action="store_true", help="quantise the scales of a 4-bit base too"
    )
    parser.add_argument(
        "--skip",
        action="append",
        metavar="NAME",
        help="linear layers that stay in 16 bits (default lm_head)",
    )
    return parser


def _quantise(args: argparse.Namespace) -> None:
    config = _config(args)
    say_loading()
    from spt_ds.model.quant_write import write_quantised

    write_quantised(config, args.out)
    print(f"{args.out}: set model.base to it and model.base_bits: {config.base_bits}")


def _config(args: argparse.Namespace) -> ModelConfig:
    quant = {"type": args.type, "block_size": args.block_size, "double_quant": args.double_quant}
    if args.skip is not None:
        quant["skip_modules"] = args.skip
    try:
        config = ModelConfig.model_validate(
            {"base": args.base, "revision": args.revision, "base_bits": args.bits, "quant": quant}
        )
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']}" for e in error.errors()
        )
        raise ConfigError(problems) from error
    if args.out.exists():
        raise ConfigError(f"{args.out} is already there; give another folder, or delete it")
    return config


if __name__ == "__main__":
    raise SystemExit(main())
