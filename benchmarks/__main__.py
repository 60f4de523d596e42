"""`python -m benchmarks`, which `make bench` calls: the same as `python -m benchmarks.cross_entropy`."""

import sys

from cross_entropy import main

sys.exit(main())
