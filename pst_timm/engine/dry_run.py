"""What can be known of the work before it begins: optimizer and schedule on a toy, the model on no data at all."""
import copy
import logging
from argparse import Namespace
from typing import Any, Dict, Optional, Sequence

import torch
import torch.nn as nn
from timm.optim import get_optimizer_info
from torch.utils.data import Dataset

from pst_timm.utils.cost import measure_activations
from pst_timm.utils.devices import total_memory
from pst_timm.utils.errors import PSTError

from . import factories
from .checks import channels_of_mode
from .sparsity import check_sparsity

__all__ = ['check_channels', 'check_input', 'check_recipe']

_logger = logging.getLogger(__name__)


def check_recipe(args: Namespace) -> None:
    """Make sure that optimizer and schedule can be had as the arguments say, on a model of one layer.

    Raises:
        PSTError: If one of them refuses its arguments, or nothing is left to train.
    """
    args = copy.deepcopy(args)
    args.lr, args.layer_decay = factories.resolve_lr(args), None
    info = get_optimizer_info(args.opt.lower().split('_')[-1])
    if info.second_order and args.distributed:
        raise PSTError(f'--opt {args.opt} needs second derivatives, which torch has for one process only.')
    if getattr(args, 'sparsity_weight', 0):  # a detector's command has no such flag
        check_sparsity(args)
    toy = nn.Linear(4, 2)
    _check_opt_kwargs(args)
    optimizer = factories.optimizer_for(args, toy)
    try:
        toy(torch.ones(1, 4)).square().sum().backward(create_graph=info.second_order)
        optimizer.step()
    except (ArithmeticError, AssertionError, IndexError, RuntimeError, TypeError, ValueError) as e:
        raise PSTError(f'--opt {args.opt} cannot make a step with these arguments: {e}') from e
    _check_schedule(args, optimizer)


def _check_opt_kwargs(args: Namespace) -> None:
    plain = Namespace(**dict(vars(args), opt_kwargs={}, opt_betas=None))
    defaults = factories.optimizer_for(plain, nn.Linear(4, 2)).defaults
    betas = args.opt_kwargs.get('betas', args.opt_betas)
    if betas is not None and 'betas' in defaults and len(betas) != len(defaults['betas']):
        raise PSTError(f'--opt {args.opt} takes {len(defaults["betas"])} betas, got {len(betas)}.')
    for key, value in args.opt_kwargs.items():
        if key in ('eps', 'betas') and key not in defaults:
            raise PSTError(f'--opt-kwargs {key}={value}: {args.opt} has no {key}.')
        number = type(value) in (int, float)
        if isinstance(defaults.get(key), bool) and not isinstance(value, bool):
            raise PSTError(f'--opt-kwargs {key}={value}: expected True or False.')
        if isinstance(defaults.get(key), float) and not number:
            raise PSTError(f'--opt-kwargs {key}={value}: expected a number.')


def _check_schedule(args: Namespace, optimizer: torch.optim.Optimizer) -> None:
    try:
        scheduler, epochs = factories.schedule_for(args, optimizer, updates_per_epoch=1)
        if scheduler is not None:
            for epoch in (1, epochs // 2, epochs):
                scheduler.step(epoch, 0.)
                scheduler.step_update(epoch)
    except (ArithmeticError, TypeError, ValueError) as e:
        if isinstance(e, PSTError):
            raise
        raise PSTError(
            f'--sched {args.sched} cannot be calculated with --epochs {args.epochs}, --warmup-epochs '
            f'{args.warmup_epochs}, --decay-epochs {args.decay_epochs:g} and its other arguments ({e}).') from e
    if args.sched != 'none' and not args.warmup_prefix and args.warmup_epochs >= epochs > 1:
        _logger.warning(
            f'The whole run of {epochs} epochs is warm-up: --lr is never reached. Choose a smaller '
            f'--warmup-epochs than {args.warmup_epochs}.')
    if args.start_epoch is not None and args.start_epoch >= epochs:
        raise PSTError(
            f'--start-epoch {args.start_epoch} is beyond the end: the epochs of this run are 0 to {epochs - 1}.')


def check_channels(args: Namespace, in_chans: int) -> None:
    """Make sure that the images are read with as many channels as a model takes.

    Raises:
        PSTError: If their mode has others.
    """
    mode = args.input_img_mode or ('L' if in_chans == 1 else 'RGB')
    found = channels_of_mode(mode)
    if found != in_chans and not args.dataset.startswith('torch/'):
        raise PSTError(
            f'The model takes images of {in_chans} channels, and they are read as {mode}, with {found}: change '
            f'--in-chans (or --input-size), or name a mode of {in_chans} channels with --input-img-mode.')


def check_input(
        args: Namespace,
        model: nn.Module,
        data_config: Dict[str, Any],
        batch_size: int,
        dataset: Optional[Dataset] = None,
        training: bool = False,
) -> None:
    """Make sure that a model takes its input, and that a batch of it fits into the memory; nothing is calculated.

    Args:
        args: The arguments, with the device resolved.
        model: A classifier.
        data_config: Preprocessing, from `timm.data.resolve_data_config`.
        batch_size: Images in a batch, where the data has so many.
        dataset: The data.
        training: Whether all activations are kept for the backward pass.

    Raises:
        PSTError: If the model refuses images of that size, gives no scores of classes, or needs more memory than there
            is even by a generous estimate.
    """
    size = data_config['input_size']
    shape = 'x'.join(map(str, size))
    for key in ('mean', 'std'):
        if len(data_config[key]) != size[0]:
            raise PSTError(
                f'Images of {size[0]} channels need a --mean and a --std of as many values, or of one for all: those '
                f'of the model have {len(data_config[key])}.')
    if dataset is not None and hasattr(dataset, '__len__'):
        batch_size = min(batch_size, len(dataset))
    precision = 2 if args.amp or args.model_dtype in ('float16', 'bfloat16') else 4
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    pixels = size[0] * size[1] * size[2]
    _check_memory(args, batch_size, shape, weights + batch_size * pixels * precision)
    total, largest = _try_forward(args, model, size)
    # what is recomputed or frozen is not kept
    kept = training and all(p.requires_grad for p in model.parameters()) and not (
        args.grad_checkpointing or args.torchcompile)
    need = batch_size * precision * (pixels + (total if kept else largest))
    _check_memory(args, batch_size, shape, weights * (2 if training else 1) + need)


def _check_memory(args: Namespace, batch_size: int, shape: str, need: int) -> None:
    have = total_memory(torch.device(args.device))
    if need > have:
        raise PSTError(
            f'A batch of {batch_size} images of {shape} and the model need more than {need / 2 ** 30:,.1f} GiB, and '
            f'{args.device} has {have / 2 ** 30:,.1f}: use a smaller --batch-size or --img-size.')


def _try_forward(args: Namespace, model: nn.Module, size: Sequence[int]) -> Sequence[int]:
    """Run a model on an image without content; returns its activations and the largest of them, in elements."""
    if not any(True for _ in model.parameters()):  # not torch's own: there is nothing to run without numbers
        _run_once(args, model, size)
        return 0, 0
    tensors = {id(p): nn.Parameter(torch.empty_like(p, device='meta'), p.requires_grad) for p in model.parameters()}
    tensors.update((id(b), torch.empty_like(b, device='meta')) for b in model.buffers())
    dtype = next(model.parameters()).dtype
    found = {}
    try:
        # the copy shares nothing, and takes no memory
        empty = copy.deepcopy(model, tensors).eval()
        costs = measure_activations(
            lambda: found.update(output=empty(torch.zeros(1, *size, device='meta', dtype=dtype))))
    except Exception:
        # the fault of the size, or of a model that needs numbers to run
        found, costs = _run_once(args, model, size), (0, 0)
    output = found['output']
    output = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(output, torch.Tensor) or output.ndim != 2:
        got = f'a tensor of {output.ndim} dimensions' if isinstance(output, torch.Tensor) else type(output).__name__
        raise PSTError(
            f'{args.model} gives no scores of classes (but {got}): choose another --gp, or leave out what changes its '
            f'classifier from --model-kwargs.')
    return costs


def _run_once(args: Namespace, model: nn.Module, size: Sequence[int]) -> Dict[str, Any]:
    """The same with numbers, which tells the reason."""
    mode = model.training
    try:
        with torch.inference_mode():
            weight = next(model.parameters(), torch.empty(0))
            return dict(output=model.eval()(torch.zeros(1, *size, device=weight.device, dtype=weight.dtype)))
    except Exception as e:
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise PSTError(
            f'{args.model} does not take images of {"x".join(map(str, size))} ({reason.rstrip(".")}): choose another '
            f'--img-size, or check --model-kwargs.') from e
    finally:
        model.train(mode)
