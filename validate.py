#!/usr/bin/env python3
from pst_timm.commands.validate import main

if __name__ == '__main__':
    raise SystemExit(main(prog='validate.py'))
