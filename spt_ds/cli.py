"""The `spt-ds` command: a sub-command's module is imported only when it is called."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import spt_ds
from spt_ds.config.load import dump_config, json_schema, load_config, recipe_list
from spt_ds.log import prepare_streams
from spt_ds.run.command import add_overrides, run_command
from spt_ds.run.completion import SHELLS, Main, script

COMMANDS = {
    "train": ("spt_ds.train", "train prompt bank and retriever"),
    "generate": ("spt_ds.generate", "generate replies for evaluation"),
    "chat": ("spt_ds.chat", "a conversation in the terminal"),
    "serve": ("spt_ds.serve.command", "an HTTP server in OpenAI's shape, with a page to talk to"),
    "evaluate": ("spt_ds.evaluate.command", "score a predictions file"),
    "audit": ("spt_ds.audit.command", "whether the retriever earns its keep on held-out data"),
    "compare": (
        "spt_ds.evaluate.compare_command",
        "runs against the first of them",
    ),
    "sweep": ("spt_ds.sweep.command", "every cell of a grid through all of these, and one table"),
    "report": (
        "spt_ds.report.command",
        "one HTML page of runs: curves, prompt use, scores, examples",
    ),
    "summary": ("spt_ds.summary", "losses, scores and prompt usage of a run"),
    "runs": ("spt_ds.runs", "run folders with state, age, step, best loss and scores"),
    "watch": ("spt_ds.watch", "a run in the terminal while it trains"),
    "bench": ("spt_ds.costs.command", "a training step at a given shape, against a naive version"),
    "export": ("spt_ds.export.command", "a run for PEFT, the hub or vLLM"),
    "push": ("spt_ds.export.push_command", "upload a run to the hub"),
    "import": (
        "spt_ds.export.import_command",
        "a run of a reference checkpoint or a PEFT folder",
    ),
    "quantize": ("spt_ds.quantize", "write a base once in 4 or 8 bits"),
    "plan": (
        "spt_ds.plan.command",
        "where the base of a run would live, what fits, and how long a run takes",
    ),
    "slurm": ("spt_ds.slurm_command", "the job scripts of a cluster, listed or copied"),
    "doctor": ("spt_ds.doctor", "check machine, ranks and network before a run"),
    "config": ("spt_ds.cli", "show a resolved configuration, the schema or the recipes"),
    "completion": ("spt_ds.cli", "what makes bash or zsh complete these commands"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command and return its exit code."""
    prepare_streams()
    args = list(sys.argv[1:] if argv is None else argv)
    if args and args[0] in COMMANDS:
        return entry(args[0])(args[1:])
    if args in (["--version"], ["-V"]):
        print(f"spt-ds {spt_ds.__version__}")
        return 0
    stream = sys.stdout if args in ([], ["-h"], ["--help"]) else sys.stderr
    if stream is sys.stderr:
        print(f"spt-ds: unknown command {args[0]!r}", file=stream)
    print("usage: spt-ds COMMAND ...\n", file=stream)
    for name, (_, help_text) in COMMANDS.items():
        print(f"  {name:<10} {help_text}", file=stream)
    print("\n`spt-ds COMMAND --help` lists the options of a command.", file=stream)
    return 0 if stream is sys.stdout else 2


def entry(name: str) -> Main:
    """Return what runs a command; its module is imported here."""
    own: dict[str, Main] = {"config": config_main, "completion": completion_main}
    main_of: Main = own.get(name) or importlib.import_module(COMMANDS[name][0]).main
    return main_of


def completion_main(argv: Sequence[str]) -> int:
    """`spt-ds completion`: print the completion of a shell."""
    parser = argparse.ArgumentParser(
        prog="spt-ds completion",
        description='Put `eval "$(spt-ds completion bash)"` into ~/.bashrc, or zsh into ~/.zshrc.',
    )
    parser.add_argument("shell", choices=SHELLS)
    return run_command(parser, argv, _print_completion)


def _print_completion(args: argparse.Namespace) -> None:
    print(script(args.shell, {name: (entry(name), line) for name, (_, line) in COMMANDS.items()}))


def config_main(argv: Sequence[str]) -> int:
    """`spt-ds config`: print a resolved configuration, the JSON schema, or the shipped recipes."""
    parser = argparse.ArgumentParser(prog="spt-ds config")
    parser.add_argument("config", nargs="?", help="YAML file or recipe to resolve")
    add_overrides(parser, "override one option, such as losses.tau_gold=0.5")
    parser.add_argument(
        "--schema", action="store_true", help="print the JSON schema of the YAML file"
    )
    return run_command(parser, argv, _show_config)


def _show_config(args: argparse.Namespace) -> None:
    if args.schema:
        print(json_schema())
    elif args.config is None:
        print(recipe_list())
    else:
        print(dump_config(load_config(args.config, args.overrides)), end="")


if __name__ == "__main__":
    raise SystemExit(main())
