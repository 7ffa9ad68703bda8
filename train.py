#!/usr/bin/env python3
from pst_timm.cli import train_main

if __name__ == '__main__':
    raise SystemExit(train_main())
