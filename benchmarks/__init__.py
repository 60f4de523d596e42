"""For `python -m benchmarks.NAME`: its files import each other by name, as under `python benchmarks/NAME.py`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
