"""What mkdocs is told beyond mkdocs.yml: formulas as MathML, and links from a page to a file outside of docs/."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)")
# What pymdownx.arithmatex leaves of $inline$ and $$display$$.
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Files of the repository that a page links to come along, below source/."""
    for page in files.documentation_pages():
        for path in OUTSIDE.findall(page.content_string):
            if (ROOT / path).is_file() and files.get_file_from_path(f"source/{path}") is None:
                files.append(File.generated(config, f"source/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return OUTSIDE.sub(r"](source/\1", markdown)


def on_page_content(content: str, **_: Any) -> str:
    def as_mathml(found: re.Match[str]) -> str:
        display = "block" if found[1] == "div" else "inline"
        return convert(html.unescape(found[2].strip()), display=display)

    return FORMULA.sub(as_mathml, content)
