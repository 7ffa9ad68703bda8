"""Device, model, optimizer, schedule and task of a run, made by timm's factories from the arguments."""
import importlib
import logging
import math
import os
import sys
from argparse import Namespace
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import partial
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import timm
import torch
import torch.distributed as dist
import torch.nn as nn
from timm.layers import convert_sync_batchnorm, set_fast_norm, set_fused_attn, use_fused_attn
from timm.models import load_pretrained
from timm.optim import create_optimizer_v2, get_optimizer_info, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
    TrainingTask,
)
from timm.utils import NativeScaler, init_distributed_device

from pst_timm.checkpoints import create_model, load_model, load_weights, read_checkpoint
from pst_timm.checkpoints.building import check_model_name
from pst_timm.checkpoints.fetching import check_fetchable
from pst_timm.checkpoints.reading import is_file
from pst_timm.utils.devices import check_device
from pst_timm.utils.errors import PSTError, Unavailable

__all__ = [
    'autocast_for',
    'create_task',
    'create_train_model',
    'import_modules',
    'init_device',
    'optimizer_for',
    'resolve_dtype',
    'resolve_lr',
    'schedule_for',
]

_logger = logging.getLogger(__name__)


def import_modules(names: Optional[Sequence[str]]) -> None:
    """Import the packages of --device-modules, which register models or devices."""
    for name in names or ():
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as e:  # whatever a package may do
            raise PSTError(f'--device-modules {name}: cannot import it ({type(e).__name__}: {e}).') from e


def init_device(args: Namespace) -> torch.device:
    """Join the process group, if there is one, and resolve the device; sets device, rank and world size in args.

    Raises:
        PSTError: If the device is not there.
    """
    args.device = str(check_device(args.device))
    try:
        device = init_distributed_device(args)
    except (AssertionError, RuntimeError) as e:
        raise PSTError(f'Cannot start on {args.device}: {e}') from e
    if args.distributed and hasattr(args, 'dist_timeout'):
        # timm's function takes none
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=args.dist_timeout))
    check_device(str(device))  # that of this process, one of several
    if device.type == 'cuda':
        torch.set_float32_matmul_precision('high')
        torch.backends.cudnn.benchmark = True
    return device


def resolve_dtype(args: Namespace) -> torch.dtype:
    """Precision of the weights and the images."""
    return getattr(torch, args.model_dtype) if args.model_dtype else torch.float32


def autocast_for(args: Namespace, device: torch.device) -> Callable[[], AbstractContextManager]:
    """The context in which the forward pass runs."""
    dtype = getattr(torch, args.amp_dtype)
    if args.amp and device.type == 'cpu' and dtype == torch.float16:
        _logger.warning('--amp on a CPU takes bfloat16: float16 would need a loss scaler, which torch has for GPUs.')
        dtype = torch.bfloat16
    return partial(torch.autocast, device_type=device.type, dtype=dtype, enabled=args.amp)


def loss_scaler_for(args: Namespace, device: torch.device) -> Optional[NativeScaler]:
    """The scaler that keeps float16 gradients from vanishing, None where it is not needed."""
    needed = args.amp and args.amp_dtype == 'float16' and device.type == 'cuda'
    return NativeScaler(device=device.type) if needed else None


def create_train_model(args: Namespace) -> nn.Module:
    """Create the model of a run on the CPU, warm-started as the arguments say; sets `num_classes` and `in_chans`.

    Raises:
        PSTError: If there is no such model, it does not take an argument, or the weights to start from do not fit.
    """
    if args.fast_norm:
        set_fast_norm()
    in_chans = args.in_chans or (args.input_size[0] if args.input_size else None)
    kwargs = dict(
        pretrained=args.pretrained and not args.pretrained_path,
        num_classes=args.num_classes,
        in_chans=in_chans,
        global_pool=args.gp,
        scriptable=args.torchscript or None,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path if args.drop_path is not None else args.drop_connect,
        drop_block_rate=args.drop_block,
        bn_momentum=args.bn_momentum,
        bn_eps=args.bn_eps,
    )
    # fused attention has no second derivatives
    fused = dict(enable=use_fused_attn(), experimental=use_fused_attn(experimental=True))
    if get_optimizer_info(args.opt.lower().split('_')[-1]).second_order:
        set_fused_attn(False)
    try:
        model = with_model_kwargs(
            lambda more: create_model(args.model, **{**kwargs, **more}), args.model_kwargs, kwargs)
    finally:
        set_fused_attn(**fused)
    args.num_classes = model.num_classes
    args.in_chans = in_chans or getattr(model, 'in_chans', 3)
    if args.pretrained_path:
        load_as_pretrained(model, args.pretrained_path, args.use_ema)
    if args.initial_checkpoint:
        load_initial_checkpoint(model, args.initial_checkpoint, args.use_ema)
    check_finite_weights(model, args.pretrained_path or args.initial_checkpoint or args.model)
    with torch.no_grad():
        if args.head_init_scale is not None:
            model.get_classifier().weight.mul_(args.head_init_scale)
        if args.head_init_bias is not None:
            model.get_classifier().bias.fill_(args.head_init_bias)
    if args.grad_checkpointing:
        model.set_grad_checkpointing(True)
    return model


def with_model_kwargs(
        make: Callable[[Dict[str, Any]], nn.Module],
        model_kwargs: Dict[str, Any],
        others: Mapping[str, Any],
) -> nn.Module:
    """Make a model with --model-kwargs; where it fails, the error names the one of them that is to blame.

    Args:
        make: Makes the model with such arguments.
        model_kwargs: The arguments.
        others: What other flags say, None or false where they do not.

    Raises:
        PSTError: If it cannot be made, or if a flag and an argument contradict each other.
    """
    for key, value in model_kwargs.items():
        if others.get(key) and others[key] != value:
            raise PSTError(f'--model-kwargs {key}={value!r} contradicts a flag that says {others[key]!r}.')
    try:
        return make(model_kwargs)
    except Unavailable:
        raise
    except Exception as e:
        reason = f'{e}' if isinstance(e, PSTError) else f'{type(e).__name__}: {e}'
        for key, value in model_kwargs.items():
            try:
                make({k: v for k, v in model_kwargs.items() if k != key})
            except Exception:
                continue
            raise PSTError(f'--model-kwargs {key}={value!r}: {reason}') from e
        if isinstance(e, PSTError) or not model_kwargs:
            raise
        raise PSTError(f'--model-kwargs {", ".join(model_kwargs)}: {reason}') from e


def check_finite_weights(model: nn.Module, source: str) -> None:
    """Make sure that the weights and batch statistics of a model are numbers.

    Raises:
        PSTError: If one is NaN or infinite; names the first tensor.
    """
    tensors = {k: v for k, v in model.named_buffers() if k.rpartition('.')[2].startswith('running_')}
    tensors.update(model.named_parameters())
    broken = [k for k, v in tensors.items() if not torch.isfinite(v).all()]
    if broken:
        raise PSTError(
            f'{source} has NaN or infinite weights in {len(broken)} tensors, the first is {broken[0]}: use others.')


def load_as_pretrained(model: nn.Module, path: str, use_ema: Optional[bool] = None) -> None:
    """Load weights as timm loads published ones: adapted to the model's channels and image size, the classifier anew.

    Args:
        model: The model.
        path: What `read_checkpoint` reads.
        use_ema: See `read_checkpoint`.

    Raises:
        PSTError: If the file is missing or no data alone, or does not have all weights beside the classifier.
    """
    weights = read_checkpoint(path, use_ema).weights
    own = timm.models.model_entrypoint(timm.models.get_arch_name(model.pretrained_cfg['architecture']))
    kept: List[str] = []
    handle = model.register_load_state_dict_post_hook(lambda module, keys: kept.extend(keys.missing_keys))
    try:
        load_pretrained(
            model,
            # -1 makes timm start the classifier anew
            dict(model.pretrained_cfg, state_dict=weights, source='', custom_load=False, num_classes=-1),
            num_classes=model.num_classes,
            in_chans=getattr(model, 'in_chans', 3),
            # where timm's files of models keep what knows the names of other releases
            filter_fn=getattr(sys.modules[own.__module__], 'checkpoint_filter_fn', None),
        )
    except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as e:
        raise PSTError(f'--pretrained-path: {path} is of another model ({e}). Check --model.') from e
    finally:
        handle.remove()
    head = [f'{n}.' for n, m in model.named_modules() if m is model.get_classifier()]
    missing = [k for k in kept if not k.startswith(tuple(head))]
    if missing:
        raise PSTError(
            f'--pretrained-path: {path} is of another model: {len(missing)} tensors are missing (the first: '
            f'{missing[0]}). Check --model and --model-kwargs.')


def load_initial_checkpoint(model: nn.Module, path: str, use_ema: Optional[bool] = None) -> None:
    """Load weights; a classifier for another number of classes keeps its fresh weights.

    Args:
        model: The model.
        path: What `read_checkpoint` reads.
        use_ema: See `read_checkpoint`.

    Raises:
        PSTError: If the file is missing or no data alone, or if anything else does not fit.
    """
    state = read_checkpoint(path, use_ema).weights
    own = model.state_dict()
    head = {n for n, m in model.named_modules() if m is model.get_classifier()}
    fresh = [k for k in state if k.rpartition('.')[0] in head and k in own and own[k].shape != state[k].shape]
    for key in fresh:
        del state[key]
    if fresh:
        _logger.info(f'{path} is for another number of classes: {", ".join(fresh)} start anew.')
    load_weights(
        model, state, f'--initial-checkpoint: {path} is of another model', 'Check --model and --model-kwargs.',
        optional=fresh)


def resolve_lr(args: Namespace) -> float:
    """The learning rate, from --lr-base and the global batch where --lr is not given."""
    if args.lr is not None:
        return args.lr
    ratio = args.batch_size * args.world_size * args.grad_accum_steps / args.lr_base_size
    scale = args.lr_base_scale
    if not scale:
        scale = 'sqrt' if any(name in args.opt.lower() for name in ('ada', 'lamb')) else 'linear'
    return args.lr_base * (math.sqrt(ratio) if scale == 'sqrt' else ratio)


def optimizer_for(args: Namespace, module: nn.Module) -> torch.optim.Optimizer:
    """Create the optimizer over what is trainable in a module.

    Raises:
        PSTError: If the optimizer does not take an argument, or needs what is not here.
    """
    try:
        return create_optimizer_v2(module, **{**optimizer_kwargs(args), **args.opt_kwargs})
    except (AssertionError, ImportError, IndexError, RuntimeError, TypeError, ValueError) as e:
        raise PSTError(f'Cannot create the optimizer {args.opt}: {e}') from e


def schedule_for(args: Namespace, optimizer: torch.optim.Optimizer, updates_per_epoch: int) -> Tuple[Any, int]:
    """Create the schedule of the learning rate; returns it (None for --sched none) and the number of epochs."""
    try:
        return create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=updates_per_epoch)
    except (ValueError, AssertionError) as e:
        raise PSTError(f'--sched {args.sched}: {e}') from e


def create_task(
        args: Namespace,
        model: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        criterion: Optional[nn.Module] = None,
) -> TrainingTask:
    """Wrap the model in timm's task: classification, or distillation if a teacher is named.

    Args:
        args: Arguments of a training run.
        model: The model, on its device.
        device: The device.
        dtype: Precision of the weights.
        criterion: Loss of the labels; timm's as the arguments say if None.
    """
    criterion_kwargs = dict(
        loss_type='bce' if args.bce_loss else 'ce',
        smoothing=args.smoothing,
        soft_targets=args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None,
        **(dict(
            bce_target_thresh=args.bce_target_thresh,
            bce_sum=args.bce_sum,
            pos_weight=args.bce_pos_weight,
        ) if args.bce_loss else {}),
    )
    kwargs = dict(
        **(dict(criterion_kwargs=criterion_kwargs) if criterion is None else dict(criterion=criterion)),
        device=device,
        dtype=dtype,
        verbose=False,
    )
    if not args.kd_model_name:
        return ClassificationTask(model, **kwargs)
    kwargs.update(distill_loss_weight=args.distill_loss_weight, task_loss_weight=args.task_loss_weight)
    try:
        return _distillation_task(args, model, _create_teacher(args, device, dtype), kwargs)
    except PSTError:
        raise
    except (AssertionError, AttributeError, ImportError, OSError, RuntimeError, TypeError, ValueError) as e:
        reason = str(e).splitlines()[0] if isinstance(e, OSError) else e
        raise PSTError(f'Cannot distil from {args.kd_model_name} to {args.model}: {reason}') from e


def _create_teacher(args: Namespace, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The teacher with its weights, made here, so that what comes with them is checked."""
    name = args.kd_model_name
    if is_file(name):
        teacher = load_model(name).to(device=device, dtype=dtype)
    else:
        teacher = create_model(
            name, pretrained=True, num_classes=args.num_classes, in_chans=args.in_chans, device=device, dtype=dtype)
    if is_file(name) or ':' in name:  # what timm's registry does not tell
        check_teacher(args, teacher.pretrained_cfg['num_classes'])
    return teacher


def _distillation_task(
        args: Namespace,
        model: nn.Module,
        teacher: nn.Module,
        kwargs: Dict[str, Any],
) -> TrainingTask:
    if args.kd_distill_type == 'feature':
        return FeatureDistillationTask(
            model, teacher, student_feature_dim=args.kd_student_feature_dim,
            teacher_feature_dim=args.kd_teacher_feature_dim, **kwargs)
    if args.kd_distill_type == 'token':
        return TokenDistillationTask(
            model, teacher, distill_type=args.kd_token_distill_type, temperature=args.kd_temperature, **kwargs)
    return LogitDistillationTask(
        model, teacher, loss_type=args.kd_loss_type, temperature=args.kd_temperature, **kwargs)


def check_teacher(args: Namespace, classes: Optional[int] = None) -> None:
    """Make sure that a teacher is known, can be had, and knows the classes: another classifier would be a random one.

    Args:
        args: Arguments with `num_classes` resolved.
        classes: How many its weights know; whether they can be had, and what timm's registry says, if None.

    Raises:
        PSTError: If it is not so.
        Unavailable: If the Hub does not answer.
    """
    name, known = args.kd_model_name, classes
    if known is None and (is_file(name) or os.sep in name.partition(':')[0]):
        if not os.path.lexists(name):
            raise PSTError(f'--kd-model-name: there is no checkpoint {name}.')
    elif known is None:
        check_model_name(name)
        check_fetchable(name)
        cfg = None if ':' in name else timm.get_pretrained_cfg(name)
        if cfg is not None and not cfg.has_weights:
            raise PSTError(f'Cannot distil from {name}: there are no published weights of it.')
        known = cfg.num_classes if cfg is not None else None
    if args.kd_distill_type != 'feature' and known not in (None, args.num_classes):
        raise PSTError(
            f'--kd-model-name {name} knows {known} classes, and the data has {args.num_classes}: its answers would be '
            f'random. Use a teacher for these classes, or --kd-distill-type feature.')


def sync_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """Make the batch norms of a model share their statistics between the processes."""
    if device.type == 'cpu':
        raise PSTError('--sync-bn needs a GPU: torch has no synchronised batch norm for the CPU.')
    return convert_sync_batchnorm(model)


def script(model: nn.Module) -> nn.Module:
    """Compile a model with TorchScript."""
    try:
        return torch.jit.script(model)
    except (RuntimeError, AttributeError) as e:
        raise PSTError(f'--torchscript: torch cannot script this model here ({e}); use --torchcompile.') from e
