"""Answers out of sample to all images of a split: each by a model that was trained on the others.

The images are dealt into folds once, as folders of links; the folder that the model of a fold is trained on links to
the other folds. So what a model has seen can be looked up on disk, and the engine trains as it does anywhere else.
"""
import hashlib
import logging
import os
import shutil
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence

import numpy as np
import torch
import torch.nn as nn
import yaml
from torch.nn.functional import interpolate
from torchvision.transforms.functional import five_crop

from pst_timm.checkpoints import read_checkpoint
from pst_timm.checkpoints.building import check_model_name
from pst_timm.checkpoints.facts import as_plain
from pst_timm.checkpoints.reading import is_file
from pst_timm.checkpoints.schema import parse_json
from pst_timm.checkpoints.trust import check_origin
from pst_timm.data.images import listed
from pst_timm.data.samples import Samples
from pst_timm.data.scores import stratified_folds
from pst_timm.engine import parse_train_args, train, train_args
from pst_timm.engine.factories import import_modules
from pst_timm.engine.flags import keys_with_role
from pst_timm.engine.jobs import expected_channels
from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import write_json, write_text

from .answers import Outputs, Subject, answers, open_subject

__all__ = [
    'Cross', 'Crossed', 'Views', 'answers_of', 'cross_answers', 'input_channels', 'recipe_of', 'training_flags',
]

_logger = logging.getLogger(__name__)

MANIFEST = 'folds.json'
# what a file may say of how its model was trained; nothing that names a place, a package or other weights
TOLD = {*keys_with_role('preprocessing', 'recipe'), 'gp', 'in_chans'} - {'kd_model_name'}
BEGUN_FROM = ('pretrained', 'pretrained_path', 'initial_checkpoint', 'trunk_checkpoint', 'kd_model_name')
# flags of the training that the user may set; the folds decide about data and folders
FREE = {
    *keys_with_role('model', 'preprocessing', 'recipe', 'machine'), 'log_interval', 'recovery_interval',
} - {'num_classes'}


class Cross(NamedTuple):
    """How the images of a split are to be answered out of sample."""
    flags: Mapping[str, Any]
    """Flags of `pst-timm train`; those about data and folders do not count."""
    folds: int
    folder: Path
    """Where folds and models are kept."""
    seed: int = 0
    """Of the folds."""
    resume: bool = False
    """Whether to go on with folds that are there."""
    overwrite: bool = False
    """Whether to remove folds that are there."""
    device: str = ''
    repeats: int = 1
    """How often it is done, with other folds each time; answers are the means."""


class Crossed(NamedTuple):
    """What the models of the folds answered."""
    probabilities: np.ndarray
    """float64 (N, classes)."""
    folds: np.ndarray
    """int64 (repeats, N): the fold that each image is in, whose model has not seen it."""
    subject: Subject
    """The model of the first fold."""


def recipe_of(source: str) -> Dict[str, Any]:
    """How the model of a training checkpoint was trained, as flags of the engine.

    Of a stranger's file only what cannot fetch, open or import anything is taken.

    Raises:
        PSTError: If the source does not tell it.
    """
    checkpoint = read_checkpoint(source) if is_file(source) else None
    if checkpoint is None or not checkpoint.recipe:
        raise PSTError(
            f'{source} does not tell how it was trained: name a training checkpoint of this engine, or a recipe with '
            f'--config FILE.')
    arch, model_args = check_origin(source, checkpoint.arch, checkpoint.model_args, checkpoint.weights)
    begun = [key for key in BEGUN_FROM if checkpoint.recipe.get(key)]
    if begun:
        _logger.warning(
            f'{source} was trained with --{" and --".join(begun).replace("_", "-")}, which a file cannot ask for: the '
            f'folds go without. Give the flags yourself, after --, to have them.')
    told = {key: value for key, value in checkpoint.recipe.items() if key in TOLD}
    return dict(told, model=arch, model_kwargs=model_args)


def training_flags(source: Optional[str] = None, config: str = '', words: Sequence[str] = ()) -> Dict[str, Any]:
    """Flags of the training of the folds.

    Args:
        source: Training checkpoint whose recipe is taken, if there is no config.
        config: YAML file, as `pst-timm train --config` takes it.
        words: Further flags, as typed.

    Raises:
        PSTError: If one is wrong, or no recipe is known.
    """
    if config:
        return vars(parse_train_args(['--config', config, *words], 'pst-timm train'))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'recipe.yaml')
        write_text(path, yaml.safe_dump(recipe_of(source)))
        return vars(parse_train_args(['--config', str(path), *words], 'pst-timm train'))


def input_channels(flags: Mapping[str, Any]) -> int:
    """Channels of the images that the models of the folds will take, from the flags of their training.

    Raises:
        PSTError: If the flags name no model that there is.
    """
    args = train_args(**{key: value for key, value in flags.items() if key in FREE})
    import_modules(args.device_modules)
    check_model_name(args.model)
    return expected_channels(args)


class Views(nn.Module):
    """A model that answers to several views of each image; embeddings and logits are the means over them."""

    def __init__(self, model: nn.Module, mirror: bool = False, crops: bool = False):
        """
        Args:
            model: The model.
            mirror: Whether each view is looked at in the mirror too.
            crops: Whether the views are five crops, each 7/8 as wide and high, from the corners and the middle.
        """
        super().__init__()
        self.model, self.mirror, self.crops = model, mirror, crops

    def views(self, images: torch.Tensor) -> List[torch.Tensor]:
        """The views of a batch (B, C, H, W), each of this shape."""
        found = [images]
        if self.crops:
            size = images.shape[-2:]
            found = [interpolate(crop, size, mode='bicubic') for crop in five_crop(images, [7 * n // 8 for n in size])]
        return found + [view.flip(-1) for view in found] if self.mirror else found

    def forward_features(self, images: torch.Tensor) -> List[torch.Tensor]:
        return [self.model.forward_features(view) for view in self.views(images)]

    def forward_head(self, features: List[torch.Tensor], pre_logits: bool = False) -> torch.Tensor:
        outputs = [self.model.forward_head(view, pre_logits=pre_logits) for view in features]
        return torch.stack([output.flatten(1).float() for output in outputs]).mean(dim=0)


def answers_of(
        subject: Subject,
        samples: Samples,
        batch_size: int = 64,
        workers: int = 0,
        mirror: bool = False,
        crops: bool = False,
        title: str = 'Answers',
) -> Outputs:
    """What a model gives for images, all of which can be read.

    Args:
        subject: The model.
        samples: The images.
        batch_size: Images at a time.
        workers: Processes that read images.
        mirror: See `Views`.
        crops: Likewise.
        title: Name in the bar.

    Raises:
        PSTError: If an image cannot be read any more.
    """
    subject = subject._replace(model=Views(subject.model, mirror, crops))
    prepared = samples.subset(range(len(samples)), subject.transform)
    found = Outputs.gather(answers(subject, prepared, batch_size, workers, title))
    if found.broken:
        raise PSTError(f'{listed(found.broken)} cannot be read any more: have the images changed meanwhile?')
    return found


def cross_answers(
        samples: Samples,
        labels: Sequence[int],
        cross: Cross,
        groups: Optional[np.ndarray] = None,
        batch_size: int = 64,
        workers: int = 0,
        mirror: bool = False,
        crops: bool = False,
) -> Crossed:
    """Train a model for each fold on the others, or go on with them, and have it answer to its fold.

    With repeats, all of that again with folds dealt anew, in folders called `NAME-2` and so on.

    Args:
        samples: Images with files of their own, all of which can be read.
        labels: Their labels (N,).
        cross: How.
        groups: Images that are copies of each other (N,), -1 for those on their own; they stay in one fold.
        batch_size: Images at a time in the answers.
        workers: Processes that read images for them.
        mirror: See `Views`.
        crops: Likewise.

    Raises:
        PSTError: If the images cannot be dealt, the flags do not fit, or folds of something else are there.
        Interrupted: If the process was asked to stop; what was trained is kept.
    """
    found = []
    for i in range(cross.repeats):
        folder = cross.folder.with_name(f'{cross.folder.name}-{i + 1}') if i else cross.folder
        once = cross._replace(seed=cross.seed + i, folder=folder)
        found.append(_cross_once(samples, np.asarray(labels), once, groups, batch_size, workers, mirror, crops))
    probabilities = np.mean([once.probabilities for once in found], axis=0)
    return found[0]._replace(probabilities=probabilities, folds=np.stack([once.folds for once in found]))


def _cross_once(
        samples: Samples,
        labels: np.ndarray,
        cross: Cross,
        groups: Optional[np.ndarray],
        batch_size: int,
        workers: int,
        mirror: bool,
        crops: bool,
) -> Crossed:
    if samples.paths is None:
        raise PSTError('--cross needs images in folders, to which it links: unpack the .tar file first.')
    folds = stratified_folds(labels, cross.folds, cross.seed, groups)
    if len(np.unique(folds)) < cross.folds:
        raise PSTError(f'--cross {cross.folds}: there are not so many different images; choose fewer folds.')
    for label in np.unique(labels):
        if len(np.unique(folds[labels == label])) < 2:
            raise PSTError(
                f'The class {listed([samples.class_names[label]])} has too few different images for --cross: all of '
                f'them are in one fold, and the model of that fold would not know the class. Add images, or leave it '
                f'out.')
    args = [fold_args(cross, fold) for fold in range(cross.folds)]
    _claim(cross, args[0], samples, folds)
    _link(samples, labels, folds, cross.folder)
    probabilities = np.zeros((len(labels), len(samples.class_names)))
    first = None
    for fold in range(cross.folds):
        mine = np.flatnonzero(folds == fold)
        checkpoint = _train_fold(args[fold], cross.folder / str(fold), f'{fold + 1} of {cross.folds}')
        subject = open_subject(str(checkpoint), device=cross.device)
        found = answers_of(
            subject, samples.subset(mine), batch_size, workers, mirror, crops, f'Fold {fold + 1} of {cross.folds}')
        # the classes of a fold are called by their places among all
        probabilities[np.ix_(mine, [int(name) for name in subject.class_names])] = found.probabilities
        first = first or subject
    return Crossed(probabilities, folds, first)


def fold_args(cross: Cross, fold: int) -> Namespace:
    """Checked arguments of the training of a fold.

    Raises:
        PSTError: If a flag is wrong.
    """
    flags = {key: value for key, value in cross.flags.items() if key in FREE}
    folder = cross.folder / str(fold)
    return train_args(**{
        **flags, 'data_dir': str(folder / 'data'), 'train_split': 'train', 'val_split': '', 'output': str(folder),
        'experiment': 'run', 'resume': 'auto', 'checkpoint_hist': 1, 'device': cross.device or flags.get('device')})


def _train_fold(args: Namespace, folder: Path, title: str) -> Path:
    """Train the model of a fold if that has not been done; returns its checkpoint."""
    checkpoint, finished = folder / 'run' / 'last.pth.tar', folder / 'finished.json'
    if finished.is_file() and checkpoint.is_file():
        _logger.info(f'Fold {title} has been trained already: {checkpoint}.')
        return checkpoint
    _logger.info(f'Training fold {title}.')
    train(args)
    write_json(finished, dict(checkpoint=checkpoint.name))
    return checkpoint


def _claim(cross: Cross, args: Namespace, samples: Samples, folds: np.ndarray) -> None:
    """Make the folder of the folds, or go on in one that was made for the same."""
    decisive = {key: as_plain(getattr(args, key)) for key in sorted(FREE - set(keys_with_role('machine')))
                if hasattr(args, key) and key not in ('log_interval', 'recovery_interval')}
    names = '\n'.join(f'{fold} {name!r}' for fold, name in zip(folds, samples.names))
    digest = hashlib.sha256(names.encode('ascii', 'backslashreplace')).hexdigest()
    plan = dict(folds=cross.folds, seed=cross.seed, images=digest, training=decisive)
    path = cross.folder / MANIFEST
    if cross.overwrite and path.is_file():
        shutil.rmtree(cross.folder)  # links, not what they lead to
    if cross.folder.is_dir() and any(cross.folder.iterdir()):
        if not path.is_file():
            raise PSTError(f'{cross.folder} is there already, and holds no folds: choose another --output.')
        if not cross.resume:
            raise PSTError(
                f'{cross.folder} holds folds of an earlier audit: --resume auto goes on with them, --overwrite removes '
                f'them, and another --output leaves them alone.')
        _check_same(parse_json(path.read_bytes(), path), plan, path)
        return
    cross.folder.mkdir(parents=True, exist_ok=True)
    write_json(path, plan)


def _check_same(then: Any, now: Mapping[str, Any], path: Path) -> None:
    then = then if isinstance(then, dict) else {}
    told = then.get('training') if isinstance(then.get('training'), dict) else {}
    others = dict(folds='--cross', seed='the seed of the folds', images='the images or their labels')
    words = [f'--{key.replace("_", "-")}' for key, value in now['training'].items() if told.get(key) != value]
    words += [name for key, name in others.items() if then.get(key) != now[key]]
    if words:
        raise PSTError(
            f'{path} was written for another audit ({listed(words, 5)}): go on as that one did, begin anew with '
            f'--overwrite, or choose another --output.')


def _link(samples: Samples, labels: np.ndarray, folds: np.ndarray, folder: Path) -> None:
    """Folders `parts/FOLD/CLASS` of links to images, and `FOLD/data/train` of links to the parts of the other folds."""
    parts = folder / 'parts'
    try:
        for fold in np.unique(folds):
            for label in np.unique(labels[folds == fold]):
                (parts / str(fold) / f'{label:05d}').mkdir(parents=True, exist_ok=True)
        for i, (path, label, fold) in enumerate(zip(samples.paths, labels, folds)):
            # names of the user's may be such as no list of classes takes
            link = parts / str(fold) / f'{label:05d}' / f'{i:07d}{path.suffix}'
            if not os.path.lexists(link):
                link.symlink_to(os.path.abspath(path))
        for fold in np.unique(folds):
            seen = folder / str(fold) / 'data' / 'train'
            seen.mkdir(parents=True, exist_ok=True)
            for other in np.unique(folds[folds != fold]):
                if not os.path.lexists(seen / str(other)):
                    (seen / str(other)).symlink_to(Path('..', '..', '..', 'parts', str(other)))
    except OSError as e:
        raise PSTError(f'Cannot write the folds to {folder} ({e.strerror or e}): choose another --output.') from e
