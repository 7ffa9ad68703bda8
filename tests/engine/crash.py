"""train.py that gets a signal at a chosen moment: python crash.py MOMENT FLAGS...

MOMENT is `save:N` for SIGKILL in the middle of writing the Nth checkpoint, or `step:N:SIGNAL` for a signal in the Nth
training step, `step:N:SIGNAL:group` for one to the loader workers as well.
"""
import io
import os
import signal
import sys

import torch

from pst_timm.commands.train import main as train_main
from pst_timm.engine import training


def die_saving(which):
    saves, save = [0], torch.save

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


def signal_in_step(which, number, group):
    steps, backward = [0], training.backward

    def signalled_backward(*args):
        backward(*args)
        steps[0] += 1
        if steps[0] == which:
            (os.killpg if group else os.kill)(os.getpid(), number)

    training.backward = signalled_backward


def main():
    what, which, *rest = sys.argv[1].split(':')
    if what == 'save':
        die_saving(int(which))
    else:
        signal_in_step(int(which), signal.Signals[rest[0]], rest[1:] == ['group'])
    return train_main(sys.argv[2:])


if __name__ == '__main__':
    sys.exit(main())
