"""`spt-ds import reference|peft PATH OUT`: a run folder of what another program trained."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from spt_ds.log import get_logger, say_loading
from spt_ds.run.command import add_overrides, run_command

FORMS = {
    "reference": "a checkpoint of the public SPT reference, as DeepSpeed wrote it",
    "peft": "a prompt-tuning folder of PEFT, as a bank of one prompt",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Make a run folder; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="spt-ds import", description="Make a run folder of what another program trained."
    )
    forms = parser.add_subparsers(dest="form", required=True, metavar="FORM")
    for name, text in FORMS.items():
        form = forms.add_parser(name, help=text, description=text)
        form.add_argument("path", type=Path, help="what is read; no code in it is run")
        form.add_argument("out", type=Path, help="run folder to be made")
        if name == "reference":
            form.add_argument(
                "--config", type=Path, required=True, metavar="YAML", help="the reference's YAML"
            )
        form.add_argument("--base", metavar="BASE", help="hub id or folder of the base")
        add_overrides(form, "an option of the run, such as data.template=chat")
    return run_command(parser, argv, _import)


def _import(args: argparse.Namespace) -> None:
    say_loading()
    if args.form == "reference":
        from spt_ds.export.reference_files import import_reference

        config = import_reference(args.path, args.config, args.out, args.base, args.overrides)
    else:
        from spt_ds.export.peft_folder import import_peft

        config = import_peft(args.path, args.out, args.base, args.overrides)
    get_logger().info(
        f"{args.out}: {config.prompts.count} prompt(s) of {config.prompts.tokens} tokens over"
        f" {config.model.base}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
