"""Which checkpoint of a folder is the newest."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from .index import INDEX


def newest_first(folders: Iterable[Path]) -> list[Path]:
    """Return the checkpoints in ``folders``, the one that was completed last first.

    Saves that did not finish have no index, or a hidden name: they are not in it.
    """
    found = {}
    for folder in folders:
        for index in folder.glob(f"*/{INDEX}"):
            if not index.parent.name.startswith("."):
                with suppress(OSError):  # removed since
                    found[index.parent] = (index.stat().st_mtime_ns, str(index.parent))
    return sorted(found, key=found.__getitem__, reverse=True)
