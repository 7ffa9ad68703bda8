"""A model as a folder that timm reads: weights as safetensors and config.json, checked by reading them again."""
import os
import shutil
import tempfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Sequence

import timm
import torch
import torch.nn as nn
from safetensors import SafetensorError
from timm.data import resolve_input_data_config
from timm.models import save_for_hf

from pst_timm.metrics.agreement import compare_logits
from pst_timm.models import PRETRAINED_TRUNK
from pst_timm.models.digest import digest_note
from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import check_output, write_whole

from .building import temperature_of
from .facts import inference_settings
from .labels import label_names

__all__ = ['CARD', 'CONFIG', 'FILES', 'WEIGHTS', 'check_target', 'save_folder']

WEIGHTS, CONFIG, CARD = FILES = ('model.safetensors', 'config.json', 'README.md')
TOLERANCE = 1e-5  # of the largest logit, between the model and the one that is read again


def check_target(folder: Path, checkpoint: Path, overwrite: bool) -> None:
    """Make sure, before the work, that a folder can take a model, and that nobody loses other files by it.

    Args:
        folder: The folder to write, made if there is none.
        checkpoint: What the model is read from; never replaced.
        overwrite: Whether the files of an earlier model may be replaced.

    Raises:
        PSTError: If it cannot be written, or must not be.
    """
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise PSTError(f'Cannot write to {folder}: it is not a folder. Name a new one.')
    source = checkpoint if checkpoint.is_dir() else checkpoint.parent
    if source.is_dir() and os.path.samefile(folder, source):
        raise PSTError(f'{folder} is where the checkpoint is read from: name another folder.')
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as e:
        raise PSTError(f'{folder} cannot be read ({e.strerror}).') from None
    foreign = [name for name in names if name not in FILES]
    if foreign:
        raise PSTError(f'{folder} holds other files, such as {foreign[0]}: name a new or empty folder.')
    if names and not overwrite:
        raise PSTError(f'{folder} holds {", ".join(names)} already: name another folder, or add --overwrite to replace '
                       f'what is there.')
    for name in FILES:
        check_output(folder / name, overwrite)


def save_folder(
        model: nn.Module,
        folder: os.PathLike,
        class_names: Optional[Sequence[str]] = None,
        data_config: Optional[Dict[str, Any]] = None,
) -> None:
    """Write model.safetensors and timm's config.json, if they give the same model again.

    Args:
        model: A model with its weights.
        folder: Folder to write, made if there is none.
        class_names: Names of the classes in the order of the outputs, those that the model knows if None.
        data_config: Preprocessing at test time, where it differs from the model's: timm's `test_input_size`,
            `test_crop_pct`.

    Raises:
        PSTError: If the class names do not fit, the folder cannot be written, or what is read again differs.
    """
    if class_names and len(class_names) != model.num_classes:
        raise PSTError(f'{len(class_names)} class names for a model of {model.num_classes} classes.')
    names = list(class_names or label_names(model))
    config: Dict[str, Any] = {'label_names': names, 'pretrained_cfg': {'notes': [digest_note(model.state_dict())]}}
    if 'label_names' in model.pretrained_cfg:
        config['pretrained_cfg']['label_names'] = None  # timm writes and reads them at the top of the file
    if temperature_of(model):
        config['temperature'] = temperature_of(model)
    folder = Path(folder)
    try:
        with tempfile.TemporaryDirectory() as unchecked, _timms_cfg(model):
            save_for_hf(
                model, unchecked, model_config=config, model_args=inference_settings(model), safe_serialization=True,
                data_config=data_config)
            _check_reloaded(model, Path(unchecked))
            folder.mkdir(parents=True, exist_ok=True)
            for name in (WEIGHTS, CONFIG):
                # safetensors writes files that nobody else may read
                write_whole(folder / name, partial(shutil.copyfile, Path(unchecked, name)))
    except (OSError, SafetensorError) as e:
        raise PSTError(f'Cannot write {folder}: {e}.') from e


@contextmanager
def _timms_cfg(model: nn.Module) -> Iterator[None]:
    """Have a model's configuration without what timm does not know in one, nor is to do again."""
    own, args = model.pretrained_cfg, getattr(model, '_model_args', {})
    model.pretrained_cfg = {k: v for k, v in own.items() if k != 'temperature'}
    model._model_args = {k: v for k, v in args.items() if k != PRETRAINED_TRUNK}
    try:
        yield
    finally:
        model.pretrained_cfg, model._model_args = own, args


@torch.inference_mode()
def _check_reloaded(model: nn.Module, folder: Path) -> None:
    x = torch.randn(2, *resolve_input_data_config(model)['input_size'], generator=torch.Generator().manual_seed(0))
    expected = model.eval()(x)
    try:
        got = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()(x)
    except RuntimeError as e:
        raise PSTError(f'What was written cannot be loaded again: {e}') from e
    difference = compare_logits(got, expected).difference
    if not difference <= TOLERANCE:
        raise PSTError(
            f'What was written gives other logits than the checkpoint (by {difference:.1e} of the largest one). '
            f'Nothing was written; please report this.')
