"""`spt-ds report RUN...`: one HTML file of runs that needs no network and no script."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import spt_ds
from spt_ds.errors import SptError
from spt_ds.files import write_whole
from spt_ds.report.markup import Markup, join, tag
from spt_ds.report.runs import Run, read_runs
from spt_ds.run.command import run_command

# Nothing is fetched and nothing runs, whatever the texts of a run hold.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def main(argv: Sequence[str]) -> int:
    """Read the runs and write the page; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="spt-ds report", description="One self-contained HTML page of runs."
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="the page (default %(default)s)",
    )
    return run_command(parser, argv, _write_page)


def _write_page(args: argparse.Namespace) -> None:
    text = page(read_runs(args.runs))
    try:
        write_whole(args.out, text)
    except OSError as error:
        raise SptError(
            f"{args.out}: cannot be written ({error.strerror}); give another file with --out"
        ) from error
    print(f"written: {args.out} ({len(text.encode()) / 1024:.0f} KiB)")


def page(runs: Sequence[Run]) -> str:
    """Return the whole HTML document. Raises SptError when matplotlib is not installed."""
    # They import matplotlib: the command line must start without it.
    from spt_ds.report.sections import (
        audit,
        portraits,
        prompts,
        replies,
        scores,
        setup,
        training,
        verdict,
    )

    parts = {
        "Verdict": verdict.verdict,
        "Runs": setup.overview,
        "Scores": scores.text_scores,
        "Losses": training.losses,
        "Throughput": training.throughput,
        "Prompt use": prompts.prompt_use,
        "Each prompt": portraits.portraits,
        "Scores over the bank": prompts.bank_scores,
        "Audit": audit.audits,
        "Examples": replies.examples,
        "Configuration": setup.configuration,
        "Hardware and versions": setup.machines,
    }
    bodies: list[Markup] = []
    for title, section in parts.items():
        heading = f"{_anchor(title)}-heading"
        inner = (tag("h2", title, id=heading), section(runs))
        bodies.append(tag("section", *inner, id=_anchor(title), aria_labelledby=heading))
    links = (tag("li", tag("a", title, href=f"#{_anchor(title)}")) for title in parts)
    title = "Report: " + ", ".join(run.label for run in runs)
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    body = (
        tag("a", "Skip to the report", href="#report", class_="skip"),
        tag("header", tag("h1", title), tag("nav", tag("ul", *links), aria_label="Sections")),
        tag("main", *bodies, id="report"),
        tag("footer", f"Written by spt-ds {spt_ds.__version__} on {made}."),
    )
    style = (resources.files("spt_ds.report") / "style.css").read_text(encoding="utf-8")
    head = (
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(style)),
    )
    return (
        join(
            [
                Markup("<!DOCTYPE html>\n"),
                tag("html", tag("head", *head), tag("body", *body), lang="en"),
            ]
        )
        + "\n"
    )


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")
