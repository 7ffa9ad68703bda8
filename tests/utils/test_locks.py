"""One process at a time, and never a lock that outlives its process."""
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pst_timm.utils import locks
from pst_timm.utils.locks import Locked, locked

HOLDER = """
import os, signal, sys, time
from pst_timm.utils.locks import locked
with locked(sys.argv[1]):
    if os.fork() == 0:  # a loader worker, which does not notice at once that its parent is dead
        os.close(1)
        time.sleep(60)
        os._exit(0)
    print('held', flush=True)
    time.sleep(60)
"""


def test_only_one_at_a_time(tmp_path):
    path = tmp_path / 'lock'
    with locked(path):
        with pytest.raises(Locked, match=f'process {os.getpid()} on '), locked(path):
            pass
        assert path.is_file()
    assert not path.exists()
    with locked(path):
        assert path.is_file()


def test_a_lock_ends_with_its_process_even_when_a_child_lives_on(tmp_path):
    path = tmp_path / 'lock'
    holder = subprocess.Popen(
        [sys.executable, '-c', HOLDER, str(path)], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert holder.stdout.readline() == 'held\n'
        with pytest.raises(Locked, match=f'process {holder.pid} on '), locked(path):
            pass
        holder.kill()
        holder.wait()
        with locked(path):
            pass
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.communicate()


def test_who_waits_gets_a_lock_of_its_own(tmp_path):
    path, order = tmp_path / 'lock', []

    def wait():
        with locked(path, wait=True):
            order.append('second')
            assert path.is_file()

    with locked(path):
        thread = threading.Thread(target=wait)
        thread.start()
        order.append('first')
    thread.join(30)
    assert order == ['first', 'second'] and not path.exists()


def test_a_folder_that_is_gone_or_made_anew_is_left_alone(tmp_path):
    path = tmp_path / 'lock'
    with locked(path):
        path.unlink()
    with locked(path):
        path.unlink()
        path.write_text('of another')
    assert path.read_text() == 'of another'


def test_where_there_are_no_locks_and_no_open_file_is_removed(tmp_path, monkeypatch, caplog):
    closed = []
    monkeypatch.setattr(locks, 'fcntl', None)
    monkeypatch.setattr(locks.os, 'close', lambda handle, close=os.close: (closed.append(handle), close(handle)))
    unlink = Path.unlink

    def unlink_closed(path, *args, **kwargs):
        if not closed:
            raise PermissionError(13, 'in use by another process')
        unlink(path, *args, **kwargs)

    monkeypatch.setattr(Path, 'unlink', unlink_closed)
    with locked(tmp_path / 'lock'):
        assert 'cannot be locked' in caplog.text
    assert len(closed) == 1 and not (tmp_path / 'lock').exists()
