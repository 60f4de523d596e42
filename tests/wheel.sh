#!/usr/bin/env bash
# A wheel as whoever installs it meets it: `tests/wheel.sh WHEEL [TORCH]`, in an empty environment and without the
# checkout, a compiler or any other program in reach. TORCH: what pip is given for it. PYTHON picks the interpreter.
set -euo pipefail
wheel=$(realpath "$1") torch=${2:-torch==2.13.0} checkout=$(realpath "$(dirname "$0")/..")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
cd "$folder"
venv/bin/pip install --quiet "$torch" "$wheel" pytest numpy
alone() { env -i HOME="$folder" PATH="$folder/venv/bin" venv/bin/python "$@"; }

alone -m fused_ce
# Two OpenMP libraries would not share their threads; and the wheel's own module, not a checkout's, is what ran.
alone - <<'E2'
import pathlib
import torch
import fused_ce
from fused_ce import _C

fused_ce.cross_entropy(torch.randn(512, 1000), torch.randint(1000, (512,)))
maps = pathlib.Path("/proc/self/maps").read_text()
found = {line.split()[-1] for line in maps.splitlines() if "gomp" in line or "iomp" in line}
assert len(found) == 1 and "torch" in found.pop(), found
assert "site-packages" in _C.__file__ and _C.__file__.endswith(".abi3.so"), _C.__file__
E2
alone "$checkout/tests/test_docs.py" "$checkout/README.md"
echo "$(basename "$wheel"): passed on $(venv/bin/python --version), torch $(venv/bin/python -c 'import torch; print(torch.__version__)')"
