"""From whatever holds trained weights to the weights and what is known about them; no code in it is run."""
import argparse
import errno
import io
import json
import logging
import math
import os
import pickletools
import threading
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Dict, Iterable, Iterator, List, Optional, Tuple, Union

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models import clean_state_dict, is_model

from pst_timm.utils.errors import PSTError

from .rules import printable, short
from .schema import check_facts, parse_json
from .trust import check_ordinary, read_model_config

__all__ = [
    'FACTS_KEY', 'HEADER_KEY', 'PICKLES', 'Checkpoint', 'Damaged', 'check_archive', 'check_dense', 'check_finite',
    'check_folder', 'check_numbers', 'check_weights', 'check_whole', 'clean_names', 'facts_in', 'find_weights',
    'has_weights_ending', 'is_file', 'read_checkpoint', 'tensors_in',
]

_logger = logging.getLogger(__name__)

HEADER_KEY = 'pst_timm'  # entry of a safetensors header that holds what is known about the weights, as JSON
FACTS_KEY = 'facts'  # entry of a training checkpoint that holds the same, see `facts`
PREFERRED = ('model_best.pth.tar', 'last.pth.tar')  # in the folder of a run
AVERAGED = ('state_dict_ema', 'model_ema')  # where training scripts keep a moving average
TRAINED = ('state_dict', 'model', 'model_state_dict')
SAFETENSORS = '.safetensors'
PICKLES = ('.tar', '.pth', '.pt', '.bin', '.ckpt', '.pkl')  # read as data, or refused
WRAPPER = 'model.'  # what training scripts that keep the network in a module put before every name
MOST_NESTED, MOST_PARTS = 20, 100_000  # tuples within tuples in a pickle; those of torch are 4 deep, and small
# with its name, so that timm, which allows it for a while too, does not take this entry away
NAMESPACE = argparse.Namespace, 'argparse.Namespace'
_LOCK = threading.Lock()  # what torch allows in a pickle, it allows in the whole process
PathLike = Union[str, os.PathLike]


@dataclass
class Checkpoint:
    """Weights and what is known about them."""
    path: Path
    """File the weights were read from."""
    weights: Dict[str, torch.Tensor]
    """State dict of the model."""
    arch: Optional[str] = None
    """Name of the architecture in timm, None if the file does not tell."""
    args: Dict[str, Any] = field(default_factory=dict)
    """Arguments of the training run."""
    model_args: Dict[str, Any] = field(default_factory=dict)
    """Arguments of `timm.create_model` that the weights need."""
    detector: Dict[str, Any] = field(default_factory=dict)
    """Arguments of `pst_timm.detection.create_detector`, where the weights are those of a detector."""
    pretrained_cfg: Dict[str, Any] = field(default_factory=dict)
    """Preprocessing and class names, as in timm's config.json."""
    recipe: Dict[str, Any] = field(default_factory=dict)
    """Flags of the training run that differ from their defaults and make it what it was."""
    epoch: Optional[int] = None
    metric: Optional[float] = None
    """Value of the run's evaluation metric at that epoch."""
    ema: Optional[bool] = None
    """Whether the weights are the moving average; None if the file does not tell."""

    def facts(self) -> Dict[str, Any]:
        """All but path and weights, fit for JSON."""
        facts = {k: v for k, v in vars(self).items() if k not in ('path', 'weights') and v not in (None, {})}
        if not math.isfinite(facts.get('metric', 0.)):
            del facts['metric']  # of a run that diverged: JSON has no such number
        return json.loads(json.dumps(facts, default=str))


def is_file(source: PathLike) -> bool:
    """Whether a source is meant as a file or folder; a model's name is no folder that happens to be called alike."""
    if not isinstance(source, str):
        return isinstance(source, os.PathLike)
    if source.startswith(('hf-hub:', 'hf_hub:', 'local-dir:')):
        return False
    # resnet50.pth is a file, although timm takes what follows the point for a tag; and pruned is a folder, as that
    # architecture is made of another one, which no name tells
    named = os.sep not in source and source != 'pruned' and is_model(source)
    return has_weights_ending(source) or (os.path.exists(source) and not named)


def has_weights_ending(path: PathLike) -> bool:
    """Whether a file is named as files of weights are."""
    return Path(path).suffix in (SAFETENSORS, *PICKLES)


def read_checkpoint(path: PathLike, use_ema: Optional[bool] = None) -> Checkpoint:
    """Read weights and what is known about them.

    Args:
        path: Folder of a training run (its best checkpoint), training checkpoint, .safetensors file, or folder with
            timm's config.json.
        use_ema: Whether to take the moving average of a training checkpoint; None takes it where there is one.

    Raises:
        PSTError: If there is no such thing, it is damaged, holds more than tensors and plain values, says of itself
            what cannot be, or does not have the weights that are asked for.
    """
    path = _find_file(Path(path))
    check_whole(path)
    checkpoint = _read_safetensors(path) if path.suffix == SAFETENSORS else _read_pickle(path, use_ema)
    if use_ema is not None and use_ema != bool(checkpoint.ema):
        found, flag = ('no', '--use-ema') if use_ema else ('only the', '--no-use-ema')
        raise PSTError(f'{path} holds {found} moving average (EMA): leave out {flag} to take the weights it has.')
    check_dense(checkpoint.weights.items(), path)
    check_finite(checkpoint)
    if checkpoint.ema is not None:
        _logger.info(f'{path}: {"the moving average (EMA)" if checkpoint.ema else "the weights as trained, no EMA"}.')
    return checkpoint


def _find_file(path: Path) -> Path:
    if path.is_dir():
        names = [*PREFERRED, 'model.safetensors']
        found = [path / name for name in names if (path / name).exists()]
        if not found:
            raise PSTError(
                f'{path} has neither config.json with model.safetensors nor a checkpoint of a training run '
                f'({", ".join(PREFERRED)}): name the file itself.')
        return found[0]
    if not os.path.lexists(path):
        raise PSTError(f'There is no checkpoint {path}.')
    if path.suffix == '.json':
        raise PSTError(
            f'{path} is not a checkpoint. A cascade is run by pst-timm cascade run, and measured by pst-timm validate; '
            f'all else takes its stages one by one: name one of them.')
    if path.suffix and not has_weights_ending(path):
        raise PSTError(f'{path} is not a checkpoint: expected {SAFETENSORS}, {", ".join(PICKLES)}, or a folder.')
    return path


def check_folder(folder: Path) -> None:
    """Make sure that the files of weights in a folder, of which timm will take one, can be opened and are whole.

    Raises:
        PSTError: If one is not.
    """
    if not folder.is_dir():
        raise PSTError(f'There is no folder {folder}.')
    for path in sorted(folder.iterdir()):
        if has_weights_ending(path):
            check_whole(path)


class Damaged(PSTError):
    """A file of weights that is there and can be opened, but is no use."""


def check_whole(path: Path, sums: bool = True) -> None:
    """Make sure that a file of weights is an ordinary file, and holds what was once written to it.

    A training checkpoint has a checksum for each of its parts. A .safetensors file has none: there, its reader compares
    lengths. Neither has a file that torch wrote before version 1.6.

    Args:
        path: The file.
        sums: Whether to check the sums too, which reads the whole file.

    Raises:
        Damaged: If it is truncated, corrupt, or would keep its reader busy for ever.
        PSTError: If it is missing, no ordinary file, or cannot be opened, which says nothing about what is in it.
    """
    path = Path(path)
    if not os.path.lexists(path):
        raise PSTError(f'There is no checkpoint {path}.')
    check_ordinary(path)
    if path.suffix == SAFETENSORS:
        return
    broken = None
    try:
        with open(path, 'rb') as file:
            if file.read(1) == b'\x80':  # bare pickles, of an old version: three numbers, the content, the storages
                file.seek(0)
                for _ in range(5):
                    if file.peek(1)[:1] == b'\x80':
                        _check_pickle(file)
                return
            with zipfile.ZipFile(file) as archive:
                parts = archive.infolist()
                check_archive(parts, path.stat().st_size)
                broken = archive.testzip() if sums else None
                for part in parts if not broken else ():
                    if part.filename.endswith('.pkl'):
                        with archive.open(part) as pickled:
                            _check_pickle(io.BufferedReader(pickled))
    except Exception as e:  # whatever a damaged archive may raise
        if isinstance(e, OSError) and e.errno not in (None, errno.EINVAL):  # a place before the start of a cut-off file
            raise PSTError(
                f'The checkpoint {path} cannot be opened ({e.strerror}), which says nothing about what is in it: mend '
                f'that, or name another one.') from e
        raise Damaged(
            f'The checkpoint {path} cannot be read: it is truncated or not a checkpoint ({printable(str(e)[:300])}). '
            f'Use another one, such as an earlier one.') from None
    if broken:
        raise Damaged(
            f'The checkpoint {path} is corrupt (checksum of {printable(broken[:300])}). Use another one, such as an '
            f'earlier one.')


def check_archive(parts: List[zipfile.ZipInfo], size: int) -> None:
    """Make sure that parts of an archive take no more room than the archive, before any is read.

    torch compresses no weights, and nothing is there twice: what unpacks to more was made to fill a disk.

    Args:
        parts: Those to look at.
        size: Bytes of the archive.

    Raises:
        zipfile.BadZipFile: If its parts are compressed, or overlap.
    """
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or sum(part.file_size for part in parts) > size:
        raise zipfile.BadZipFile('its parts are compressed, or overlap')


def _check_pickle(file: BinaryIO) -> None:
    """Make sure that reading a pickle comes to an end.

    A tuple of the same tuple twice, which is one of another twice, and so on, needs few bytes, and years for its hash
    where it is a key. Nothing is run here; of what would be on the stack, depth and number of parts are followed.

    Raises:
        ValueError: If tuples are nested as torch writes none, or it is no pickle.
    """
    plain = (0, 1)
    stack: List[Tuple[int, int]] = []
    marks: List[int] = []
    memo: Dict[int, Tuple[int, int]] = {}
    for opcode, arg, _ in pickletools.genops(file):
        name = opcode.name
        if name == 'MARK':
            marks.append(len(stack))
        elif 'PUT' in name or name == 'MEMOIZE':
            memo[len(memo) if arg is None else arg] = stack[-1]
        elif 'GET' in name:
            stack.append(memo[arg])
        elif name == 'DUP':
            stack.append(stack[-1])
        else:
            before = opcode.stack_before
            sliced = pickletools.stackslice in before
            at = marks.pop() if sliced or name == 'POP_MARK' else len(stack)
            taken = stack[at:]
            del stack[at:]
            for _ in range(len(before) - (2 if sliced else 0)):
                taken.append(stack.pop())
            made = plain
            if name.startswith('TUPLE') or name in ('REDUCE', 'BUILD', 'NEWOBJ', 'NEWOBJ_EX', 'FROZENSET'):
                made = 1 + max((depth for depth, _ in taken), default=0), 1 + sum(parts for _, parts in taken)
            if made[0] > MOST_NESTED or made[1] > MOST_PARTS:
                raise ValueError(f'tuples within tuples, more than {MOST_NESTED} deep or {MOST_PARTS} in all')
            stack += [made] * len(opcode.stack_after)


def _read_safetensors(path: Path) -> Checkpoint:
    try:
        with safe_open(path, 'pt') as file:
            header = file.metadata() or {}
        weights = load_file(path)
    except Exception as e:  # whatever a damaged or malicious file may raise
        reason = printable(str(e)[:300]) or type(e).__name__
        raise PSTError(
            f'{path} cannot be read: it is truncated or not a safetensors file ({reason}). Fetch it, or write it, '
            f'again.') from None
    facts = check_facts(path, parse_json(header.get(HEADER_KEY) or '{}', f'{path}: the entry {HEADER_KEY}'))
    checkpoint = Checkpoint(path, check_weights(weights, path), **facts)
    if checkpoint.arch is None and (path.parent / 'config.json').exists():
        checkpoint.pretrained_cfg, checkpoint.arch, checkpoint.model_args = read_model_config(path.parent)
    return checkpoint


def find_weights(content: Dict[str, Any], use_ema: Optional[bool] = None) -> Tuple[Dict[str, Any], Optional[bool]]:
    """The state dict in a training checkpoint, however deep, and whether it is the moving average.

    Args:
        content: What the checkpoint holds.
        use_ema: See `read_checkpoint`.

    Returns:
        The innermost mapping under one of the usual names; True, False, or None where it is the content itself.
    """
    ema = None
    for _ in range(3):
        keys = TRAINED if use_ema is False else (*AVERAGED, *TRAINED)
        key = next((k for k in keys if isinstance(content.get(k), dict)), None)
        if key is None:
            break
        ema = bool(ema) or key in AVERAGED
        content = content[key]
    return content, ema


def _read_pickle(path: Path, use_ema: Optional[bool]) -> Checkpoint:
    try:
        with _LOCK, torch.serialization.safe_globals([NAMESPACE]):
            content = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e:  # whatever a damaged or malicious file may raise
        reason = printable(str(e).split('\n')[0][:500])
        raise PSTError(
            f'{path} cannot be read as a checkpoint: it is damaged, or holds more than tensors and plain values, so '
            f'that loading it could run code ({reason}). Nothing in it was run. Use another file, or turn one you '
            f'trust into .safetensors.') from None
    if not isinstance(content, dict):
        raise PSTError(f'{path} cannot be read as a checkpoint: it holds a {type(content).__name__}.')
    weights, ema = find_weights(content, use_ema)
    weights = check_weights(weights, path)
    if ema is None:
        return Checkpoint(path, weights)
    return Checkpoint(path, weights, **facts_in(content, path, ema=ema))


def facts_in(content: Dict[str, Any], path: Path, **others: Any) -> Dict[str, Any]:
    """What a training checkpoint says of itself, as values that fit.

    Args:
        content: What the checkpoint holds.
        path: The checkpoint, for messages.
        others: What else is known of it.

    Raises:
        PSTError: If a value does not fit, see `check_facts`.
    """
    known = {k: content.get(k) for k in ('args', 'epoch', 'metric')}
    facts = content.get(FACTS_KEY, {'arch': content.get('arch')})
    if isinstance(facts, dict):
        facts = {**known, **others, **facts}
    return check_facts(path, facts)


def check_weights(weights: Any, source: Any) -> Dict[str, torch.Tensor]:
    """A state dict as a model knows it, see `clean_names`.

    Args:
        weights: What is meant to be one.
        source: Where it is from, for messages.

    Raises:
        PSTError: If it is empty, or holds anything but tensors under names.
    """
    fits = isinstance(weights, dict) and weights and all(
        isinstance(k, str) and k.isprintable() and len(k) < 1000 and isinstance(v, torch.Tensor)
        for k, v in weights.items())
    if not fits:
        raise PSTError(f'{source} holds no weights: a mapping of names to tensors was expected.')
    cleaned = clean_names(weights)
    if len(cleaned) < len(weights):
        raise PSTError(f'{source} holds weights under the same names twice, with a prefix and without: remove one.')
    return cleaned


def clean_names(weights: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """The same state dict, without the prefixes that DDP, torch.compile and training scripts leave."""
    cleaned = clean_state_dict(weights)
    if all(name.startswith(WRAPPER) for name in cleaned):
        cleaned = {name.removeprefix(WRAPPER): tensor for name, tensor in cleaned.items()}
    return cleaned


def tensors_in(value: Any, name: str = '') -> Iterator[Tuple[str, torch.Tensor]]:
    """All tensors in what a checkpoint holds, after `check_budget`, and their names with dots."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, (dict, list, tuple)):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            shown = key if isinstance(key, int) and abs(key) < 10 ** 9 else short(key)  # str() has its limits
            yield from tensors_in(entry, f'{name}.{shown}' if name else str(shown))


def check_dense(tensors: Iterable[Tuple[str, torch.Tensor]], path: Path) -> None:
    """Make sure that tensors are what they seem to be, numbers in memory.

    Raises:
        PSTError: If one is sparse or the like, or larger than what the file holds.
    """
    size = path.stat().st_size
    for name, tensor in tensors:
        dense = tensor.layout == torch.strided and tensor.device.type == 'cpu' and not tensor.is_quantized
        if not dense or tensor.is_complex():
            raise PSTError(
                f'{path} cannot be used: {name[:200]} is no dense tensor of real numbers ({tensor.dtype}, '
                f'{tensor.layout}, on {tensor.device}).')
        storage = tensor.untyped_storage().nbytes()
        if storage > size or tensor.numel() * tensor.element_size() > storage:
            raise PSTError(f'{path} cannot be used: {name[:200]} says that it is larger than what the file holds.')


def check_finite(checkpoint: Checkpoint) -> None:
    """Make sure that all weights are numbers.

    Raises:
        PSTError: If a weight is NaN or infinite; names the first tensor.
    """
    check_numbers(checkpoint.weights.items(), checkpoint.path)


def check_numbers(tensors: Iterable[Tuple[str, torch.Tensor]], path: Path) -> None:
    """Make sure that all values of named tensors are finite; errors as in `check_finite`."""
    broken = [name for name, tensor in tensors if tensor.is_floating_point() and not _is_finite(tensor)]
    if broken:
        raise PSTError(
            f'{path} has NaN or infinite weights in {len(broken)} tensors, the first is {broken[0]}: the '
            f'training diverged. Use an earlier checkpoint.')


def _is_finite(tensor: torch.Tensor) -> bool:
    tensor = tensor if tensor.element_size() > 1 else tensor.float()  # torch does not reckon with 8 bits
    # the sum needs no copy; it may overflow where no value does
    return bool(tensor.sum(dtype=torch.float64).isfinite()) or bool(tensor.isfinite().all())
