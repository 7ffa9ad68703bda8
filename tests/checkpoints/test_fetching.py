"""Weights that cannot be fetched are said to be so, at once."""
import pytest
import timm
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

import pst_timm  # noqa: F401, registers the models
from pst_timm.checkpoints import fetching
from pst_timm.checkpoints.fetching import check_fetchable, is_published
from pst_timm.utils.errors import Unavailable


@pytest.fixture
def asked(monkeypatch):
    """What the Hub is asked for; the Hub does not answer, the cache is empty."""
    repositories = []

    def model_info(repo, revision, timeout):
        repositories.append((repo, revision))
        raise ConnectionError('no route')

    monkeypatch.setattr(fetching, 'model_info', model_info)
    monkeypatch.setattr(fetching, 'try_to_load_from_cache', lambda repo, name, **place: None)
    monkeypatch.setattr(fetching, 'HF_HUB_OFFLINE', False)
    return repositories


@pytest.mark.parametrize('source, repo, revision', [
    ('resnet18.a1_in1k', 'timm/resnet18.a1_in1k', None), ('resnet18', 'timm/resnet18.a1_in1k', None),
    ('hf-hub:org/name', 'org/name', None), ('hf_hub:org/name@v2', 'org/name', 'v2'),
])
def test_names_are_looked_up_once(asked, source, repo, revision):
    with pytest.raises(Unavailable, match=rf'weights of {source} .* cannot be reached \(no route\)'):
        check_fetchable(source)
    assert asked == [(repo, revision)]


def test_what_is_here_is_not_asked_for(asked, monkeypatch, tmp_path):
    file = tmp_path / 'resnet18.a1_in1k'
    file.touch()
    for source in (str(file), 'nowhere.pth', 'no_such_model', 'resnet18.no_such_tag', 'test_resnet_pst.digits'):
        check_fetchable(source)
    monkeypatch.setattr(fetching, 'try_to_load_from_cache', lambda repo, name, **place: '/cache/' + name)
    check_fetchable('resnet18.a1_in1k')
    assert asked == []


def test_offline_mode_is_said(asked, monkeypatch):
    monkeypatch.setattr(fetching, 'HF_HUB_OFFLINE', True)
    with pytest.raises(Unavailable, match='HF_HUB_OFFLINE is set'):
        check_fetchable('resnet18.a1_in1k')
    assert asked == []


def test_a_hub_that_answers_speaks_for_itself(monkeypatch):
    monkeypatch.setattr(fetching, 'HF_HUB_OFFLINE', False)
    for error in (HfHubHTTPError, RepositoryNotFoundError):
        def refuse(repo, revision, timeout, error=error):
            raise error.__new__(error)

        monkeypatch.setattr(fetching, 'model_info', refuse)
        check_fetchable('resnet18.a1_in1k')


def test_names_and_paths_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert timm.is_model('resnet18') and is_published('resnet18.a1_in1k') and is_published('hf-hub:org/name')
    (tmp_path / 'resnet18').touch()
    for path in ('resnet18', 'some/resnet18', 'last.pth.tar', 'local-dir:some/folder', ''):
        assert not is_published(path)
