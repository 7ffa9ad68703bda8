"""`python -m pst_timm` is `pst-timm`."""
import sys

from .cli import main

if __name__ == '__main__':
    sys.exit(main())
