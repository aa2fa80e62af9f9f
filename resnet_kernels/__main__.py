"""python -m resnet_kernels: see cli/main.py."""

import sys
import warnings

from .cli.main import main

if __name__ == "__main__":
    # A warning about a fallback is a line of text here, not a traceback's.
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    sys.exit(main())
