"""`make test-cluster`: enter namespaces of our own and run the cluster tests in them.

Processes, network, mounts and host name are private, so that no port, process or file of the
machine is touched and the kernel ends whatever is left when the tests end.
"""

from __future__ import annotations

import os
import sys

from tests.cluster.sandbox import absent_programs, missing

NAMESPACES = ["--mount", "--net", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc"]


def main() -> int:
    if absent := absent_programs():
        print(
            f"test-cluster: not installed: {', '.join(absent)}; run .ci/packages", file=sys.stderr
        )
        return 1
    if why := missing():
        print(f"test-cluster: skipped: {why}")
        return 0
    pytest = [sys.executable, "-m", "pytest", "-m", "cluster", "tests/cluster", *sys.argv[1:]]
    os.execvp("unshare", ["unshare", *NAMESPACES, *pytest])


if __name__ == "__main__":
    raise SystemExit(main())
