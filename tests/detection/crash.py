"""`pst-timm detect train` that gets a signal after a training step: python crash.py step:N:SIGNAL FLAGS...

See tests/engine/crash.py.
"""
import signal
import sys

from pst_timm.cli import main
from tests.engine.crash import signal_in_step

if __name__ == '__main__':
    _, step, name = sys.argv[1].split(':')
    signal_in_step(int(step), signal.Signals[name], group=False)
    sys.exit(main(['detect', 'train', *sys.argv[2:]]))
