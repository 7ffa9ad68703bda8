"""Weights by name: tags that `timm.create_model(..., pretrained=True)` serves."""
import dataclasses
import os
import re
import sys
import warnings
from typing import Any, Dict, Optional

import timm
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from timm.models import (
    DefaultCfg,
    PretrainedCfg,
    model_entrypoint,
    register_model,
    split_model_name_tag,
)

from pst_timm.checkpoints.building import build_model
from pst_timm.checkpoints.facts import look_up, resolve_origin
from pst_timm.checkpoints.reading import read_checkpoint
from pst_timm.checkpoints.trust import check_size, is_local_arch
from pst_timm.utils.errors import PSTError, did_you_mean

__all__ = ['register_weights']

FIELDS = {f.name for f in dataclasses.fields(PretrainedCfg)}
# not facts about the weights, but where a configuration came from
ORIGIN = ('architecture', 'tag', 'source', 'file', 'url', 'hf_hub_id', 'hf_hub_filename', 'state_dict')


def register_weights(
        name: str,
        *,
        hf_hub_id: Optional[str] = None,
        file: Optional[os.PathLike] = None,
        default: Optional[bool] = None,
        **cfg: Any,
) -> None:
    """Give weights a name, for this process.

        pst_timm.register_weights('resnet50_pst.acme', hf_hub_id='acme/resnet50_pst')
        model = timm.create_model('resnet50_pst', pretrained=True)

    Class count, preprocessing and class names are those that the weights came with. The model is the architecture as
    it is, coarse attention alone: `topk` of a published model comes with `hf-hub:org/name`, not with a tag.

    Args:
        name: Architecture and tag, as in 'resnet50_pst.acme'. A tag that exists is replaced.
        hf_hub_id: Repository with timm's config.json, 'org/name' or 'org/name@revision'.
        file: Checkpoint, .safetensors file, or folder that holds one.
        default: Whether `pretrained=True` without a tag means these weights; None if there are no others yet.
        cfg: Fields of timm's `PretrainedCfg` that differ from what the weights came with.

    Raises:
        PSTError: If the name, the source or a field is wrong, or the weights are not of that architecture.
    """
    arch, tag = split_model_name_tag(name)
    if not re.fullmatch(r'\w[\w.-]*', tag) or tag == 'untrained':
        raise PSTError(f"{name!r} must be an architecture and a new tag, such as 'resnet50_pst.my_tag'.")
    if not timm.is_model(arch):
        raise PSTError(f'There is no architecture {arch!r}.{did_you_mean(arch, timm.list_models(), 1)}')
    if (hf_hub_id is None) == (file is None):
        raise PSTError(f'{name} needs either hf_hub_id or file.')
    unknown = sorted(set(cfg) - FIELDS.difference(ORIGIN))
    if unknown:
        raise PSTError(
            f'{unknown[0]!r} is no field of a pretrained configuration.{did_you_mean(unknown[0], FIELDS, 1)}')
    facts = _facts_of_file(arch, file) if file is not None else _facts_of_repository(arch, hf_hub_id)
    _register(arch, tag, PretrainedCfg(**{**facts, **cfg}), default)


def _facts_of_file(arch: str, file: os.PathLike) -> Dict[str, Any]:
    checkpoint = read_checkpoint(file)
    if is_local_arch(checkpoint.arch):
        resolve_origin(checkpoint)
    elif checkpoint.arch and ':' in checkpoint.arch:
        checkpoint.arch = None  # what a run began with is not fetched; the weights must fit the one that is named
    if checkpoint.arch not in (None, arch):
        raise PSTError(f'{checkpoint.path} holds weights of {checkpoint.arch}, not of {arch}.')
    # a tag carries no arguments: the weights must fit the architecture as it is
    args = {k: v for k, v in checkpoint.args.items() if k != 'model_kwargs'}
    model = build_model(dataclasses.replace(checkpoint, arch=arch, args=args, model_args={}))
    return dict(_fields(model.pretrained_cfg), file=str(checkpoint.path.resolve()))


def _facts_of_repository(arch: str, hf_hub_id: str) -> Dict[str, Any]:
    try:
        found, model_args, facts = look_up(f'hf-hub:{hf_hub_id}')
    except PSTError as e:
        if not isinstance(e.__cause__, (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError, AssertionError)):
            raise  # it was read
        raise PSTError(
            f'The config.json of {hf_hub_id} can be had neither from the Hub nor from the cache ({e}). Check the '
            f'name, your token and the network.') from e
    if found != arch:
        raise PSTError(f'{hf_hub_id} holds weights of {found}, not of {arch}.')
    sizes = {k: v for k, v in dict(
        num_classes=facts.get('num_classes'), in_chans=facts.get('input_size', (None,))[0]).items() if v is not None}
    if _shapes(hf_hub_id, arch, **{**sizes, **model_args}) != _shapes(hf_hub_id, arch, **sizes):
        raise PSTError(
            f'{hf_hub_id} is {arch} with other arguments ({model_args}), which a tag does not carry: load it as '
            f"'hf-hub:{hf_hub_id}'.")
    return dict(_fields(facts), hf_hub_id=hf_hub_id)


def _fields(facts: Dict[str, Any]) -> Dict[str, Any]:
    return {k: v for k, v in facts.items() if k in FIELDS and k not in ORIGIN}


def _shapes(source: str, arch: str, **kwargs: Any) -> Dict[str, torch.Size]:
    return {k: v.shape for k, v in check_size(source, arch, kwargs).state_dict().items()}


def _register(arch: str, tag: str, cfg: PretrainedCfg, default: Optional[bool]) -> None:
    entrypoint = model_entrypoint(arch)
    cfgs: DefaultCfg = sys.modules[entrypoint.__module__].default_cfgs[arch]
    if tag in cfgs.tags:
        cfgs.tags.remove(tag)
    if default or (default is None and not any(cfgs.cfgs[t].has_weights for t in cfgs.tags)):
        cfgs.tags.appendleft(tag)
    else:
        cfgs.tags.append(tag)
    cfgs.cfgs[tag] = cfg
    cfgs.is_pretrained = True
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # that the entry is overwritten is what is wanted
        register_model(entrypoint)
