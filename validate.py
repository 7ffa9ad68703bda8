#!/usr/bin/env python3
from pst_timm.cli import validate_main

if __name__ == '__main__':
    raise SystemExit(validate_main())
