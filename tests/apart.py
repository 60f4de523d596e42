"""A fused_ce that lies in a folder of its own, run as if it were the only one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments; an editable install, which would find what the folder lacks, is not seen."""
    (folder / "sitecustomize.py").write_text(
        "import sys\nsys.meta_path[:] = [finder for finder in sys.meta_path if '__editable__' not in repr(finder)]\n"
    )
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=folder, env=environment)
