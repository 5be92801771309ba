"""What the suites of `benchmarks/run.py` share: machine, materials, trainers that take turns, figures, and how they are told."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs" / "benchmarks.md"
STAND_INS = ROOT / "benchmarks" / "stand_ins"

for _place in (ROOT / "src", ROOT / "tests"):
    if str(_place) not in sys.path:
        sys.path.insert(0, str(_place))
