"""`make test-versions`: unit and numerics tests at both ends of the ranges that setup.py admits.

Each end has a virtual environment of its own, which is kept and brought up to date by the next
call. torch is the one of constraints.in in both.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement

from tests.helpers.environments import ROOT, TORCH, call, install_into, make_environment

ENDS = ("oldest", "newest")
# Not of its development.
OF_THE_PACKAGE = ("", "baselines", "completion", "evaluate", "report", "retrieve", "tensorboard")
# The last: users see no warning of a library, which another end of the ranges may give.
TESTS = ("tests/unit", "tests/numerics", "tests/integration/test_quiet.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # two workers, and as many cores at least
SHOW = (
    "import sys; from importlib.metadata import version;"
    " print(*(f'{name} {version(name)}' for name in sys.argv[1:]), sep=', ')"
)


def ranges() -> Iterator[Requirement]:
    """Yield what setup.py asks for, but torch, as the installed package has it."""
    # Not what a build may have left in the working folder.
    (installed,) = distributions(name="spt-ds", path=[sysconfig.get_path("purelib")])
    for line in installed.requires or []:
        requirement = Requirement(line)
        extras = [extra for extra in OF_THE_PACKAGE if _applies(requirement, extra)]
        if requirement.name != "torch" and extras:
            yield requirement


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def lowest(requirement: Requirement) -> str | None:
    """Return `name==version` of the lower bound; None where there is none."""
    for bound in requirement.specifier:
        if bound.operator == ">=":
            return f"{requirement.name}=={bound.version}"
    return None


def install(end: str, python: Path) -> None:
    """Bring the environment of `python` to that end of the ranges."""
    make_environment(python.parents[1])
    wanted = list(ranges())
    bounds = [lowest(requirement) for requirement in wanted] if end == "oldest" else []
    constraints = python.parents[1] / "constraints.txt"
    constraints.write_text("\n".join([TORCH.read_text(), *filter(None, bounds)]) + "\n")
    # Resolved anew for what setup.py names; torch stays as it is.
    anew = [word for requirement in wanted for word in ("--upgrade-package", requirement.name)]
    package = ("--editable", f"{ROOT}[dev]")
    install_into(python, "--constraint", constraints, *anew, *package)


def main() -> int:
    """Install and test both ends; return 1 where one fails."""
    failed = []
    for end in sys.argv[1:] or ENDS:
        python = ROOT / f".venv-{end}" / "bin" / "python"
        begin = time.monotonic()
        install(end, python)
        installed = time.monotonic()
        print(f"== {end} ==", flush=True)
        call(python, "-c", SHOW, "torch", *(requirement.name for requirement in ranges()))
        pytest = [python, "-m", "pytest", "-q", "-n", "2", "-m", "not slow", *TESTS]
        code = subprocess.run([str(word) for word in pytest], cwd=ROOT, env=ENVIRONMENT).returncode
        print(
            f"== {end}: installed in {installed - begin:.0f} s, tested in "
            f"{time.monotonic() - installed:.0f} s, pytest returned {code} ==",
            flush=True,
        )
        if code:
            failed.append(end)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
