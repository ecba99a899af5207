"""`spt-ds push RUN org/name`: a run's hub folder, uploaded.

The token is the hub's own: the environment variable HF_TOKEN, or what `hf auth login` keeps.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from spt_ds.errors import ConfigError
from spt_ds.export.command import add_card, add_checkpoint
from spt_ds.log import get_logger, say_loading
from spt_ds.run.command import add_overrides, run_command
from spt_ds.run.hub import HUB_ID


def main(argv: Sequence[str] | None = None) -> int:
    """Upload a run; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="spt-ds push", description="Upload a run to the hub, as `spt-ds export hub` writes it."
    )
    parser.add_argument("run", type=Path, help="run folder, or what `spt-ds export hub` wrote")
    parser.add_argument("name", metavar="ORG/NAME", help="repository at the hub; made if missing")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--dry-run", action="store_true", help="list the files, send nothing")
    add_checkpoint(parser)
    add_card(parser)
    add_overrides(parser, "override an option of the run, such as generate.mode=select")
    return run_command(parser, argv, _push)


def _push(args: argparse.Namespace) -> None:
    if not (HUB_ID.fullmatch(args.name) and "/" in args.name):
        raise ConfigError(f"{args.name!r}: expected ORG/NAME, such as my-team/support-prompts")
    if not args.dry_run:
        _check_token()
    say_loading()
    with tempfile.TemporaryDirectory(prefix="spt-ds-push-") as scratch:
        folder = Path(scratch) / "run"
        _export(args, folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        for file in files:
            print(f"{file.stat().st_size:>14,}  {file.relative_to(folder)}")
        print(f"{sum(file.stat().st_size for file in files):>14,}  in all")
        if not args.dry_run:
            _upload(folder, args.name, args.private)


def _export(args: argparse.Namespace, out: Path) -> None:
    """Write the folder that is sent; the card of a folder that was exported before is kept."""
    from spt_ds.export.card import Card
    from spt_ds.export.hub_folder import README, export_hub
    from spt_ds.export.run_files import open_trained

    run = open_trained(args.run, args.checkpoint, args.overrides)
    export_hub(run, out, args.base, Card(args.license, args.examples))
    edited = args.run / README
    if edited.is_file() and "library_name: spt_ds" in (text := edited.read_text(encoding="utf-8")):
        (out / README).write_text(text, encoding="utf-8")


def _check_token() -> None:
    from huggingface_hub import get_token

    if get_token() is None:
        raise ConfigError(
            "the hub asks for a token, and there is none: run `hf auth login`, or set HF_TOKEN in"
            " the environment; --dry-run needs none"
        )


def _upload(folder: Path, name: str, private: bool) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        told = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message="A run of spt_ds",
        )
    # Beside its own errors the hub's client raises those of its HTTP library, which changed once.
    except Exception as error:
        answer = getattr(getattr(error, "response", None), "status_code", type(error).__name__)
        raise ConfigError(
            f"{name}: the hub did not take the files ({answer}); look at the rights of the token"
            " and at the network. The same command sends what is missing"
        ) from error
    get_logger().info(f"{name}: {told.commit_url}")


if __name__ == "__main__":
    raise SystemExit(main())
