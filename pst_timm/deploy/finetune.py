"""Train a model folder further, through the engine and with all of its flags; a run that is killed goes on."""
import hashlib
import json
import logging
import shutil
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence, Tuple

import yaml

from pst_timm.checkpoints import read_checkpoint
from pst_timm.checkpoints.facts import as_plain, look_up
from pst_timm.checkpoints.folder import CONFIG, WEIGHTS
from pst_timm.checkpoints.reading import is_file
from pst_timm.checkpoints.schema import parse_json
from pst_timm.data.datasets import check_class_names, check_mapped_names, class_names, open_dataset
from pst_timm.data.images import listed
from pst_timm.engine import parse_train_args, train, train_args
from pst_timm.engine.args import read_yaml
from pst_timm.engine.flags import TRAIN_FLAGS, keys_with_role
from pst_timm.utils.errors import Interrupted, PSTError
from pst_timm.utils.files import write_json, write_text
from pst_timm.utils.parsing import ArgumentParser

__all__ = ['DEFAULTS', 'finetune', 'finetune_flags', 'work_folder']

_logger = logging.getLogger(__name__)

PLAN = 'finetune.json'
LAST = 'last.pth.tar'
# where they differ from those of a training from scratch
DEFAULTS: Dict[str, Any] = dict(epochs=10, warmup_epochs=0, lr_base=0.05, sched_on_updates=True, checkpoint_hist=1)
# what the model folder, and the folder of the run, decide
DECIDED = (
    'model', 'pretrained', 'pretrained_path', 'initial_checkpoint', 'trunk_checkpoint', 'use_ema', 'resume',
    'overwrite', 'no_resume_opt', 'start_epoch', 'output', 'experiment', 'num_classes', 'in_chans', 'model_kwargs',
    'data', 'data_dir')
SPLITS = ('train_split', 'val_split')  # for which the commands have flags of their own
AUGMENTATION = [
    flag.key for title, flags in TRAIN_FLAGS for flag in flags if title == 'augmentation and regularisation']


def finetune_flags(words: Sequence[str] = (), source: str = '') -> Dict[str, Any]:
    """Flags of a fine-tuning.

    Args:
        words: Flags of `pst-timm train`, as typed.
        source: What the model was made from. If it is a training checkpoint, its images are augmented as that run did,
            unless the words say otherwise: digits that were never mirrored are not mirrored now.

    Returns:
        All flags by key, but for those that the fine-tuning decides.

    Raises:
        PSTError: If one is wrong, or not for the user to say.
    """
    told = read_checkpoint(source).recipe if source and is_file(source) else {}
    base = {**DEFAULTS, **{key: value for key, value in told.items() if key in AUGMENTATION}}
    parser = ArgumentParser('pst-timm train', add_help=False)
    parser.add_argument('-c', '--config')
    named, words = parser.parse_known_args(words)
    if named.config:
        base.update(as_plain(read_yaml(named.config)))  # of what it does not say, the rest holds
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'recipe.yaml')
        write_text(path, yaml.safe_dump(base))
        flags = vars(parse_train_args(['--config', str(path), *words], 'pst-timm train'))
    unsaid = vars(parse_train_args([], 'pst-timm train'))
    decided = [f'--{key.replace("_", "-")}' for key in DECIDED if flags[key] != unsaid[key]]
    splits = [f'--{key.replace("_", "-")}' for key in SPLITS if flags[key] != unsaid[key]]
    if splits:
        raise PSTError(f'{listed(splits)} is no flag for the training alone: give it before the --.')
    if decided:
        raise PSTError(
            f'{listed(decided)}: a fine-tuning begins with the model, the data and the folder that the command names. '
            f'Leave it out of the flags for the training.')
    return {key: value for key, value in flags.items() if key not in DECIDED}


def work_folder(folder: Path) -> Path:
    """Where a model folder is fine-tuned if no other place is named: beside it."""
    return folder.with_name(f'{folder.name}.finetune')


def finetune(
        folder: Path,
        data_args: Mapping[str, Any],
        teacher: Optional[str] = None,
        work: Optional[Path] = None,
        overwrite: bool = False,
        **train_flags: Any,
) -> Path:
    """Train the model in a folder further, or go on with a run that did not come to its end.

    Args:
        folder: The model: config.json and model.safetensors. It is left as it is.
        data_args: Flags that say which images: `data_dir`, and others such as `train_split`. They come before
            `train_flags`.
        teacher: Model to distil from, whatever --kd-model-name takes; that of `train_flags`, or none, if None.
        work: Folder of the run, made if there is none; that of `work_folder` if None.
        overwrite: Whether to begin anew where it holds the run of another model, or of other flags.
        train_flags: Flags of `pst-timm train` by key, see `finetune_flags`.

    Returns:
        The last checkpoint of the run, with the moving average of the weights if the flags ask for one. It is the last
        one whatever the validation said, which chooses nothing. Beside it stay the log and the arguments of the run.

    Raises:
        PSTError: If the flags are wrong, the data has other classes than the model, or another run is there.
        Interrupted: If the process was asked to stop; the same call goes on.
    """
    folder = Path(folder)
    work = work_folder(folder) if work is None else Path(work)
    given = {key: value for key, value in train_flags.items() if key not in DECIDED}
    values = {**DEFAULTS, **given, **data_args}
    if teacher is not None:
        values['kd_model_name'] = str(teacher)
    cfg = look_up(f'local-dir:{folder}')[2]
    args = train_args(**{
        **values, 'model': f'local-dir:{folder}', 'pretrained': True, 'num_classes': cfg.get('num_classes'),
        'output': str(work.parent), 'experiment': work.name, 'resume': 'auto'})
    _check_classes(args, cfg.get('label_names'))
    plan, path = _plan(args, folder), work / PLAN
    if overwrite and path.is_file() and _read_plan(path)[0] != plan:
        shutil.rmtree(work)
    if work.is_dir() and any(work.iterdir()):
        then, done = _read_plan(path)
        _check_same(then, plan, work)
        if done and (work / LAST).is_file():
            _logger.info(f'The model has been fine-tuned already: {work / LAST}.')
            return work / LAST
    work.mkdir(parents=True, exist_ok=True)
    write_json(path, dict(plan=plan, done=False))
    try:
        train(args)
    except Interrupted as e:
        raise Interrupted(
            f'Stopped in the middle of a fine-tuning, as asked. Its state is in {work}: the same command goes on from '
            f'there.') from e
    write_json(path, dict(plan=plan, done=True))
    for name in [*work.glob('checkpoint-*.pth.tar'), work / 'model_best.pth.tar']:
        name.unlink(missing_ok=True)
    return work / LAST


def _check_classes(args: Namespace, known: Optional[Sequence[str]]) -> None:
    """Make sure that a label means the same in the data and in the model."""
    if not known:
        return
    dataset = open_dataset(args, args.train_split, args.train_num_samples, is_training=False, batch_size=1)
    if args.class_map:
        check_mapped_names(dataset, known, args.model)
    else:
        where = f'the model {args.model.removeprefix("local-dir:")}'
        check_class_names(class_names(dataset), known, f'the {args.train_split!r} split', where)


def _plan(args: Namespace, folder: Path) -> Dict[str, Any]:
    """What makes a fine-tuning this one: the model as it is, and the flags that decide what becomes of it."""
    try:
        sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (WEIGHTS, CONFIG)}
    except OSError as e:
        raise PSTError(f'{folder} is no model folder: {e.filename} cannot be read ({e.strerror}).') from None
    flags = {key: as_plain(getattr(args, key)) for key in keys_with_role('preprocessing', 'recipe', 'data')}
    return json.loads(json.dumps(dict(model=sums, flags=flags)))  # as it will be read


def _read_plan(path: Path) -> Tuple[Optional[Dict[str, Any]], bool]:
    """The plan of a run, None where there is none, and whether the run has come to its end."""
    if not path.is_file():
        return None, False
    found = parse_json(path.read_bytes(), path)
    plan = found.get('plan') if isinstance(found, dict) else None
    return (plan, found.get('done') is True) if isinstance(plan, dict) else (None, False)


def _check_same(then: Optional[Dict[str, Any]], now: Mapping[str, Any], work: Path) -> None:
    if then == now:
        return
    if then is None:
        raise PSTError(f'{work} is there already, and holds no fine-tuning: move it, or name another folder.')
    told = then.get('flags') if isinstance(then.get('flags'), dict) else {}
    words = ['the model'] if then.get('model') != now['model'] else []
    words += [f'--{key.replace("_", "-")}' for key, value in now['flags'].items() if told.get(key) != value]
    raise PSTError(
        f'{work} holds a fine-tuning that began otherwise ({listed(words, 5)}): go on as it began, begin anew with '
        f'--overwrite, or remove that folder.')
