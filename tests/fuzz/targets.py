"""All targets: everything that reads what others wrote."""

from __future__ import annotations

from tests.fuzz import folders, readers, replies

TARGETS = {target.name: target for target in (*readers.TARGETS, *folders.TARGETS, *replies.TARGETS)}
