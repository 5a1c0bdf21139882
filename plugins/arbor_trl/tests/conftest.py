"""Puts what the test files share on the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # trl_templates.py, whatever the import mode
