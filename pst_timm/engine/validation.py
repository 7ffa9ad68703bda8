"""`validate` evaluates models on a split, and writes the results as timm does."""
import copy
import csv
import json
import logging
from argparse import Namespace
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
from timm.data import resolve_data_config
from timm.layers import apply_test_time_pool
from timm.task import ClassificationEvaluator
from timm.utils import check_batch_size_retry, decay_batch_step, random_seed, reparameterize_model

from . import setup
from .checkpoint import read_weights
from .data import check_classes, create_eval_dataset, create_eval_loader
from .errors import EngineError
from .evaluate import evaluate
from .measures import AnswerMeasure, CalibrationMeasure, ClassMeasure, Measure, RealLabelsMeasure, SweepMeasure

__all__ = ['load_model', 'validate', 'write_results']

_logger = logging.getLogger(__name__)

Results = Dict[str, Any]


def validate(args: Namespace) -> List[Results]:
    """Evaluate one or several models.

    Args:
        args: From `parse_validate_args` or `validate_args`; not changed.

    Returns:
        One mapping per model, best first: model, top1, top5, loss, images_per_second and what else was asked for.

    Raises:
        EngineError: If anything the user can mend is wrong; the message says what.
    """
    setup.import_modules(args.device_modules)
    jobs = [
        Namespace(**dict(vars(copy.deepcopy(args)), model=model, checkpoint=checkpoint))
        for model, checkpoint in _models_and_checkpoints(args)
    ]
    results = []
    for job in jobs:
        try:
            results += _validate_with_retry(job)
        except EngineError as e:
            if len(jobs) == 1:
                raise
            _logger.error(f'{job.checkpoint or job.model}: {e}')
            results.append(OrderedDict(model=job.model, checkpoint=job.checkpoint, error=str(e)))
    if len(jobs) > 1:
        results.sort(key=lambda r: -r.get('top1', -1.))
    if args.results_file:
        write_results(args.results_file, results, args.results_format)
    return results


def _models_and_checkpoints(args: Namespace) -> List[Tuple[str, str]]:
    models = args.model.split(',')
    if not args.checkpoint or not Path(args.checkpoint).is_dir():
        return [(model, args.checkpoint) for model in models]
    endings = ('.pth.tar', '.pth', '.pt', '.safetensors')
    files = sorted(p for p in Path(args.checkpoint).iterdir() if p.name.endswith(endings))
    if not files:
        raise EngineError(f'The folder {args.checkpoint} has no checkpoints ({", ".join(endings)}).')
    return [(model, str(f)) for model in models for f in files]


def _validate_with_retry(args: Namespace) -> List[Results]:
    while True:
        try:
            return _validate_one(copy.deepcopy(args))
        except RuntimeError as e:
            smaller = decay_batch_step(args.batch_size) if args.retry and check_batch_size_retry(str(e)) else 0
            if isinstance(e, EngineError) or not smaller:
                raise
            _logger.warning(f'{e}\nTrying again with a batch of {smaller}.')
            args.batch_size = smaller
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def load_model(args: Namespace) -> nn.Module:
    """The model that the arguments name, with the weights of --checkpoint, on the CPU."""
    args.pretrained = args.pretrained or not args.checkpoint
    model = setup.build_model(args)
    if args.checkpoint:
        weights = read_weights(args.checkpoint, args.use_ema)
        try:
            model.load_state_dict(weights)
        except RuntimeError as e:
            raise EngineError(
                f'{args.checkpoint} does not fit {args.model} with {args.num_classes} classes: {e} '
                f'Check --model, --num-classes and --model-kwargs.') from e
    return reparameterize_model(model) if args.reparam else model


def _compile(args: Namespace, model: nn.Module) -> nn.Module:
    if args.torchscript:
        return setup.script(model)
    if args.torchcompile:
        return torch.compile(model, backend=args.torchcompile, mode=args.torchcompile_mode)
    if args.aot_autograd:
        return torch.compile(model, backend='aot_eager')
    return torch.nn.DataParallel(model, device_ids=list(range(args.num_gpu))) if args.num_gpu > 1 else model


def _valid_labels(args: Namespace) -> Optional[List[int]]:
    if not args.valid_labels:
        return None
    try:
        return [int(line) for line in Path(args.valid_labels).read_text().split()]
    except (OSError, ValueError) as e:
        raise EngineError(f'--valid-labels {args.valid_labels}: expected a text file of class indices ({e}).') from e


class _Subset(nn.Module):
    """Passes on the outputs of some classes alone."""

    def __init__(self, model: nn.Module, labels: List[int]):
        super().__init__()
        self.model = model
        self.labels = labels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)[:, self.labels]


def _validate_one(args: Namespace) -> List[Results]:
    random_seed(args.seed)
    explicit_classes = args.num_classes is not None
    device = setup.init_device(args)
    dtype = setup.resolve_dtype(args)
    model = load_model(args)
    params = sum(p.numel() for p in model.parameters())
    data_config = resolve_data_config(vars(args), model=model, use_test_size=not args.use_train_size)
    if args.test_pool:
        model, changed = apply_test_time_pool(model, data_config)
        data_config = dict(data_config, crop_pct=1.) if changed else data_config
    dataset = create_eval_dataset(args, args.split, args.num_samples)
    labels = _valid_labels(args)
    if labels is None:
        check_classes(dataset, args.num_classes, explicit_classes, args.split)
    loader = create_eval_loader(args, dataset, data_config, args.batch_size, dtype)
    model.to(device=device, dtype=dtype, memory_format=torch.channels_last if args.channels_last else None).eval()
    runnable = _compile(args, model)
    runnable = runnable if labels is None else _Subset(runnable, labels)

    autocast = setup.autocast_for(args, device)
    measures = partial(_measures, args, dataset)
    sweep = SweepMeasure(model, runnable, args.topk_sweep, autocast, measures) if args.topk_sweep else None
    observers = [sweep] if sweep else measures()
    metrics = evaluate(
        runnable,
        loader,
        ClassificationEvaluator(device),
        device,
        autocast,
        channels_last=args.channels_last,
        log_interval=args.log_freq,
        observe=lambda *batch: [o.update(*batch) for o in observers],
    )
    top1, top5 = round(metrics['top1'], 4), round(metrics['top5'], 4)
    results = OrderedDict(
        model=args.model,
        top1=top1, top1_err=round(100 - top1, 4),
        top5=top5, top5_err=round(100 - top5, 4),
        loss=round(metrics['loss'], 6),
        param_count=round(params / 1e6, 2),
        img_size=data_config['input_size'][-1],
        crop_pct=data_config['crop_pct'],
        interpolation=data_config['interpolation'],
        images_per_second=round(metrics['images_per_second'], 2),
    )
    if args.checkpoint:
        results['checkpoint'] = args.checkpoint
    for observer in observers:
        results.update(observer.results())
    return [OrderedDict(results, **row) for row in sweep.rows()] if sweep else [results]


def _measures(args: Namespace, dataset: Any) -> List[Measure]:
    measures: List[Measure] = []
    if args.answers:
        measures.append(AnswerMeasure())
    if args.calibrate:
        measures.append(CalibrationMeasure())
    if args.metrics_avg:
        measures.append(ClassMeasure(args.metrics_avg))
    if args.real_labels:
        measures.append(RealLabelsMeasure(dataset, args.real_labels))
    return measures


def write_results(path: str, results: List[Results], format: str = 'csv') -> None:
    """Write results as a CSV file with a header, or as a JSON list.

    Raises:
        EngineError: If the file cannot be written.
    """
    columns = list(OrderedDict.fromkeys(key for row in results for key in row))
    try:
        with open(path, 'w', newline='') as f:
            if format == 'json':
                json.dump(results, f, indent=4)
            else:
                writer = csv.DictWriter(f, fieldnames=columns)
                writer.writeheader()
                writer.writerows(results)
    except OSError as e:
        raise EngineError(f'Cannot write --results-file {path}: {e.strerror}.') from e
