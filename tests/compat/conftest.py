"""Puts the package `compat` on the path, whatever the import mode."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
