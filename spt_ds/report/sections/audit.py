"""What `spt-ds audit` found: the verdict on each retriever and the figures behind it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ValidationError

from spt_ds.display import shown
from spt_ds.errors import DataError
from spt_ds.json_input import parse_object
from spt_ds.report.markup import Markup, absent, join, table, tag
from spt_ds.report.runs import Run
from spt_ds.run.folder import RunFolder

COLUMNS = ("choice", "nats a token", "minus the best single prompt", "p", "share of the gap", "R2")


class Difference(BaseModel):
    """A difference with its 95 % interval."""

    difference: float
    low: float
    high: float
    p: float


class AuditRow(BaseModel):
    """One way to choose."""

    name: str
    nll: float
    low: float
    high: float
    minus_single: Difference | None
    share_of_gap: tuple[float, float, float] | None
    r2: float | None


class Verdict(BaseModel):
    """The verdict as a sentence."""

    sentence: str


class AuditFile(BaseModel):
    """What the section needs of audit.json."""

    checkpoint: str
    verdict: Verdict
    examples: int
    dialogues: int
    rows: list[AuditRow]
    usage: list[int]


def audits(runs: Sequence[Run]) -> Markup:
    """The verdict, the table of choices and the use of the prompts, for each run that has them."""
    parts: list[Markup] = []
    for run in runs:
        parts.append(tag("h3", run.label))
        path = RunFolder(run.folder).audit
        if path.is_file():
            parts += _audit(_read(path))
        else:
            parts.append(absent(f"Not audited: `spt-ds audit {run.folder}` does it."))
    return join(parts)


def _audit(audit: AuditFile) -> list[Markup]:
    used = ", ".join(f"prompt {number}: {count}" for number, count in enumerate(audit.usage))
    caption = (
        f"{audit.examples} replies of {audit.dialogues} dialogues under {audit.checkpoint}; in"
        " brackets 95 % intervals over dialogues."
    )
    return [
        tag("p", audit.verdict.sentence),
        table(caption, COLUMNS, [_cells(row) for row in audit.rows]),
        tag("p", f"Selected: {used}."),
    ]


def _cells(row: AuditRow) -> list[str]:
    pair, gap = row.minus_single, row.share_of_gap
    return [
        row.name,
        f"{row.nll:.3f} [{row.low:.3f}, {row.high:.3f}]",
        "" if pair is None else f"{pair.difference:+.3f} [{pair.low:+.3f}, {pair.high:+.3f}]",
        "" if pair is None else f"{pair.p:.4f}",
        "" if gap is None else f"{gap[0]:.0%} [{gap[1]:.0%}, {gap[2]:.0%}]",
        "" if row.r2 is None else f"{row.r2:.3f}",
    ]


def _read(path: Path) -> AuditFile:
    mend = "run `spt-ds audit` again"
    try:
        return AuditFile.model_validate(parse_object(str(path), path.read_bytes(), mend))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {mend}") from error
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        key = ".".join(map(str, fault["loc"]))
        raise DataError(f"{path}: {key} is {shown(fault['input'])}; {mend}") from error
