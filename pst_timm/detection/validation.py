"""`validate` evaluates a detector on a split: COCO's twelve numbers, the precision of each class, and the speed."""
import copy
import logging
import math
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any, Dict, List, Tuple

import torch
from timm.layers import set_fast_norm
from timm.utils import random_seed

from pst_timm.data.loaders import plain_worker_errors
from pst_timm.engine import factories
from pst_timm.engine.inference import evaluate
from pst_timm.engine.progress import format_metrics
from pst_timm.engine.validation import check_results_file, write_results
from pst_timm.utils.devices import choose_threads
from pst_timm.utils.errors import PSTError

from .batches import BoxBatches
from .checkpoint import open_detector
from .datasets import BoxDataset, open_boxes
from .evaluation import METRICS, CocoEvaluator
from .loaders import create_eval_box_loader
from .models import Detector

__all__ = ['evaluate_detector', 'validate']

_logger = logging.getLogger(__name__)

Results = Dict[str, Any]


def validate(args: Namespace) -> List[Results]:
    """Evaluate a detector.

    Args:
        args: From `flags.parse_validate_args` or `flags.validate_args`; not changed.

    Returns:
        One mapping, or one for each setting of --topk-sweep: model, metrics in percent, `ap_CLASS` of each class
        (`ap_class_CLASS` where a metric has that name; None where there is nothing to find), images per second, and
        what was evaluated.

    Raises:
        PSTError: If anything the user can mend is wrong; the message says what.
    """
    args = copy.deepcopy(args)
    factories.import_modules(args.device_modules)
    if args.results_file:
        check_results_file(Path(args.results_file))
    random_seed(args.seed)
    if args.fast_norm:
        set_fast_norm()
    device = factories.init_device(args)
    if device.type == 'cpu':
        choose_threads()
    model = open_detector(
        args.checkpoint, args.use_ema, args.topk, args.fine_fusion, device='cpu', img_size=args.img_size,
        score_thresh=args.score_thresh, nms_thresh=args.nms_thresh, detections_per_img=args.detections_per_img)
    args.img_size = model.img_size
    if args.topk_sweep and not model.attentions():
        raise PSTError(f'--topk-sweep needs a detector with attention, and this one has none (neck '
                       f'{model.arguments["neck"]}): leave it out.')
    dataset = open_boxes(
        args.data_dir, args.split, class_names=model.class_names, max_bad_images=args.max_bad_images,
        max_bad_share=args.max_bad_share)
    dtype = factories.resolve_dtype(args)
    model.to(device=device, dtype=dtype, memory_format=torch.channels_last if args.channels_last else None)
    if args.torchcompile:
        model.backbone.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
    settings = model.sweep_settings(args.topk_sweep) if args.topk_sweep else [model.inference_settings()]
    rows = []
    with plain_worker_errors():
        for setting in settings:
            columns = model.settings_columns(setting, (model.img_size, model.img_size)) if setting else {}
            with model.with_settings(**setting):
                metrics, _ = evaluate_detector(args, model, dataset, device, dtype)
            _logger.info(f'{setting or args.split}: {format_metrics({k: metrics[k] for k in ("ap", "ap50")})}')
            # of what there is nothing to find, JSON has no number
            metrics = {k: None if math.isnan(v) else round(v, 3) for k, v in metrics.items()}
            row = OrderedDict(model=_name(model), **columns, **metrics, **_facts(args, model, dataset))
            rows.append(row)
    if args.results_file:
        write_results(args.results_file, rows, args.results_format)
    return rows


def evaluate_detector(
        args: Namespace,
        model: Detector,
        dataset: BoxDataset,
        device: torch.device,
        dtype: torch.dtype,
) -> Tuple[Results, CocoEvaluator]:
    """One pass of a detector over a split.

    Args:
        args: Arguments of an evaluation, with the device resolved.
        model: The detector, on its device.
        dataset: The split.
        device: Its device.
        dtype: Precision of the images.

    Returns:
        The metrics, those of each class (NaN where there is nothing to find) and images per second; and the evaluator,
        which has the detections.
    """
    evaluator = CocoEvaluator(dataset, max_dets=model.detections_per_img)
    found = evaluate(
        model.eval(),
        create_eval_box_loader(args, dataset, args.batch_size),
        evaluator,
        BoxBatches(device, dtype),
        factories.autocast_for(args, device),
        log_interval=args.log_freq,
    )
    speed = found.pop('images_per_second')
    for name, value in evaluator.class_ap().items():
        # a class may be called 'small', which is the name of a size too
        found[f'ap_{name}' if f'ap_{name}' not in METRICS else f'ap_class_{name}'] = value
    return dict(found, images_per_second=round(speed, 2)), evaluator


def _name(model: Detector) -> str:
    return '_'.join(str(model.arguments[k]) for k in ('kind', 'trunk', 'neck'))


def _facts(args: Namespace, model: Detector, dataset: BoxDataset) -> Results:
    facts = dict(
        split=args.split,
        images=len(dataset),
        param_count=round(sum(p.numel() for p in model.parameters()) / 1e6, 2),
        img_size=model.img_size,
        checkpoint=args.checkpoint,
    )
    return facts if model.checkpoint_ema is None else dict(facts, ema=model.checkpoint_ema)
