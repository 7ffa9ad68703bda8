"""From a checkpoint to a repository on the Hub: weights, config.json and a model card, in one commit or not at all."""
import csv
import json
import logging
import os
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence

import timm
import torch
import torch.nn as nn
from huggingface_hub import CommitOperationAdd, HfApi, get_token, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the client's HTTP library, whichever it is
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from timm.models import save_for_hf, split_model_name_tag

from pst_timm.models import ResNetPST
from pst_timm.models.digest import digest_note

from .card import Accuracy, model_card
from .checkpoint import Checkpoint, attention_settings, build_model, check_finite, read_checkpoint
from .errors import HubError, HubUnavailable

__all__ = ['Publication', 'publish', 'save_folder']

_logger = logging.getLogger(__name__)

FILES = ('model.safetensors', 'config.json', 'README.md')
TOLERANCE = 1e-5  # of the largest logit, between the checkpoint's model and the published one


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


def save_folder(
        model: nn.Module,
        folder: os.PathLike,
        class_names: Optional[Sequence[str]] = None,
        data_config: Optional[Dict[str, Any]] = None,
) -> None:
    """Write model.safetensors and timm's config.json, and make sure that they give the same model again.

    Args:
        model: A model with its weights.
        folder: Folder to write.
        class_names: Names of the classes in the order of the outputs.
        data_config: Preprocessing at test time, where it differs from the model's: timm's `test_input_size`,
            `test_crop_pct`.

    Raises:
        HubError: If the class names do not fit, the folder cannot be written, or what is read again differs.
    """
    if class_names and len(class_names) != model.num_classes:
        raise HubError(f'{len(class_names)} class names for a model of {model.num_classes} classes.')
    config: Dict[str, Any] = {'pretrained_cfg': {'notes': [digest_note(model.state_dict())]}}
    if class_names:
        config['label_names'] = list(class_names)
    try:
        save_for_hf(
            model, os.fspath(folder), model_config=config, model_args=attention_settings(model),
            safe_serialization=True, data_config=data_config)
    except OSError as e:
        raise HubError(f'Cannot write {folder}: {e}.') from e
    _check_reloaded(model, Path(folder))


@torch.inference_mode()
def _check_reloaded(model: nn.Module, folder: Path) -> None:
    x = torch.randn(2, *model.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(0))
    expected = model.eval()(x)
    try:
        got = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()(x)
    except RuntimeError as e:
        raise HubError(f'What was written to {folder} cannot be loaded again: {e}') from e
    difference = float('inf')
    if got.shape == expected.shape:
        difference = ((got - expected).abs().max() / expected.abs().max().clamp_min(1e-12)).item()
    if not difference <= TOLERANCE:
        raise HubError(
            f'What was written to {folder} gives other logits than the checkpoint (by {difference:.1e} of the largest '
            f'one). Nothing was published; please report this.')


def publish(
        checkpoint: os.PathLike,
        repo_id: str,
        *,
        private: bool = False,
        revision: Optional[str] = None,
        dry_run: bool = False,
        folder: Optional[os.PathLike] = None,
        use_ema: bool = True,
        topk: Optional[int] = None,
        fine_fusion: Optional[str] = None,
        results: Optional[os.PathLike] = None,
        class_names: Optional[Sequence[str]] = None,
        data_set: Optional[str] = None,
        license: str = 'apache-2.0',
        token: Optional[str] = None,
        attempts: int = 3,
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
        use_ema: Whether to take the moving average of a training checkpoint, if there is one.
        topk: Fine attention the accuracy was measured with, as the checkpoint has it if None.
        fine_fusion: Its fusion.
        results: What `validate.py --results-file` wrote for these weights, CSV or JSON; without it the card tells
            what the run measured while training.
        class_names: Names of the classes in the order of the outputs.
        data_set: Name of the data set, the run's if None.
        license: Identifier of the licence of the weights.
        token: Access token, the one of `hf auth login` or `HF_TOKEN` if None.
        attempts: How often an upload is tried.

    Raises:
        HubError: If anything is wrong that the user can mend.
        HubUnavailable: If the Hub cannot be reached or cannot answer.
    """
    _check_name(repo_id)
    source = read_checkpoint(checkpoint, use_ema)
    check_finite(source)
    model = build_model(source)
    if not isinstance(model, ResNetPST):
        raise HubError(
            f'{source.path} is a checkpoint of {source.arch}, which is no architecture of this package. Use '
            f'timm.models.push_to_hf_hub for it.')
    model.pretrained_cfg['license'] = license
    changed = _set_attention(model, topk, fine_fusion)
    if results is not None:
        accuracy = _measured(_read_results(results), source, attention_settings(model))
    else:
        accuracy = None if changed else _measured_in_training(source, model)
    data_set = data_set or source.args.get('dataset') or Path(source.args.get('data_dir') or '').name or None

    upload = None if dry_run else _Upload(repo_id, private, revision, token, attempts)
    if upload is not None:
        upload.check_access(source.arch)
    if folder is None and dry_run:
        folder = Path('output', 'publish', repo_id.split('/')[1])
    with _kept_or_temporary(folder) as place:
        save_folder(model, place, class_names, _test_config(accuracy, model))
        if class_names:
            model.pretrained_cfg['label_names'] = tuple(class_names)
        card = model_card(repo_id, source, model, accuracy, data_set, license)
        (place / 'README.md').write_text(card, encoding='utf-8')
        url = upload.send(place) if upload is not None else None
    return Publication(Path(folder) if folder else None, url, bool(source.ema), accuracy)


def _check_name(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as e:
        raise HubError(f'{repo_id!r} cannot name a repository: {e}') from None
    if repo_id.count('/') != 1:
        raise HubError(f"{repo_id!r} must name the owner too, as in 'org/name'.")


@contextmanager
def _kept_or_temporary(folder: Optional[os.PathLike]) -> Iterator[Path]:
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
        return
    folder = Path(folder)
    if folder.exists() and any(path.name not in FILES for path in folder.iterdir()):
        raise HubError(f'{folder} holds other files: name a new or empty folder.')
    folder.mkdir(parents=True, exist_ok=True)
    yield folder


# what was measured

def _read_results(path: os.PathLike) -> List[Dict[str, Any]]:
    try:
        with open(path, newline='') as file:
            rows = json.load(file) if Path(path).suffix == '.json' else list(csv.DictReader(file))
        rows = rows if isinstance(rows, list) else [rows]
        for row in rows:
            row.update(
                top1=float(row['top1']), top5=float(row['top5']), img_size=int(row['img_size']),
                crop_pct=float(row['crop_pct']), interpolation=str(row['interpolation']))
            if row.get('topk') not in (None, ''):
                row['topk'] = int(row['topk'])
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as e:
        raise HubError(f'{path} is not a results file of validate.py ({e!r}).') from None
    if not rows:
        raise HubError(f'{path} holds no results.')
    return rows


def _set_attention(model: nn.Module, topk: Optional[int], fine_fusion: Optional[str]) -> bool:
    """Set what is given; returns whether that changed anything."""
    before = attention_settings(model)
    try:
        model.set_topk(before['topk'] if topk is None else topk, fine_fusion)
    except ValueError as e:
        raise HubError(str(e)) from None
    return attention_settings(model) != before


def _measured(rows: List[Dict[str, Any]], source: Checkpoint, settings: Dict[str, Any]) -> Accuracy:
    """The accuracy from the row of results that was measured with the model's attention."""
    def fits(row: Dict[str, Any]) -> bool:
        if 'topk' not in row:  # no sweep: measured with what was given to validate.py
            return True
        return row['topk'] == settings['topk'] and (not row['topk'] or row['fine_fusion'] == settings['fine_fusion'])

    found = [row for row in rows if fits(row)]
    if len(found) != 1:
        raise HubError(
            f'The results have {len(found)} rows for topk={settings["topk"]}, fine_fusion={settings["fine_fusion"]}; '
            f'one was expected. Say which one with topk and fine_fusion, or measure again.')
    row = found[0]
    name = row.get('model') or source.arch
    if ':' not in name and split_model_name_tag(name)[0] != source.arch:
        raise HubError(f'The results are those of {name}, the checkpoint is one of {source.arch}.')
    if source.ema and row.get('checkpoint'):
        raise HubError(
            f'The results do not tell whether the moving average in {row["checkpoint"]} was measured. Measure what is '
            f'published: publish with --dry-run, then validate with --model local-dir:FOLDER --pretrained.')
    return Accuracy(
        row['top1'], row['top5'], row['img_size'], row['crop_pct'], row['interpolation'],
        'by `validate.py` on these weights')


def _measured_in_training(source: Checkpoint, model: nn.Module) -> Optional[Accuracy]:
    """What the run measured for these weights, None if it measured others, or is not known."""
    averaged = bool(source.args.get('model_ema')) and not source.args.get('model_ema_force_cpu')
    if source.epoch is None or bool(source.ema) != averaged:
        return None
    top1 = source.metric if source.args.get('eval_metric') == 'top1' else None
    top5 = None
    summary = source.path.parent / 'summary.csv'
    if summary.is_file():
        with open(summary, newline='') as file:
            line = next((r for r in csv.DictReader(file) if r.get('epoch') == str(source.epoch)), {})
        top1 = float(line['eval_top1']) if line.get('eval_top1') else top1
        top5 = float(line['eval_top5']) if line.get('eval_top5') else top5
    if top1 is None:
        return None
    cfg = model.pretrained_cfg
    measured = f'in training, after epoch {source.epoch} (counted from 0)'
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


# the way to the Hub

class _Upload:
    """One repository, and what may go wrong on the way there, in words."""

    def __init__(self, repo_id: str, private: bool, revision: Optional[str], token: Optional[str], attempts: int):
        self.repo_id = repo_id
        self.private = private
        self.revision = revision
        self.attempts = attempts
        self.token = token or get_token()
        if not self.token:
            raise HubError(
                'There is no access token for the Hub: run `hf auth login`, or set HF_TOKEN, with a token that may '
                'write.')
        self.api = HfApi(token=self.token)

    def check_access(self, arch: str) -> None:
        """Make sure, before any work, that the token may write there and that nothing foreign is overwritten."""
        owner = self.repo_id.split('/')[0]
        me = self._ask(self.api.whoami)
        namespaces = [me['name'], *(org['name'] for org in me.get('orgs', []))]
        if owner not in namespaces:
            raise HubError(
                f'{self.repo_id} is not ours: the token is that of {me["name"]}, who may write to '
                f'{", ".join(namespaces)}. Name another repository, or use a token of a member of {owner}.')
        try:
            info = self._ask(lambda: self.api.model_info(self.repo_id, revision=self.revision))
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return
        names = {f.rfilename for f in info.siblings} - {'.gitattributes', *FILES}
        pickles = sorted(n for n in names if n.endswith(('.bin', '.pth', '.pt', '.tar', '.ckpt', '.pkl')))
        if pickles:
            raise HubError(
                f'{self.repo_id} holds {pickles[0]}, a pickle, which could be loaded in place of the published '
                f'weights: delete it there, or name another repository.')
        found = self._architecture_there()
        if found not in (None, arch):
            raise HubError(
                f'{self.repo_id} holds a model of another architecture ({found}, not {arch}): name another '
                f'repository.')

    def _architecture_there(self) -> Optional[str]:
        with tempfile.TemporaryDirectory() as cache:
            try:
                path = self._ask(lambda: hf_hub_download(
                    self.repo_id, 'config.json', revision=self.revision, token=self.token, cache_dir=cache))
                return json.loads(Path(path).read_text()).get('architecture', 'unknown')
            except EntryNotFoundError:
                return None
            except (ValueError, AttributeError):
                return 'unknown'

    def send(self, folder: Path) -> str:
        """Upload the three files in one commit; returns its address."""
        self._ask(lambda: self.api.create_repo(self.repo_id, private=self.private, exist_ok=True))
        if self.revision and self.revision != 'main':
            self._ask(lambda: self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True))
        for attempt in range(1, self.attempts):
            try:
                return self._commit(folder)
            except HubUnavailable as e:
                wait = 2 ** attempt
                _logger.warning(f'{e} Trying again in {wait} s.')
                time.sleep(wait)
        try:
            return self._commit(folder)
        except HubUnavailable as e:
            raise HubUnavailable(
                f'{e} Nothing is half published, and what has arrived is not sent again: run the same command again to '
                f'go on.') from e

    def _commit(self, folder: Path) -> str:
        # anew each time: the Hub then tells what has arrived, and whether the commit itself was made
        operations = [CommitOperationAdd(name, str(folder / name)) for name in FILES]
        return str(self._ask(lambda: self.api.create_commit(
            self.repo_id, operations, commit_message='Publish model', revision=self.revision)).commit_url)

    def _ask(self, call: Callable[[], Any]) -> Any:
        """Ask the Hub; answers that the caller may expect pass, all others become words for the user."""
        try:
            return call()
        except OfflineModeIsEnabled as e:
            raise HubUnavailable('The Hub is not asked in offline mode: unset HF_HUB_OFFLINE.') from e
        except (HTTPError, OSError, RuntimeError) as e:
            # an upload wraps what went wrong
            cause = e.__cause__ if isinstance(e, RuntimeError) and e.__cause__ is not None else e
            expected = (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError)
            if isinstance(cause, HfHubHTTPError):
                if isinstance(cause, expected) and cause.response.status_code == 404:
                    raise
                raise self._refused(cause.response.status_code) from e
            raise HubUnavailable(f'The Hub at {self.api.endpoint} cannot be reached ({cause}).') from e
        except ValueError as e:
            raise HubError(f'The Hub does not accept what was sent: {e}') from e

    def _refused(self, status: int) -> HubError:
        if status == 401:
            return HubError(
                'The Hub does not accept the access token: run `hf auth login` again, or correct HF_TOKEN.')
        if status == 403:
            return HubError(
                f'The token may not write to {self.repo_id}: it needs the role "write", and its owner the right to '
                f'write there.')
        if status == 404:
            return HubError(f'The Hub at {self.api.endpoint} knows no repository or branch of that name.')
        if status in (409, 412):
            return HubError(f'{self.repo_id} was changed by someone else at the same time: run the command again.')
        if status == 422:
            return HubError(
                'The Hub received other bytes than were sent (wrong hash): check the disk and the network, and run the '
                'command again.')
        if status == 429:
            return HubUnavailable('The Hub wants fewer requests (rate limit): wait some minutes.')
        if status >= 500:
            return HubUnavailable(f'The Hub has a fault of its own (HTTP {status}).')
        return HubError(f'The Hub refused the request (HTTP {status}).')
