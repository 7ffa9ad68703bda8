"""Weights by name: tags that `timm.create_model(..., pretrained=True)` serves."""
import dataclasses
import os
import re
import shlex
import sys
import warnings
from collections import deque
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Union

import timm
import torch.nn as nn
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from timm.models import (
    DefaultCfg,
    PretrainedCfg,
    load_state_dict,
    model_entrypoint,
    register_model,
    split_model_name_tag,
)

from pst_timm.checkpoints.building import build_model, told_args
from pst_timm.checkpoints.facts import look_up, resolve_origin
from pst_timm.checkpoints.reading import read_checkpoint
from pst_timm.checkpoints.rules import printable
from pst_timm.checkpoints.trust import check_size, is_local_arch
from pst_timm.utils.errors import PSTError, did_you_mean
from pst_timm.utils.fitting import misfits

__all__ = ['register_weights']

FIELDS = {f.name for f in dataclasses.fields(PretrainedCfg)}
# not facts about the weights, but where a configuration came from
ORIGIN = ('architecture', 'tag', 'source', 'file', 'url', 'hf_hub_id', 'hf_hub_filename', 'state_dict')
# arguments that a tag has from its configuration, or that have no say in the answers of coarse attention
NO_SAY = re.compile(
    r'num_classes|in_chans|topk|fine_fusion|train_topk|train_fine_prob|(\w+_)?drop(_\w+)?_rate|bn_momentum|'
    r'(pst_)?zero_init(_last)?|weight_init|fix_init|scriptable|exportable|no_jit')
PLAIN = (bool, int, float, str, type(None))


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
        default: Whether `pretrained=True` without a tag means these weights; None for a new tag if there are no others
            yet, and for one that is replaced if it did.
        cfg: Fields of timm's `PretrainedCfg` that differ from what the weights came with.

    Raises:
        PSTError: If the name, the source or a field is wrong, or the weights are not of that architecture, are of it
            with other arguments, or lie in a file in a way that timm does not know.
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
    told = _with_a_say(told_args(checkpoint))
    args = {k: v for k, v in checkpoint.args.items() if k not in ('gp', 'model_kwargs')}
    model = build_model(dataclasses.replace(checkpoint, arch=arch, args=args, model_args=told))
    facts = _fields(model.pretrained_cfg)
    _check_args(checkpoint.path, arch, told, facts, f"with pst_timm.load_model('{checkpoint.path}')")
    _check_layout(checkpoint.path, arch, model)
    return dict(facts, file=str(checkpoint.path.resolve()))


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
    _check_args(hf_hub_id, arch, _with_a_say(model_args), _fields(facts), f"as 'hf-hub:{hf_hub_id}'")
    return dict(_fields(facts), hf_hub_id=hf_hub_id)


def _fields(facts: Mapping[str, Any]) -> Dict[str, Any]:
    return {k: v for k, v in facts.items() if k in FIELDS and k not in ORIGIN}


def _with_a_say(told: Mapping[str, Any]) -> Dict[str, Any]:
    return {k: v for k, v in told.items() if not NO_SAY.fullmatch(k)}


def _check_args(
        source: Union[str, os.PathLike],
        arch: str,
        told: Mapping[str, Any],
        facts: Mapping[str, Any],
        instead: str,
) -> None:
    """Make sure that weights are those of an architecture as it is, since a tag carries no arguments.

    Arguments may change what a model computes and none of its shapes: pooling, strides, activations.

    Args:
        source: Where the weights are, for the message.
        arch: Architecture.
        told: Arguments with a say that came with the weights.
        facts: Configuration of the tag.
        instead: How they can be loaded, for the message.

    Raises:
        PSTError: If the model is another one with these arguments than without, or cannot be made.
    """
    if not told:
        return
    made, plain = (_makeup(check_size(source, arch, {**args, 'pretrained_cfg': dict(facts)})) for args in (told, {}))
    if made != plain:
        raise PSTError(
            f'{source} is {arch} with other arguments ({printable(str(told)[:500])}), which a tag does not carry: load '
            f'it {instead}.')


def _makeup(model: nn.Module) -> Dict[str, Any]:
    """What tells models of the same code apart: the shapes of their weights, their layers, and what these note."""
    layers = {
        name: (type(m), {k: repr(v) for k, v in vars(m).items() if _is_plain(v)}) for name, m in model.named_modules()}
    return dict(layers=layers, shapes={k: v.shape for k, v in model.state_dict().items()})


def _is_plain(value: Any) -> bool:
    values = value if isinstance(value, (list, tuple)) else [value]
    return all(isinstance(v, PLAIN) for v in values)


def _check_layout(path: Path, arch: str, model: nn.Module) -> None:
    """Make sure that timm finds in a file what `read_checkpoint` found there, which looks deeper.

    Raises:
        PSTError: If it does not.
    """
    try:
        fits = not misfits(model.state_dict(), load_state_dict(str(path)))
    except Exception:  # whatever timm makes of a mapping that it does not know
        fits = False
    if not fits:
        raise PSTError(
            f'timm does not find the weights in {path}, which are under other names than it knows: write them as '
            f'pst-timm convert {shlex.quote(str(path))} FILE.safetensors --model {arch} does, and register that file.')


def _register(arch: str, tag: str, cfg: PretrainedCfg, default: Optional[bool]) -> None:
    entrypoint = model_entrypoint(arch)
    cfgs: DefaultCfg = sys.modules[entrypoint.__module__].default_cfgs[arch]
    others = [t for t in cfgs.tags if t != tag]
    if default is None and tag not in cfgs.tags:
        default = not any(cfgs.cfgs[t].has_weights for t in others)
    if default:
        place = 0
    elif tag in cfgs.tags and (default is None or cfgs.tags[0] != tag):
        place = cfgs.tags.index(tag)
    else:  # before what has no weights, but for what it has to leave the first place to
        place = next((i for i, t in enumerate(others) if i and not cfgs.cfgs[t].has_weights), len(others))
    others.insert(place, tag)
    cfgs.tags = deque(others)
    cfgs.cfgs[tag] = cfg
    cfgs.is_pretrained = True
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # that the entry is overwritten is what is wanted
        register_model(entrypoint)
