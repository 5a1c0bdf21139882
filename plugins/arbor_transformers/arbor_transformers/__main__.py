"""The engine process: `python -m arbor_transformers <dir>/spec.json`.

Says in `<dir>/ready.json` where it listens. Ends at once when its standard input does, because its parent is gone
then; ends quickly on SIGTERM. A model that cannot be served is exit code 3 and one line.
"""

import os
import sys

from arbor_core.engine import end_with_parent

if __name__ == "__main__":
    end_with_parent()  # before the imports, which take seconds
    from .process import main

    status = main()
    sys.stderr.flush()
    os._exit(status)  # threads of the libraries must not keep a process that has nothing left to do
