"""Files from the Hub, within a time, and whether they can be had at all."""
import os
from pathlib import Path
from typing import Any, Mapping, Optional, Tuple

import timm
from huggingface_hub import (
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    model_info,
    try_to_load_from_cache,
)
from huggingface_hub.constants import (
    HF_HUB_ETAG_TIMEOUT,
    HF_HUB_OFFLINE,
    PYTORCH_WEIGHTS_NAME,
    SAFETENSORS_SINGLE_FILE,
)
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HTTPError
from timm.models._builder import _resolve_pretrained_source  # where timm would look; timm exports none of these
from timm.models._hub import _EXT_PRIORITY, _PREFERRED_FILES, _get_safe_alternatives, hf_split

from pst_timm.utils.errors import PSTError, Unavailable
from pst_timm.utils.waiting import SLOWEST, TIMEOUT, Silent, in_time

__all__ = ['check_fetchable', 'fetch', 'find_pretrained', 'is_published']


def is_published(source: str) -> bool:
    """Whether a source of weights is a name (resnet50.a1_in1k, hf-hub:org/name) that means the same everywhere."""
    return not os.path.exists(source) and (source.startswith(('hf-hub:', 'hf_hub:')) or timm.is_model(source))


def check_fetchable(
        source: str,
        timeout: float = HF_HUB_ETAG_TIMEOUT,
        cache_dir: Optional[os.PathLike] = None,
) -> None:
    """Make sure that the weights behind a name of timm are here, or that the Hub answers.

    Args:
        source: Name of a model, or what else names weights; only names are looked at.
        timeout: Seconds to wait for the Hub: 10, or what the variable HF_HUB_ETAG_TIMEOUT says.
        cache_dir: See `fetch`.

    Raises:
        Unavailable: If the weights are not in the cache and the Hub cannot be reached.
    """
    if not is_published(source):
        return
    repo, revision, file = _repository(source)
    names = [file] if file else [SAFETENSORS_SINGLE_FILE, PYTORCH_WEIGHTS_NAME]
    place = dict(revision=revision, cache_dir=cache_dir)
    if not repo or any(isinstance(try_to_load_from_cache(repo, name, **place), str) for name in names):
        return
    reason = 'HF_HUB_OFFLINE is set'
    if not HF_HUB_OFFLINE:
        try:
            model_info(repo, revision=revision, timeout=timeout)
            return
        except HfHubHTTPError:
            return  # it answers; what it has to say, it says again when the weights are fetched
        except (HTTPError, OSError) as e:
            reason = str(e) or type(e).__name__
            if 'timed out' in reason or 'Timeout' in type(e).__name__:
                reason = f'no answer within {timeout:g} s; HF_HUB_ETAG_TIMEOUT=SECONDS waits longer'
    raise Unavailable(
        f'The weights of {source} are not in the cache, and the Hub cannot be reached ({reason}). Go online for the '
        f'first time, or name a file.')


def fetch(repo: str, name: str, cache_dir: Optional[os.PathLike] = None) -> Path:
    """A file of a repository, from the cache or the Hub.

    A minute is waited for, or as many seconds as the variable HF_HUB_DOWNLOAD_TIMEOUT says, and beside that as long as
    the file takes at 128 KiB/s. A Hub that is silent is no fault where the file is in the cache.

    Args:
        repo: Repository, 'org/name' or 'org/name@revision'.
        name: The file.
        cache_dir: Folder of the cache, that of the client if None.

    Raises:
        Unavailable: If the Hub does not answer in time.
        OSError: If it answers that there is no such file or repository, or cannot be reached.
    """
    repo, revision = hf_split(repo)
    place = dict(revision=revision, cache_dir=cache_dir)
    timeout = float(os.environ.get('HF_HUB_DOWNLOAD_TIMEOUT') or TIMEOUT)
    message = (
        f'The Hub did not send {name} of {repo} in time, at first within {timeout:g} s: try again later, or set '
        f'HF_HUB_DOWNLOAD_TIMEOUT=SECONDS to wait longer.')
    cached = try_to_load_from_cache(repo, name, **place)
    if isinstance(cached, str):
        size = os.path.getsize(cached)
    else:
        try:
            url = hf_hub_url(repo, name, revision=revision)
            size = in_time(lambda: get_hf_file_metadata(url), timeout, message).size or 0
        except (HTTPError, OSError):
            size = 0  # what is amiss, the download says
    try:
        return Path(in_time(lambda: hf_hub_download(repo, name, **place), timeout + size / SLOWEST, message))
    except Silent:
        if isinstance(cached, str):
            return Path(cached)
        raise


def find_pretrained(cfg: Mapping[str, Any], cache_dir: Optional[os.PathLike] = None) -> Optional[Path]:
    """The file that timm would take the weights of a configuration from, fetched; None where it is none of torch's.

    Args:
        cfg: A pretrained configuration of timm.
        cache_dir: See `fetch`.

    Raises:
        PSTError: If a folder has no weights, or as `fetch`.
    """
    source, place = _resolve_pretrained_source(dict(cfg))
    if cfg.get('custom_load') or not place:
        return None
    if source == 'file':
        return Path(place)
    if source == 'local-dir':
        return _find_in_folder(Path(place))
    if source != 'hf-hub':
        return None
    repo, name = place if isinstance(place, tuple) else (place, PYTORCH_WEIGHTS_NAME)
    for other in _get_safe_alternatives(name):
        try:
            return fetch(repo, other, cache_dir)
        except EntryNotFoundError:
            pass
    return fetch(repo, name, cache_dir)


def _find_in_folder(folder: Path) -> Path:
    found = [folder / name for name in _PREFERRED_FILES if (folder / name).exists()]
    for ending in _EXT_PRIORITY:
        found += sorted(folder.glob(f'*{ending}'))
    if not found:
        raise PSTError(f'There are no weights in {folder}.')
    return found[0]


def _repository(source: str) -> Tuple[str, Optional[str], str]:
    """Repository, revision and file of the weights on the Hub, empty where they are elsewhere."""
    nowhere = '', None, ''
    try:
        if ':' in source:
            return *hf_split(source.split(':', 1)[1]), ''
        cfg = timm.get_pretrained_cfg(source)
        if cfg is None or cfg.file or cfg.state_dict:
            return nowhere
        return *hf_split(cfg.hf_hub_id or ''), cfg.hf_hub_filename or ''
    except (RuntimeError, AssertionError):  # no such tag, or two revisions, which timm will say
        return nowhere
