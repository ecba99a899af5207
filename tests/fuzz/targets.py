"""All targets: everything that reads what others wrote."""

from __future__ import annotations

from tests.fuzz import folders, imports, readers, replies

_ROOMS = (readers, folders, replies, imports)
TARGETS = {target.name: target for room in _ROOMS for target in room.TARGETS}
