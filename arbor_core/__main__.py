"""`python -m arbor_core serve ...` is `arbor-serve ...`; anything else is `arbor ...`."""

import sys

from .cli.main import main
from .cli.serve import serve

if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        del sys.argv[1]
        serve()
    else:
        main()
