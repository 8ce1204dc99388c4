"""The Python of README.md and docs/ runs, prints and raises what the pages say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests import pages
from tests.pages import ROOT, parse, read
from tests.pool import Pool

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_PYTHON = [path for path in PAGES if read(path).blocks]


@pytest.mark.parametrize("path", WITH_PYTHON, ids=lambda path: path.stem)
def test_blocks_run(pool: Pool, tmp_path: Path, path: Path) -> None:
    if pool.device != "cpu":
        pytest.skip("the pages make their tensors on the CPU")
    page = read(path)
    ran = pool.run(page.ranks, pages.run, page, tmp_path)
    assert ran == [len(page.executed)] * page.ranks


def test_most_blocks_are_run() -> None:
    blocks = [(p.name, b) for p in map(read, WITH_PYTHON) for b in p.blocks if not b.hidden]
    skipped = [(name, b.not_run) for name, b in blocks if b.not_run]
    assert len(blocks) - len(skipped) > 50
    assert len(skipped) < 15, skipped


def test_errors_are_shown_as_they_are() -> None:
    """Every example of the errors page has its message, which ``test_blocks_run`` compares."""
    page = read(ROOT / "docs" / "errors.md")
    assert len([b for b in page.executed if "raises" in b.expected]) > 10


def test_every_page_is_in_the_navigation() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = re.findall(r"[\w-]+\.md", str(nav))
    assert sorted(listed) == sorted(p.name for p in PAGES[1:])


# --- what would otherwise pass unnoticed


def page_of(text: str) -> pages.Page:
    return parse(text.replace("~~~", "```"), "page.md")


def test_the_site_builds(tmp_path: Path) -> None:
    """With every link inside of it."""
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "lightning.html").exists()


def test_a_broken_block_fails_with_its_line(tmp_path: Path) -> None:
    page = page_of("~~~python\nx = 1\n~~~\n\n~~~python\ny = x / 0\n~~~\n")
    with pytest.raises(ZeroDivisionError) as caught:
        pages.run(page, tmp_path)
    frame = caught.traceback[-1]
    assert (str(frame.path), frame.lineno + 1) == ("page.md", 6)


@pytest.mark.parametrize(
    ("block", "error"),
    [
        ("~~~python\nprint(1)\n~~~\n<!-- prints -->\n~~~text\n2\n~~~", "printed\n1\ninstead of"),
        ("~~~python\nint('x')\n~~~\n<!-- raises -->\n~~~text\nNo\n~~~", "raised\nValueError: inv"),
        ("~~~python\npass\n~~~\n<!-- raises -->\n~~~text\nNo\n~~~", "raised\nNone"),
        ("<!-- setup\n1 / 0\n-->", "division by zero"),
    ],
)
def test_wrong_texts_are_seen(tmp_path: Path, block: str, error: str) -> None:
    with pytest.raises((AssertionError, ZeroDivisionError), match=error):
        pages.run(page_of(block), tmp_path)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("<!-- not run -->\n~~~python\n~~~", "needs a value"),
        ("<!-- not run: later -->\n~~~text\n~~~", "not followed by ```python"),
        ("<!-- not run: later -->\ntext", "at the end of the page"),
        ("<!-- prints -->\n~~~python\n~~~", "not followed by ```text"),
        ("<!-- skip: this -->", "unknown marker"),
        ("~~~python\nx = 1", "no '```' ends this"),
    ],
)
def test_markers_are_checked(text: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        page_of(text)


def test_a_block_that_is_not_run_says_why(tmp_path: Path) -> None:
    page = page_of("<!-- not run: 16 ranks -->\n~~~python\n1 / 0\n~~~\n~~~python\nx = 1\n~~~")
    assert page.blocks[0].not_run == "16 ranks"
    assert pages.run(page, tmp_path) == 1
