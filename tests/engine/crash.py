"""train.py that dies by SIGKILL while it writes a checkpoint: python crash.py WHICH_SAVE FLAGS..."""
import io
import os
import signal
import sys

import torch

from pst_timm.cli import train_main


def main():
    which, saves, save = int(sys.argv[1]), [0], torch.save

    def dying_save(state, path):
        saves[0] += 1
        if saves[0] < which:
            return save(state, path)
        whole = io.BytesIO()
        save(state, whole)
        with open(path, 'wb') as f:
            f.write(whole.getvalue()[:whole.tell() // 2])
            f.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = dying_save
    train_main(sys.argv[2:])


if __name__ == '__main__':
    main()
