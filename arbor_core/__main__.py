"""`python -m arbor_core serve ...` is `arbor-serve ...`; anything else is `arbor ...`."""

import sys

from .cli import main, serve

if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        del sys.argv[1]
        serve()
    else:
        main()
