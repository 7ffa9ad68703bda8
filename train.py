#!/usr/bin/env python3
# models are registered when the work begins, so that the help does not wait for torch
__pst_timm_command__ = True

from pst_timm.commands.train import main

if __name__ == '__main__':
    raise SystemExit(main(prog='train.py'))
