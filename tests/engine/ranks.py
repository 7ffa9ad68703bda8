"""train.py for several configurations, one after the other: torchrun ranks.py FOLDER...

Each FOLDER has a config.yaml, and gets what rank N says in stderrN.txt. Every run is a fork of a rank that has imported
all and done nothing, for imports take longer than these runs.
"""
import os
import sys
import traceback
from pathlib import Path
from typing import Callable

from pst_timm.commands.train import main as train_main
from pst_timm.engine import training  # noqa: F401  (what the command imports when it is called)


def train_in_fork(folder: Path, attempt: int) -> int:
    """Run train.py in a child; returns its exit code."""
    pid = os.fork()
    if pid == 0:
        # torch's shared store keeps the addresses of the run before under its number
        os.environ['TORCHELASTIC_RESTART_COUNT'] = str(attempt)
        code = 1
        try:
            with open(folder / f'stderr{os.environ["RANK"]}.txt', 'w') as f:
                os.dup2(f.fileno(), 2)
            code = train_main(['--config', str(folder / 'config.yaml')])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(before: Callable[[str], None] = lambda folder: None) -> int:
    """Run those of all folders, each after a call with its name; returns the first exit code that is not 0."""
    for attempt, folder in enumerate(sys.argv[1:]):
        before(folder)
        code = train_in_fork(Path(folder), attempt)
        if code:
            return code
    return 0


if __name__ == '__main__':
    sys.exit(main())
