"""For `python -m benchmarks.NAME`: the files import each other by name, as they do under `python benchmarks/NAME.py`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
