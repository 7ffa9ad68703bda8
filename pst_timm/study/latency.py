"""How fast the models of a study are, measured in turn with nothing else at work."""
from argparse import Namespace
from contextlib import AbstractContextManager
from functools import partial
from typing import Callable, Dict, List

import torch
import torch.nn as nn

from pst_timm.checkpoints import create_model
from pst_timm.engine import train_args
from pst_timm.engine.factories import autocast_for, import_modules, init_device
from pst_timm.engine.transfer import Frozen, apply_transfer
from pst_timm.utils.cost import count_gmacs
from pst_timm.utils.devices import hardware_name
from pst_timm.utils.timing import median_ratio, percentile, time_in_turn

from .config import Study
from .results import Row

__all__ = ['measure_latency']

DECISIVE = (
    'model', 'model_kwargs', 'img_size', 'batch_size', 'validation_batch_size', 'channels_last', 'amp', 'amp_dtype',
    'freeze', 'freeze_trunk', 'linear_probe')


def measure_latency(study: Study, device: str, repeats: int = 20, train_repeats: int = 5) -> List[Row]:
    """Time the models of a study in turn, nothing else running: weights do not matter, and are random.

    Cells of the same model and batch, with the same parts frozen, are timed as one.

    Args:
        study: The study.
        device: Device.
        repeats: Timed rounds of inference in float32, a validation batch each.
        train_repeats: Timed rounds of forward and backward pass as in training, a training batch each.

    Returns:
        A row per cell name: params, gmacs, img_size, and for both (latency_ms, train_ms) the median of a batch in
        milliseconds and the median of the paired ratios to the first cell (ratio, train_ratio).
    """
    infer, step, found = {}, {}, {}
    networks: Dict[str, str] = {}
    for name in study.names:
        cell = next(c for c in study.cells if c.name == name)
        args = train_args(**cell.train, device=device)
        # with which weights a cell begins, and how many images it has, changes nothing of what a step costs
        networks[name] = network = repr([len(cell.classes), *(getattr(args, key) for key in DECISIVE)])
        if network in found:
            continue
        import_modules(args.device_modules)
        torch_device = init_device(args)
        memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
        model = create_model(args.model, num_classes=len(cell.classes), **args.model_kwargs)
        frozen = apply_transfer(Namespace(**dict(vars(args), trunk_checkpoint='')), model)
        model = model.to(device=torch_device, memory_format=memory_format)
        size = args.img_size or model.default_cfg['input_size'][-1]
        batches = args.validation_batch_size or args.batch_size, args.batch_size
        images = [
            torch.randn(n, 3, size, size, device=torch_device).contiguous(memory_format=memory_format)
            for n in batches]
        infer[network] = partial(_infer, model, images[0])
        step[network] = partial(_step, model, frozen, images[1], autocast_for(args, torch_device))
        found[network] = dict(
            params=sum(p.numel() for p in model.parameters()), gmacs=round(count_gmacs(model, (3, size, size)), 4),
            img_size=size, batch_size=batches[0], train_batch_size=batches[1])
    for calls, count, keys in (
            (infer, repeats, ('latency_ms', 'ratio')),
            (step, train_repeats, ('train_ms', 'train_ratio'))):
        times = time_in_turn(calls, count)
        first = times[networks[study.names[0]]]
        for network, row in found.items():
            values = 1000 * percentile(times[network], 50), median_ratio(times[network], first)
            row.update(zip(keys, (round(v, 4) for v in values)))
    about = dict(device=torch_device.type, hardware=hardware_name(torch_device), threads=torch.get_num_threads())
    return [dict(cell=name, **found[network], **about) for name, network in networks.items()]


@torch.inference_mode()
def _infer(model: nn.Module, images: torch.Tensor) -> None:
    model.eval()(images)


def _step(
        model: nn.Module,
        frozen: Frozen,
        images: torch.Tensor,
        autocast: Callable[[], AbstractContextManager],
) -> None:
    model.train()
    frozen.rest()
    with autocast():
        output = model(images)
    output.float().logsumexp(dim=-1).mean().backward()
    model.zero_grad()
