"""README and docs/: every block of Python runs, every link leads somewhere, and the site builds without a warning.

The blocks of a page run in order in one process and share their names, as a reader would type them. A comment that no
renderer shows, `<!-- before: code -->` in the line above a block, makes what the reader is said to have. A block whose
package is not installed is left out, and the test is then a skip that says so.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
BLOCK = re.compile(r"(?:^<!-- before: (.+?) -->\n)?^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
RUN_ELSEWHERE = ("integrations.md", "logging.md")  # by test_integrations.py, a process each
if not (ROOT / "docs").exists():
    pytest.skip("not a checkout", allow_module_level=True)


class Block(NamedTuple):
    line: int
    before: str
    code: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [Block(text[: found.start(2)].count("\n") + 1, found[1] or "", found[2]) for found in BLOCK.finditer(text)]


def links(page: Path) -> list[str]:
    """Relative ones, of pictures too; not those in code."""
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"\]\(([^)\s]+)", text) + re.findall(r'(?:src|srcset|href)="([^"]+)"', text)
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def anchors(page: Path) -> set[str]:
    """What a site and a code host make of the headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.MULTILINE)
    given = set(re.findall(r'\bid="([\w-]+)"|\{ ?#([\w-]+) ?\}', page.read_text()))
    made = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
    return made | {name for pair in given for name in pair}


def run(page: Path) -> None:
    """The page's blocks, in this process, which they may patch or join to a group; prints what was left out."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        torch.manual_seed(0)
        # `alone`: where torch.distributed can meet itself, for a group of one rank.
        names: dict[str, Any] = {"__name__": "page", "alone": f"file://{folder}/ranks"}
        for block in blocks(page):
            # The line of an error is that of the page.
            code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(block.before, names)
                    exec(code, names)
            except ModuleNotFoundError as error:
                if str(error.name).startswith("fused_ce"):
                    raise
                print(f"line {block.line} needs {error.name}")
        os.chdir(ROOT)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page) and page.name not in RUN_ELSEWHERE], ids=lambda page: page.name
)
def test_blocks_run(page: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, str(page)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    if result.stdout:
        pytest.skip(", ".join(result.stdout.splitlines()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = page.parent / path.removesuffix("#only-light") if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page.name}: {link}"


def test_every_figure_is_drawn_by_the_script_and_shown(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(ROOT / "docs" / "figures.py"), str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    drawn = {path.name for path in tmp_path.glob("*.svg")}
    assert drawn == {path.name for path in (ROOT / "docs" / "figures").iterdir()}
    shown = {Path(link).name for page in PAGES for link in links(page)}
    assert drawn <= shown


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for package in ("material", "mkdocstrings", "latex2mathml"):
        if importlib.util.find_spec(package) is None:
            pytest.skip("the site needs pip install -e '.[docs]' (make docs)")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert built.returncode == 0, built.stderr
    for page in tmp_path.rglob("*.html"):
        # Nothing is fetched when a page is looked at, and no formula was left as it was typed.
        text = page.read_text()
        fetched = re.findall(
            r'<(?:script|img|iframe)[^>]*\bsrc="(https?:[^"]+)|<link[^>]*stylesheet[^>]*href="(https?:[^"]+)', text
        )
        assert not fetched, page
        assert 'class="arithmatex"' not in text, page


if __name__ == "__main__":
    run(Path(sys.argv[1]))
