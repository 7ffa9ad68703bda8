"""A Hub for each test, and a client that finds it: in this process, and in new ones."""
import copy
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http
from timm.models import _registry

from pst_timm.models import resnet_pst
from pst_timm.utils.waiting import THREAD
from tests.hub_server import HubServer

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
TOKEN = 'hf_alice'


@pytest.fixture
def registry():
    """timm's registry as it was, after the test."""
    kept = {k: copy.deepcopy(v) for k, v in vars(_registry).items() if k.startswith('_model_')}
    default_cfgs = copy.deepcopy(resnet_pst.default_cfgs)
    yield
    for k, v in kept.items():
        getattr(_registry, k).clear()
        getattr(_registry, k).update(v)
    resnet_pst.default_cfgs.clear()
    resnet_pst.default_cfgs.update(default_cfgs)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server that knows Alice of acme, and Bob; this process is Alice, who never waits between attempts."""
    with HubServer(tmp_path / 'hub') as server:
        server.add_user('alice', TOKEN, orgs=('acme',))
        server.add_user('bob', 'hf_bob')
        cache = tmp_path / 'cache'
        environment = server.environment(cache, TOKEN)
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        monkeypatch.setattr(constants, 'ENDPOINT', server.url)
        monkeypatch.setattr('huggingface_hub.hf_api.api.endpoint', server.url)  # it was made with the module
        monkeypatch.setattr(
            constants, 'HUGGINGFACE_CO_URL_TEMPLATE', server.url + '/{repo_id}/resolve/{revision}/{filename}')
        monkeypatch.setattr(constants, 'HF_HUB_CACHE', environment['HF_HUB_CACHE'])
        monkeypatch.setattr(constants, 'HF_TOKEN_PATH', environment['HF_TOKEN_PATH'])
        monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
        patient = SimpleNamespace(sleep=lambda seconds: None)
        for module in (_http, file_download):
            monkeypatch.setattr(module, 'time', patient)
        monkeypatch.setattr('pst_timm.hub.upload.time', patient)
        server.cache = cache
        yield server
    for thread in threading.enumerate():
        if thread.name == THREAD:  # left behind by a call that took too long; it would close files of the next test
            thread.join(timeout=20)
    huggingface_hub.close_session()


@pytest.fixture
def python(hub):
    """Runs code in a new process that finds the same Hub; returns what it prints."""
    def run(code, check=True, **environment):
        done = subprocess.run(
            [sys.executable, '-c', code], capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
            env={**os.environ, 'PYTHONPATH': ROOT, 'OMP_NUM_THREADS': '1', **environment}, cwd=hub.folder)
        if check:
            assert done.returncode == 0, done.stderr
        return done
    return run
