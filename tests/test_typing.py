"""Type checkers see every argument: they report each mistake in `typing_mistakes.py`, and nothing else there."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILE = Path(__file__).with_name("typing_mistakes.py")
PLANTED = {i for i, line in enumerate(FILE.read_text().splitlines(), 1) if line.endswith("# mistake")}


def output_of(tool: str, *arguments: object) -> str:
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed")
    if not (ROOT / "fused_ce").exists():
        pytest.skip("not a checkout")
    command = [sys.executable, "-m", tool, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1, result.stdout + result.stderr  # 0: nothing reported; 2: it did not run
    return result.stdout


# Torch takes half a minute where no cache is found, and `make lint` leaves one.
def test_mypy() -> None:
    messages = [json.loads(line) for line in output_of("mypy", "--strict", "--output=json", FILE).splitlines()]
    errors = [message for message in messages if message["severity"] == "error"]
    assert {error["file"] for error in errors} == {str(FILE.relative_to(ROOT))}
    assert {error["line"] for error in errors} == PLANTED


def test_pyright(tmp_path: Path) -> None:
    settings = tmp_path / "pyrightconfig.json"
    settings.write_text(
        json.dumps({"include": [str(FILE)], "extraPaths": [str(ROOT)], "typeCheckingMode": "strict"}),
    )
    printed = output_of("basedpyright", "-p", settings, "--pythonpath", sys.executable, "--outputjson")
    errors = [found for found in json.loads(printed)["generalDiagnostics"] if found["severity"] == "error"]
    assert {error["range"]["start"]["line"] + 1 for error in errors} == PLANTED


SIGNATURES = [
    ("functional.py", "cross_entropy"),
    ("module.py", "__init__"),
    ("linear/functional.py", "linear_cross_entropy"),
    ("linear/module.py", "__init__"),
]


@pytest.mark.parametrize(("file", "name"), SIGNATURES)
def test_overloads_repeat_the_signature(file: str, name: str) -> None:
    """Only return_stats (and self, which carries its meaning) may differ between the overloads."""
    spec = importlib.util.find_spec("fused_ce")
    assert spec is not None
    assert spec.origin is not None
    functions = [
        node
        for node in ast.walk(ast.parse((Path(spec.origin).parent / file).read_text()))
        if isinstance(node, ast.FunctionDef) and node.name == name
    ]
    signatures = []
    for function in functions:
        arguments = function.args
        for argument in (*arguments.args, *arguments.kwonlyargs):
            if argument.arg in ("self", "return_stats"):
                argument.annotation = None
        place = [argument.arg for argument in arguments.kwonlyargs].index("return_stats")
        arguments.kw_defaults[place] = None
        signatures.append(ast.unparse(arguments))
    assert len(signatures) == 4
    assert len(set(signatures)) == 1
