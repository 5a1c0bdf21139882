"""The engine process: `python -m arbor_transformers <dir>/spec.json`.

Says in `<dir>/ready.json` where it listens. Ends at once when its standard input does, because its parent is gone
then; ends quickly on SIGTERM. A model that cannot be served is exit code 3 and one line.
"""

import os
import signal
import sys
import threading

from arbor_core.engine import PR_SET_PDEATHSIG, prctl


def end_with_parent() -> None:
    """Leave when standard input ends, without asking anyone: the process may hang in whatever it does."""
    while os.read(0, 4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # one that was stopped reads nothing
    threading.Thread(target=end_with_parent, daemon=True).start()  # before the imports, which take seconds
    from .process import main

    status = main()
    sys.stderr.flush()
    os._exit(status)  # threads of the libraries must not keep a process that has nothing left to do
