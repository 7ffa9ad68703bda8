"""From a checkpoint to a repository on the Hub: weights, config.json and a model card, in one commit or not at all."""
import json
import os
import re
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence

import torch.nn as nn
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from timm.models import split_model_name_tag

from pst_timm.checkpoints import attention_settings, build_model, open_checkpoint, set_attention
from pst_timm.checkpoints.folder import CARD, check_target, save_folder
from pst_timm.checkpoints.reading import Checkpoint
from pst_timm.models import PSTModel
from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import read_csv, write_text
from pst_timm.utils.waiting import TIMEOUT

from .card import Accuracy, model_card
from .upload import Upload

__all__ = ['Publication', 'publish']

class Publication(NamedTuple):
    """What `publish` did."""
    folder: Optional[Path]
    """Folder with the three files, None if it was not kept."""
    url: Optional[str]
    """Commit on the Hub, None after a dry run."""
    ema: bool
    """Whether the weights are the moving average."""
    accuracy: Optional[Accuracy]
    """What the card tells of the accuracy."""


def publish(
        checkpoint: os.PathLike,
        repo_id: str,
        *,
        private: bool = False,
        revision: Optional[str] = None,
        dry_run: bool = False,
        folder: Optional[os.PathLike] = None,
        overwrite: bool = False,
        use_ema: Optional[bool] = None,
        arch: Optional[str] = None,
        topk: Optional[int] = None,
        fine_fusion: Optional[str] = None,
        results: Optional[os.PathLike] = None,
        class_names: Optional[Sequence[str]] = None,
        data_set: Optional[str] = None,
        license: str = 'apache-2.0',
        token: Optional[str] = None,
        attempts: int = 3,
        timeout: float = TIMEOUT,
) -> Publication:
    """Publish a checkpoint on the Hub as weights, config.json and model card.

    What is written is loaded again and compared with the checkpoint first. The three files arrive in one commit, or
    none does; after an interruption the same call goes on without sending again what has arrived.

    Args:
        checkpoint: Training checkpoint, run folder, .safetensors file, or folder with config.json.
        repo_id: Repository, 'org/name'; made if there is none.
        private: Whether a new repository is private.
        revision: Branch, made if there is none; the main one if None.
        dry_run: Write the folder and stop.
        folder: Where to write the three files; None for `output/publish/name` in a dry run, else a temporary one.
        overwrite: Whether files of an earlier publication in the folder may be replaced; never the checkpoint.
        use_ema: Whether to take the moving average of a training checkpoint; None takes it where there is one.
        arch: Architecture of a file, where it does not tell it or another one is meant; said if they differ.
        topk: Fine attention the accuracy was measured with, as the checkpoint has it if None.
        fine_fusion: Its fusion.
        results: What `validate.py --results-file` wrote for these weights, CSV or JSON; without it the card tells
            what the run measured while training.
        class_names: Names of the classes in the order of the outputs, those in the checkpoint if None.
        data_set: Name of the data set, the run's if None.
        license: Identifier of the licence of the weights.
        token: Access token, the one of `hf auth login` or `HF_TOKEN` if None.
        attempts: How often an upload is tried.
        timeout: Seconds to wait for an answer of the Hub.

    Raises:
        PSTError: If anything is wrong that the user can mend.
        Unavailable: If the Hub cannot be reached or cannot answer.
    """
    _check_name(repo_id)
    _check_license(license)
    if folder is None and dry_run:
        folder = Path('output', 'publish', repo_id.split('/')[1])
    if folder is not None:
        check_target(Path(folder), Path(checkpoint), overwrite)
    source = open_checkpoint(checkpoint, arch, use_ema)
    model = build_model(source)
    if not isinstance(model, PSTModel):
        raise PSTError(
            f'{source.path} is a checkpoint of {source.arch}, which is no architecture of this package. Use '
            f'timm.models.push_to_hf_hub for it.')
    model.pretrained_cfg['license'] = license
    changed = _set_attention(model, topk, fine_fusion)
    if results is not None:
        accuracy = _measured(_read_results(results), source, attention_settings(model))
    else:
        accuracy = None if changed else _measured_in_training(source, model)
    data_set = data_set or source.args.get('dataset') or Path(source.args.get('data_dir') or '').name or None

    upload = None if dry_run else Upload(repo_id, private, revision, token, attempts, timeout)
    if upload is not None:
        upload.check_access(source.arch)
    with _kept_or_temporary(folder) as target:
        save_folder(model, target, class_names, _test_config(accuracy, model))
        if class_names:
            model.pretrained_cfg['label_names'] = list(class_names)
        write_text(target / CARD, model_card(repo_id, source, model, accuracy, data_set, license))
        url = upload.send(target) if upload is not None else None
    return Publication(Path(folder) if folder else None, url, bool(source.ema), accuracy)


def _check_name(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as e:
        raise PSTError(f'{repo_id!r} cannot name a repository: {e}') from None
    if repo_id.count('/') != 1:
        raise PSTError(f"{repo_id!r} must name the owner too, as in 'org/name'.")


def _check_license(license: str) -> None:
    # the Hub's identifiers, and whatever else it may learn
    if not re.fullmatch(r'[A-Za-z0-9][A-Za-z0-9.+-]{0,63}', license):
        raise PSTError(f"{license!r} is no identifier of a licence, as 'apache-2.0', 'cc-by-4.0' or 'other' are.")


@contextmanager
def _kept_or_temporary(folder: Optional[os.PathLike]) -> Iterator[Path]:
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
        return
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise PSTError(f'Cannot write to {folder}: {e.strerror}.') from None
    yield folder


# what was measured

def _read_results(path: os.PathLike) -> List[Dict[str, Any]]:
    try:
        path = Path(path)
        rows = json.loads(path.read_text(encoding='utf-8')) if path.suffix == '.json' else read_csv(path)
        rows = rows if isinstance(rows, list) else [rows]
        for row in rows:
            row.update(
                top1=float(row['top1']), top5=float(row['top5']), img_size=int(row['img_size']),
                crop_pct=float(row['crop_pct']), interpolation=str(row['interpolation']))
            if row.get('topk') not in (None, ''):
                row['topk'] = int(row['topk'])
            _check_accuracy(row, f'{path} says')
    except PSTError:
        raise
    except (OSError, KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as e:
        raise PSTError(f'{path} is not a results file of validate.py ({e!r}).') from None
    if not rows:
        raise PSTError(f'{path} holds no results.')
    return rows


def _check_accuracy(row: Dict[str, Any], who: str) -> None:
    """Raise a PSTError unless the accuracies of a row, and the size and crop if it has them, can have been measured."""
    # a NaN is in no interval
    ranges = {'top1': (0., 100.), 'top5': (0., 100.), 'img_size': (1, 2 ** 16), 'crop_pct': (1e-3, 100.)}
    for key, (low, high) in ranges.items():
        if row.get(key) is not None and not low <= row[key] <= high:
            raise PSTError(f'{who} {key} = {row[key]}, which cannot have been measured: expected {low:g} to {high:g}.')
    if row.get('top5') is not None and row['top5'] < row['top1']:
        raise PSTError(f'{who} top5 = {row["top5"]}, less than top1 = {row["top1"]}, which cannot be.')


def _set_attention(model: nn.Module, topk: Optional[int], fine_fusion: Optional[str]) -> bool:
    """Set what is given; returns whether that changed anything."""
    before = attention_settings(model)
    set_attention(model, topk, fine_fusion)
    return attention_settings(model) != before


def _measured(rows: List[Dict[str, Any]], source: Checkpoint, settings: Dict[str, Any]) -> Accuracy:
    """The accuracy from the row of results that was measured with the model's attention."""
    def fits(row: Dict[str, Any]) -> bool:
        if 'topk' not in row:  # no sweep: measured with what was given to validate.py
            return True
        return row['topk'] == settings['topk'] and (not row['topk'] or row['fine_fusion'] == settings['fine_fusion'])

    found = [row for row in rows if fits(row)]
    if len(found) != 1:
        raise PSTError(
            f'The results have {len(found)} rows for topk={settings["topk"]}, fine_fusion={settings["fine_fusion"]}; '
            f'one was expected. Say which one with topk and fine_fusion, or measure again.')
    row = found[0]
    name = row.get('model') or source.arch
    if ':' not in name and split_model_name_tag(name)[0] != source.arch:
        raise PSTError(f'The results are those of {name}, the checkpoint is one of {source.arch}.')
    measured = str(row.get('ema', '')).lower()  # a word, from a CSV file
    if measured and measured != str(bool(source.ema)).lower():
        raise PSTError(
            f'The results are those of the {"moving average (EMA)" if source.ema is False else "weights as trained"}, '
            f'which would not be published: change --use-ema here, or measure again.')
    if not measured and source.ema and row.get('checkpoint'):
        raise PSTError(
            f'The results do not tell whether the moving average in {row["checkpoint"]} was measured. Measure what is '
            f'published: publish with --dry-run, then validate with --model local-dir:FOLDER --pretrained.')
    return Accuracy(
        row['top1'], row['top5'], row['img_size'], row['crop_pct'], row['interpolation'],
        'by `pst-timm validate` on these weights')


def _measured_in_training(source: Checkpoint, model: nn.Module) -> Optional[Accuracy]:
    """What the run measured for these weights, None if it measured others, or is not known."""
    averaged = bool(source.args.get('model_ema')) and not source.args.get('model_ema_force_cpu')
    if source.epoch is None or bool(source.ema) != averaged:
        return None
    top1 = source.metric if source.args.get('eval_metric') == 'top1' else None
    top5 = None
    summary = source.path.parent / 'summary.csv'
    if summary.is_file():
        line = next((r for r in read_csv(summary) if r.get('epoch') == str(source.epoch)), {})
        try:
            top1 = float(line['eval_top1']) if line.get('eval_top1') else top1
            top5 = float(line['eval_top5']) if line.get('eval_top5') else top5
        except ValueError as e:
            raise PSTError(f'{summary} is garbled ({e}): mend or move it.') from None
    if top1 is None:
        return None
    _check_accuracy({'top1': top1, 'top5': top5}, f'{source.path} or the summary.csv beside it says')
    cfg = model.pretrained_cfg
    measured = f'in training, after epoch {source.epoch + 1}'
    if source.path.name.startswith('model_best'):
        measured += ', the epoch that was best on these images'
    return Accuracy(top1, top5, cfg['input_size'][-1], cfg['crop_pct'], cfg['interpolation'], measured)


def _test_config(accuracy: Optional[Accuracy], model: nn.Module) -> Optional[Dict[str, Any]]:
    cfg = model.pretrained_cfg
    config: Dict[str, Any] = {}
    if accuracy is not None and accuracy.img_size != cfg['input_size'][-1]:
        config['test_input_size'] = (cfg['input_size'][0], accuracy.img_size, accuracy.img_size)
    if accuracy is not None and accuracy.crop_pct != cfg['crop_pct']:
        config['test_crop_pct'] = accuracy.crop_pct
    return config or None
