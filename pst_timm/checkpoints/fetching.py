"""Whether published weights can be had, asked before the client starts to try again and again."""
import os
from typing import Tuple

import timm
from huggingface_hub import model_info, try_to_load_from_cache
from huggingface_hub.constants import (
    HF_HUB_ETAG_TIMEOUT,
    HF_HUB_OFFLINE,
    PYTORCH_WEIGHTS_NAME,
    SAFETENSORS_SINGLE_FILE,
)
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from pst_timm.utils.errors import Unavailable

__all__ = ['check_fetchable', 'is_published']


def is_published(source: str) -> bool:
    """Whether a source of weights is a name (resnet50.a1_in1k, hf-hub:org/name) that means the same everywhere."""
    return not os.path.exists(source) and (source.startswith(('hf-hub:', 'hf_hub:')) or timm.is_model(source))


def check_fetchable(source: str, timeout: float = HF_HUB_ETAG_TIMEOUT) -> None:
    """Make sure that the weights behind a name of timm are here, or that the Hub answers.

    Args:
        source: Name of a model, or what else names weights; only names are looked at.
        timeout: Seconds to wait for the Hub: 10, or what the variable HF_HUB_ETAG_TIMEOUT says.

    Raises:
        Unavailable: If the weights are not in the cache and the Hub cannot be reached.
    """
    if not is_published(source):
        return
    repo, file = _repository(source)
    names = [file] if file else [SAFETENSORS_SINGLE_FILE, PYTORCH_WEIGHTS_NAME]
    if not repo or any(isinstance(try_to_load_from_cache(repo, name), str) for name in names):
        return
    reason = 'HF_HUB_OFFLINE is set'
    if not HF_HUB_OFFLINE:
        try:
            model_info(repo, timeout=timeout)
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


def _repository(source: str) -> Tuple[str, str]:
    """Repository and file of the weights on the Hub, empty where they are elsewhere."""
    if ':' in source:
        return source.split(':', 1)[1].split('@')[0], ''
    try:
        cfg = timm.get_pretrained_cfg(source)
    except RuntimeError:  # no such tag, which timm will say
        return '', ''
    elsewhere = cfg is None or cfg.file or cfg.state_dict
    return ('', '') if elsewhere else (cfg.hf_hub_id or '', cfg.hf_hub_filename or '')
