"""`validate` evaluates models on a split, and writes the results as timm does."""
import copy
import logging
from argparse import Namespace
from collections import OrderedDict
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from timm.data import ImageDataset
from timm.layers import apply_test_time_pool, set_fast_norm
from timm.task import ClassificationEvaluator
from timm.utils import check_batch_size_retry, decay_batch_step, random_seed

from pst_timm.checkpoints import label_names, load_model, preprocessing
from pst_timm.checkpoints.reading import has_weights_ending
from pst_timm.data.datasets import (
    check_class_names,
    check_classes,
    check_mapped_names,
    class_names,
    create_eval_dataset,
)
from pst_timm.data.loaders import bad_images, create_eval_loader, plain_worker_errors
from pst_timm.metrics.answers import Answers
from pst_timm.metrics.base import Metric
from pst_timm.metrics.calibration import Calibration
from pst_timm.metrics.classification import ClassReport, RealLabels
from pst_timm.utils.devices import choose_threads
from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import check_output, read_text, write_csv, write_json

from . import factories
from .batches import LabelledImages
from .dry_run import check_channels, check_input
from .inference import evaluate
from .progress import format_metrics
from .protocols import Adjustable, Finished, Measured

__all__ = ['open_model', 'validate', 'write_results']

_logger = logging.getLogger(__name__)

Results = Dict[str, Any]
Load = Callable[..., nn.Module]


def validate(
        args: Namespace,
        load: Load = load_model,
        is_model: Callable[[Path], bool] = has_weights_ending,
) -> List[Results]:
    """Evaluate one or several models.

    Args:
        args: From `parse_validate_args` or `validate_args`; not changed.
        load: What opens a model, called as `load_model` is.
        is_model: Which files of a folder it opens.

    Returns:
        One mapping per model, best first: model, top1, top5, loss, images_per_second and what else was asked for; of
        several models, those that cannot be evaluated have an `error` instead.

    Raises:
        PSTError: If anything the user can mend is wrong; the message says what.
    """
    factories.import_modules(args.device_modules)
    if args.results_file:
        check_results_file(Path(args.results_file))
    jobs = [
        Namespace(**dict(vars(copy.deepcopy(args)), model=model, checkpoint=checkpoint))
        for model, checkpoint in _models_and_checkpoints(args, is_model)
    ]
    results = []
    for job in jobs:
        try:
            with plain_worker_errors():
                results += _validate_with_retry(job, load)
        except RuntimeError as e:  # of ours, or of torch that has no more memory
            if len(jobs) == 1:
                raise
            _logger.error(f'{job.checkpoint or job.model}: {e}')
            results.append(OrderedDict(model=job.model, checkpoint=job.checkpoint, error=str(e)))
    if len(jobs) > 1:
        results.sort(key=lambda r: -r.get('top1', -1.))
    if args.results_file:
        write_results(args.results_file, results, args.results_format)
    return results


def _models_and_checkpoints(
        args: Namespace,
        is_model: Callable[[Path], bool],
) -> List[Tuple[Optional[str], str]]:
    models = args.model.split(',') if args.model else [None]
    if not args.checkpoint or not Path(args.checkpoint).is_dir():
        return [(model, args.checkpoint) for model in models]
    files = sorted(p for p in Path(args.checkpoint).iterdir() if p.is_file() and is_model(p))
    if not files:
        raise PSTError(f'The folder {args.checkpoint} has no checkpoints (*.pth.tar, *.safetensors, ...).')
    return [(model, str(f)) for model in models for f in files]


def _validate_with_retry(args: Namespace, load: Load) -> List[Results]:
    while True:
        try:
            return _validate_one(copy.deepcopy(args), load)
        except RuntimeError as e:
            smaller = decay_batch_step(args.batch_size) if args.retry and check_batch_size_retry(str(e)) else 0
            if isinstance(e, PSTError) or not smaller:
                raise
            _logger.warning(f'{e}\nTrying again with a batch of {smaller}.')
            args.batch_size = smaller
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def open_model(args: Namespace, load: Load = load_model) -> nn.Module:
    """The model that the arguments name, with its weights, on the CPU; sets `model`, `num_classes` and `in_chans`."""
    if args.fast_norm:
        set_fast_norm()
    kwargs = dict(
        use_ema=args.use_ema,
        num_classes=args.num_classes,
        in_chans=args.in_chans or (args.input_size[0] if args.input_size else None),
        global_pool=args.gp,
        scriptable=args.torchscript or None,
        reparam=args.reparam,
    )
    kwargs = {k: v for k, v in kwargs.items() if v is not None}
    if not args.checkpoint and not args.model:
        raise PSTError('Nothing to evaluate: name a --checkpoint, or a --model with published weights.')
    source = args.checkpoint or args.model
    named = dict(arch=args.model) if args.checkpoint else dict(pretrained=True)
    model = factories.with_model_kwargs(
        lambda more: load(source, **named, **{**kwargs, **more}), args.model_kwargs, kwargs)
    own = model.pretrained_cfg.get('num_classes')
    if own not in (None, model.num_classes):
        raise PSTError(
            f'The weights of {source} know {own} classes, not {model.num_classes}: another classifier would give '
            f'random answers. Leave --num-classes out.')
    args.model = args.model or model.pretrained_cfg['architecture']
    args.num_classes, args.in_chans = model.num_classes, model.pretrained_cfg['input_size'][0]
    return model


def _compile(args: Namespace, model: nn.Module) -> nn.Module:
    if args.torchscript:
        return factories.script(model)
    if args.torchcompile:
        return torch.compile(model, backend=args.torchcompile, mode=args.torchcompile_mode)
    if args.aot_autograd:
        return torch.compile(model, backend='aot_eager')
    return torch.nn.DataParallel(model, device_ids=list(range(args.num_gpu))) if args.num_gpu > 1 else model


def check_results_file(path: Path) -> None:
    """Make sure, before the work, that results can be written, and that they replace nothing but earlier results.

    Raises:
        PSTError: If it is not so.
    """
    check_output(path, overwrite=True)
    if not path.is_file() or not path.stat().st_size:
        return
    with open(path, 'rb') as file:
        first = file.read(4096).split(b'\n')[0:3]
    header = first[0].decode('utf-8', errors='replace').strip().split(',')
    json_like = first[0][:1] in (b'[', b'{') and b'"model"' in b''.join(first)
    if 'model' not in header and not json_like:
        raise PSTError(f'--results-file {path} is there already, and holds no results: name another file.')


def _valid_labels(args: Namespace, dataset: Any) -> Optional[List[int]]:
    """Outputs of the model that are those of the classes of the data, in their order; None for all."""
    if not args.valid_labels:
        return None
    where = f'--valid-labels {args.valid_labels}'
    try:
        labels = [int(line) for line in read_text(args.valid_labels).split()]
    except (OSError, ValueError) as e:
        raise PSTError(f'{where}: expected a text file of class indices ({e}).') from e
    odd = [n for n in labels if not 0 <= n < args.num_classes]
    if odd:
        raise PSTError(f'{where}: there is no class {odd[0]}: the model has those from 0 to {args.num_classes - 1}.')
    if len(set(labels)) < len(labels):
        raise PSTError(f'{where}: an index is there twice.')
    names = class_names(dataset)
    if not labels or (names is not None and len(labels) != len(names)):
        count = f'the {len(names)} classes' if names else 'each class'
        raise PSTError(f'{where}: expected an index for {count} of the data, got {len(labels)}.')
    return labels


class _Subset(nn.Module):
    """Passes on the outputs of some classes alone."""

    def __init__(self, model: nn.Module, labels: List[int]):
        super().__init__()
        self.model = model
        self.labels = labels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)[:, self.labels]


def _validate_one(args: Namespace, load: Load) -> List[Results]:
    random_seed(args.seed)
    if args.num_gpu > max(1, torch.cuda.device_count()):
        raise PSTError(f'--num-gpu {args.num_gpu}: torch sees {torch.cuda.device_count()} GPUs.')
    explicit_classes = args.num_classes is not None
    device = factories.init_device(args)
    if device.type == 'cpu':
        choose_threads()
    dtype = factories.resolve_dtype(args)
    model = open_model(args, load)
    params = sum(p.numel() for p in model.parameters())
    known_classes, ema = known_names(model), getattr(model, 'checkpoint_ema', None)
    data_config = preprocessing(
        model, args.checkpoint, vars(args), use_test_size=not args.use_train_size)
    check_form(args, model)
    if args.test_pool:
        check_test_pool(model)
        model, changed = apply_test_time_pool(model, data_config)
        data_config = dict(data_config, crop_pct=1.) if changed else data_config
    check_channels(args, args.in_chans)
    dataset = create_eval_dataset(args, args.split, args.num_samples)
    check_border(args, dataset)
    check_input(args, model, data_config, args.batch_size, dataset)
    labels = _valid_labels(args, dataset)
    check_labels(args, dataset, known_classes, labels, explicit_classes)
    if args.topk_sweep:
        check_sweep(args, model)
    loader = create_eval_loader(args, dataset, data_config, args.batch_size, dtype)
    model.to(device=device, dtype=dtype, memory_format=torch.channels_last if args.channels_last else None).eval()
    runnable = _compile(args, model)
    runnable = runnable if labels is None else _Subset(runnable, labels)

    autocast = factories.autocast_for(args, device)
    run = partial(_evaluate, args, runnable, loader, device, autocast, partial(_metrics, args, dataset, model))
    facts = dict(
        # what is exported does not tell its parameters
        **({} if isinstance(model, Finished) else dict(param_count=round(params / 1e6, 2))),
        img_size=data_config['input_size'][-1],
        crop_pct=data_config['crop_pct'],
        interpolation=data_config['interpolation'],
    )
    if args.checkpoint:
        facts['checkpoint'] = args.checkpoint
        if ema is not None:
            facts['ema'] = ema
    if not args.topk_sweep:
        return [OrderedDict(model=args.model, **run(), **facts)]
    rows = []
    for setting in model.sweep_settings(args.topk_sweep):
        columns = model.settings_columns(setting, data_config['input_size'][-2:])
        with model.with_settings(**setting):
            row = OrderedDict(model=args.model, **columns, **run(), **facts)
        _logger.info(f'{setting}: {format_metrics({k: row[k] for k in ("top1", "top5", "loss")})}')
        rows.append(row)
    return rows


def check_border(args: Namespace, dataset: Any) -> None:
    """Make sure that something of the first image is left once its border is cut.

    Raises:
        PSTError: If nothing is.
    """
    if not args.crop_border_pixels or not isinstance(dataset, ImageDataset):
        return
    size = dataset[0][0].size
    if 2 * args.crop_border_pixels >= min(size):
        raise PSTError(
            f'--crop-border-pixels {args.crop_border_pixels} leaves nothing of an image of {size[0]}x{size[1]} pixels, '
            f'the first of the data: choose fewer.')


def check_form(args: Namespace, model: nn.Module) -> None:
    """Make sure that a model in its last form, see `protocols.Finished`, is to run in no other one.

    Raises:
        PSTError: If it is.
    """
    flags = ('test_pool', 'torchscript', 'torchcompile', 'aot_autograd')
    asked = [flag for flag in flags if getattr(args, flag)] + ['num_gpu'] * (args.num_gpu > 1)
    if asked and isinstance(model, Finished):
        raise PSTError(
            f'{args.checkpoint or args.model} is {model.finished_as()}, which runs as it is: leave out '
            f'--{asked[0].replace("_", "-")}.')


def check_test_pool(model: nn.Module) -> None:
    """Make sure that the classifier of a model reads what `forward_features` gives, as timm's test time pooling does.

    Raises:
        PSTError: If it reads what a wider or narrower head makes of that.
    """
    width = getattr(model, 'head_hidden_size', model.num_features)
    if width != model.num_features:
        raise PSTError(
            f'--test-pool pools the {model.num_features} channels of the last map, where the classifier of this model '
            f'reads the {width} of its head: leave it out.')


def known_names(model: nn.Module) -> List[str]:
    """Names of the classes that a model was trained on, of all its outputs or of the first ones; empty if unknown."""
    names = list(model.pretrained_cfg.get('label_names') or ())
    # a classifier that was made larger than the data has names for its first outputs alone
    return label_names(model) or (names if len(names) < model.num_classes else [])


def check_labels(
        args: Namespace,
        dataset: Any,
        known: Sequence[str],
        labels: Optional[Sequence[int]],
        explicit: bool,
) -> None:
    """Make sure that a label of the data means the class that the model has there, as far as both have names.

    Args:
        args: Arguments of the evaluation.
        dataset: Its data.
        known: Names that the model knows its classes by, empty if it knows none.
        labels: Classes that count, where --valid-labels names them.
        explicit: Whether the user gave the number of classes.

    Raises:
        PSTError: If the classes are others, or in another order; the message says how to map them.
    """
    if args.real_labels:  # which go by the names of the files
        return
    model = args.checkpoint or args.model
    if args.class_map and labels is None:
        check_mapped_names(dataset, known, model)
    else:
        expected = known if labels is None else [known[i] for i in labels if 0 <= i < len(known)]
        check_class_names(
            class_names(dataset), expected, f'the {args.split!r} split', model,
            'Where folders have other names, or are but some of the classes, say which is which with --class-map (the '
            'folder names in the order of the outputs, one a line) or --valid-labels.')
    check_classes(dataset, args.num_classes if labels is None else len(labels), explicit, args.split)


def check_sweep(args: Namespace, model: nn.Module) -> None:
    """Make sure that a model can be run in several settings, see `protocols.Adjustable`.

    Raises:
        PSTError: If the model offers none, or is compiled in a way that keeps the setting it had.
    """
    if not isinstance(model, Adjustable):
        raise PSTError('--topk-sweep needs a model with settings to compare, and this one offers none.')
    if args.torchscript:
        raise PSTError('--topk-sweep cannot change a scripted model: leave out --torchscript, or use --torchcompile.')


def _evaluate(
        args: Namespace,
        model: nn.Module,
        loader: Any,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager],
        make_metrics: Callable[[], List[Metric]],
) -> Results:
    """One run of a model over the data."""
    metrics = make_metrics()
    found = evaluate(
        model,
        loader,
        ClassificationEvaluator(device),
        LabelledImages(device, factories.resolve_dtype(args), args.channels_last),
        autocast,
        log_interval=args.log_freq,
        observe=lambda output, target: [m.update(output, target) for m in metrics],
    )
    top1, top5 = round(found['top1'], 4), round(found['top5'], 4)
    results = OrderedDict(
        top1=top1, top1_err=round(100 - top1, 4),
        top5=top5, top5_err=round(100 - top5, 4),
        loss=round(found['loss'], 6),
        images_per_second=round(found['images_per_second'], 2),
    )
    if (bad := bad_images(loader)) is not None and bad.count:
        results['unreadable_images'] = bad.count  # others stand in for them
    for metric in metrics:
        results.update(metric.results())
    return results


def _metrics(args: Namespace, dataset: Any, model: nn.Module) -> List[Metric]:
    metrics = list(model.own_metrics()) if isinstance(model, Measured) else []
    if args.answers:
        metrics.append(Answers())
    if args.calibrate:
        metrics.append(Calibration())
    if args.metrics_avg:
        metrics.append(ClassReport(args.metrics_avg))
    if args.real_labels:
        metrics.append(RealLabels(dataset, args.real_labels))
    return metrics


def write_results(path: str, results: List[Results], format: str = 'csv') -> None:
    """Write results as a CSV file with a header, or as a JSON list.

    Raises:
        PSTError: If the file cannot be written.
    """
    (write_json if format == 'json' else write_csv)(path, results)
