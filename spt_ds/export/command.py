"""`spt-ds export peft|hub|vllm RUN OUT`: a run as others can use it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from spt_ds.log import get_logger, say_loading
from spt_ds.run.command import add_overrides, at_least, run_command

FORMS = {
    "peft": "a prompt-tuning folder of PEFT for each prompt",
    "hub": "one folder with what was trained, its configuration and a model card",
    "vllm": "tensors, and a client that chooses a prompt and asks vLLM",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Write a run in another form; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="spt-ds export", description="Write a trained run in a form that others can use."
    )
    forms = parser.add_subparsers(dest="form", required=True, metavar="FORM")
    for name, text in FORMS.items():
        form = forms.add_parser(name, help=text, description=text)
        form.add_argument("run", type=Path, help="run folder of a training")
        form.add_argument("out", type=Path, help="folder to be made")
        add_checkpoint(form)
        if name == "hub":
            add_card(form)
        add_overrides(form, "override an option of the run, such as generate.mode=select")
    return run_command(parser, argv, _export)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which tensors leave, and over which base."""
    parser.add_argument("--checkpoint", default="best", help="best, last, or the number of a step")
    parser.add_argument(
        "--base", metavar="ID", help="the base's id at the hub, where the run names a folder"
    )


def add_card(parser: argparse.ArgumentParser) -> None:
    """Add the options of a model card."""
    parser.add_argument(
        "--license", default="unknown", metavar="ID", help="licence of the prompts, such as mit"
    )
    parser.add_argument(
        "--examples",
        type=at_least(0),
        metavar="N",
        help="dialogues of the test data in the model card; default 3 where that data is public,"
        " else 0",
    )


def _export(args: argparse.Namespace) -> None:
    say_loading()
    from spt_ds.export.run_files import open_trained

    run = open_trained(args.run, args.checkpoint, args.overrides)
    if args.form == "peft":
        from spt_ds.export.peft_folder import export_peft

        made = ", ".join(map(str, export_peft(run, args.out, args.base)))
    elif args.form == "hub":
        from spt_ds.export.card import Card
        from spt_ds.export.hub_folder import export_hub

        export_hub(run, args.out, args.base, Card(args.license, args.examples))
        made = str(args.out)
    else:
        from spt_ds.export.vllm import export_vllm

        export_vllm(run, args.out, args.base)
        made = str(args.out)
    get_logger().info(f"{run.name} of {run.folder}: {made}")


if __name__ == "__main__":
    raise SystemExit(main())
