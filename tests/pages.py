"""Runs the Python blocks of a Markdown page, in order, in one namespace.

What a page may say in comments, which readers do not see:

``<!-- ranks: 4 -->``          all blocks run on 4 ranks (1 without it).
``<!-- not run: reason -->``   the next block is not executed, and why.
``<!-- setup`` ... ``-->``     Python that is executed here, of what the page takes for granted.
``<!-- prints -->``            the text block that follows is what the Python block before prints.
``<!-- raises -->``            it is what that block raises: ``ShardingError: cannot ...``

A block whose first line is ``# name.py`` is the file of that name.
"""

from __future__ import annotations

import io
import linecache
import os
import re
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

from tests.lightning_programs import ignore_upstream_warnings

ROOT = Path(__file__).parent.parent
FILE = re.compile(r"# (\w+\.py)\n")
MARK = re.compile(r"<!-- (not run|ranks|prints|raises)(?:: (.+?))? -->")


@dataclass
class Block:
    """One piece of Python of a page; ``line`` is the number of its first line."""

    line: int
    code: str
    hidden: bool = False
    not_run: str = ""
    expected: dict[str, str] = field(default_factory=dict)  # "prints" or "raises" -> text


@dataclass
class Page:
    """The Python of a page, and on how many ranks it runs."""

    name: str
    blocks: list[Block]
    ranks: int = 1

    @property
    def executed(self) -> list[Block]:
        """The blocks that readers see and that run."""
        return [b for b in self.blocks if not b.hidden and not b.not_run]


def parse(text: str, name: str) -> Page:
    """Return the Python of a page.

    Raises: ValueError for a marker that is unknown, has no reason, or stands before nothing.
    """
    page, lines, at = Page(name, []), text.splitlines(), 0
    pending: tuple[str, str] | None = None

    def until(end: str) -> str:
        nonlocal at
        first = at = at + 1
        while at < len(lines) and lines[at].rstrip() != end:
            at += 1
        if at == len(lines):
            raise ValueError(f"{name}:{first}: no '{end}' ends this")
        return "\n".join(lines[first:at])

    while at < len(lines):
        line, where = lines[at].strip(), f"{name}:{at + 1}"
        mark = MARK.fullmatch(line)
        if line.startswith("```") or mark or line == "<!-- setup":
            kind, reason = pending or ("", "")
            wanted = {"not run": "```python", "prints": "```text", "raises": "```text"}.get(kind)
            if wanted and line != wanted:
                raise ValueError(f"{where}: '{kind}' is not followed by {wanted}")
            pending = None
        if mark:
            kind, reason = mark[1], mark[2] or ""
            if (kind in ("not run", "ranks")) != bool(reason):
                raise ValueError(f"{where}: '{kind}' {'has' if reason else 'needs'} a value")
            if kind == "ranks":
                page.ranks = int(reason)
            else:
                pending = kind, reason
        elif line == "<!-- setup":
            page.blocks.append(Block(at + 2, until("-->"), hidden=True))
        elif line == "```python":
            page.blocks.append(Block(at + 2, until("```"), not_run=reason))
        elif line.startswith("```"):
            text = until("```")
            if kind:
                page.blocks[-1].expected[kind] = text.rstrip()
        elif line.startswith("<!--"):
            raise ValueError(f"{where}: unknown marker {line}")
        at += 1
    if pending:
        raise ValueError(f"{name}: '{pending[0]}' at the end of the page")
    return page


def read(path: Path) -> Page:
    return parse(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())


def run(page: Page, folder: str | Path) -> int:
    """Run a page in an empty ``folder`` and return how many of its visible blocks ran.

    Raises: AssertionError for an output or error that is not the page's; what a block raises.
    """
    ignore_upstream_warnings()
    names: dict[str, object] = {"__name__": "page"}
    before = Path.cwd()
    os.chdir(folder)
    try:
        for block in page.blocks:
            if not block.not_run:
                _run(block, page.name, names)
    finally:
        os.chdir(before)
    return len(page.executed)


def _run(block: Block, name: str, names: dict[str, object]) -> None:
    source, named, where = block.code, FILE.match(block.code), f"{name}:{block.line}"
    if named:  # errors that quote a line of the user's name this file
        name = named[1]
        linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name
    else:  # empty lines above, so that tracebacks have the line numbers of the page
        source = "\n" * (block.line - 1) + source
    code = compile(source, name, "exec", dont_inherit=True)
    printed, raised = io.StringIO(), None
    try:
        with redirect_stdout(printed):
            exec(code, names)
    except Exception as error:
        if "raises" not in block.expected:
            raise
        raised = f"{type(error).__name__}: {error}"
    wanted = block.expected.get("raises")
    assert wanted is None or raised == wanted, f"{where} raised\n{raised}\ninstead of\n{wanted}"
    wanted = block.expected.get("prints")
    if wanted is not None and not (dist.is_initialized() and dist.get_rank()):
        got = "\n".join(line.rstrip() for line in printed.getvalue().rstrip().splitlines())
        assert got == wanted, f"{where} printed\n{got}\ninstead of\n{wanted}"
