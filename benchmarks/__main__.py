"""`python -m benchmarks`, which `make bench` calls: the same as `python benchmarks/cross_entropy.py`."""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
runpy.run_module("cross_entropy", run_name="__main__", alter_sys=True)
