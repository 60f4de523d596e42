"""What is said where the C++ kernels are missing: a fault, unless the package was built without them on purpose."""

from __future__ import annotations

import warnings
from importlib import import_module, metadata
from pathlib import Path


def reason() -> str:
    """Why the kernels are missing, where, and what to do; empty where they are there."""
    try:
        import_module("._C", __package__)
    except ImportError as error:
        folder = Path(__file__).resolve().parent
        said = f"the C++ kernels of the fused_ce in {folder} cannot be loaded ({error})"
        if (folder.parent / "setup.py").exists():
            return (
                f"{said}. That is a source folder, found before any installed fused_ce: build them there with "
                f"`pip install -e {folder.parent}`, or start Python in another folder"
            )
        return f"{said}. Install it again, with `pip install .` in its checkout"
    return ""


def left_out() -> bool:
    """Whether they were left out at installation (FUSED_CE_BUILD=0), which makes the wheel one of Python alone."""
    try:
        wheel = metadata.distribution("fused_ce").read_text("WHEEL")
    except metadata.PackageNotFoundError:
        return False
    return "Root-Is-Purelib: true" in (wheel or "")


def warn() -> None:
    """Without this, the only sign would be torch's speed."""
    if (text := reason()) and not left_out():
        # At the third level stands the program's own line that imports fused_ce.
        warnings.warn(f"{text}; until then calls on the CPU run torch's own operators.", RuntimeWarning, stacklevel=3)
