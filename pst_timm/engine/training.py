"""Training: `train` runs the epochs, `train_one_epoch` is the step."""
import copy
import logging
import math
from argparse import Namespace
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
import torch.distributed as dist
from timm.models import safe_model_name
from timm.task import TrainingTask, evaluation_sample_limit
from timm.utils import NativeScaler, dispatch_clip_grad, distribute_bn, is_primary, random_seed, unwrap_model
from torch.nn.parallel import DistributedDataParallel
from torchvision.utils import save_image
from tqdm import tqdm

from pst_timm.checkpoints.reading import FACTS_KEY
from pst_timm.data.loaders import TrainData, checked_batches, report_bad_images
from pst_timm.utils.devices import choose_threads
from pst_timm.utils.errors import Interrupted, PSTError
from pst_timm.utils.progress import progress_bar

from . import factories
from .args import write_yaml
from .batches import Batches
from .changes import Stream, changed_settings, check_resume, check_start, load_run
from .dry_run import check_recipe
from .folder import claim_folder, is_in, remove_leftovers, remove_recovery, remove_run, remove_states_beyond
from .inference import evaluate
from .jobs import Classification, Job
from .processes import explain, leave_group, on_first
from .progress import RunLog, StepTimer, format_metrics
from .protocols import TrainStepAware
from .recovery import AtomicSaver, Position, check_there, find_newest, read_saved, states_beyond
from .seeding import seed_model, seeded_batches
from .signals import StopSignals
from .sparsity import Sparsity, coupled_scales
from .transfer import Frozen

__all__ = ['TrainResult', 'train']

_logger = logging.getLogger(__name__)


@dataclass
class TrainResult:
    """What a finished training run leaves."""
    output_dir: Optional[Path]
    """Folder of the run, None in all processes but the first."""
    best_metric: Optional[float]
    """Best value of --eval-metric."""
    best_epoch: Optional[int]
    history: List[Dict[str, float]] = field(default_factory=list)
    """Metrics of the epochs that this call trained."""

    @property
    def best_checkpoint(self) -> Optional[Path]:
        """Checkpoint of the best epoch, or of the last one if there was no validation; None if nothing was trained."""
        if self.output_dir is None:
            return None
        path = self.output_dir / ('last.pth.tar' if self.best_epoch is None else 'model_best.pth.tar')
        return path if path.is_file() else None


@dataclass
class Run:
    """The parts of a training run, made by `prepare`."""
    args: Namespace
    device: torch.device
    task: TrainingTask
    job: Job
    batches: Batches
    frozen: Frozen
    optimizer: torch.optim.Optimizer
    scheduler: Any
    num_epochs: int
    data: TrainData
    autocast: Callable[[], AbstractContextManager]
    loss_scaler: Optional[NativeScaler]
    output_dir: Optional[Path]
    """Folder of the run, None in all processes but the first."""
    saver: Optional[AtomicSaver]
    log: Optional[RunLog]
    start: Position
    hold: ExitStack
    """What the run has for itself as long as it lasts."""
    sparsity: Optional[Sparsity] = None
    doing: str = 'the preparation'
    """What the processes do together, for who has to say that one of them is missing."""

    @property
    def updates_per_epoch(self) -> int:
        return math.ceil(len(self.data.train) / self.args.grad_accum_steps)

    @property
    def go_on(self) -> str:
        """The flags with which a stopped run goes on."""
        unnamed = self.output_dir is not None and not self.args.experiment
        return '--resume auto' + (f' --experiment {self.output_dir.name}' if unnamed else '')

    @property
    def lr(self) -> float:
        """Mean learning rate over the parameter groups."""
        return sum(g['lr'] for g in self.optimizer.param_groups) / len(self.optimizer.param_groups)


def train(args: Namespace, job: Optional[Job] = None) -> TrainResult:
    """Train a model.

    Args:
        args: From `parse_train_args` or `train_args`, or the like of another job; not changed.
        job: The kind of training, fresh; classification if None.

    Raises:
        PSTError: If anything the user can mend is wrong; the message says what.
        Interrupted: If the process was asked to stop; a recovery checkpoint has been written.
    """
    args = copy.deepcopy(args)
    stop = run = None
    with ExitStack() as ending:
        ending.callback(leave_group, args)
        try:
            run = prepare(args, job)
            ending.callback(run.hold.close)
            result = TrainResult(run.output_dir if is_primary(run.args) else None, None, None)
            if run.saver is not None:
                result.best_metric, result.best_epoch = run.saver.best_metric, run.saver.best_epoch
            stop = StopSignals(args.distributed, args.dist_timeout)
            with stop:
                train_epochs(run, stop, result)
            if run.output_dir is not None:
                remove_recovery(run.output_dir)
            if args.distributed:
                run.doing = 'the end of the run'
                dist.barrier()  # with torch 2.8, a process that leaves before the others may hang as it ends
        except KeyboardInterrupt:
            if stop is None or stop.received is None:
                raise
            raise Interrupted(
                f'Stopped at once, as asked again: what came after the last checkpoint is lost, and that one is '
                f'intact. Start again with {run.go_on} to go on.') from None
        except PSTError:
            raise
        except RuntimeError as e:
            doing, go_on = (run.doing, run.go_on) if run is not None else ('the preparation', None)
            told = explain(e, args, doing, go_on, stopped=stop is not None and stop.received is not None)
            if told is None:
                raise
            raise told from e
    if result.best_metric is not None:
        _logger.info(f'Best {run.args.eval_metric}: {result.best_metric:.3f} (epoch {result.best_epoch}).')
    return result


def train_epochs(run: Run, stop: StopSignals, result: TrainResult) -> None:
    """Train, evaluate, record and save, epoch by epoch."""
    for epoch in range(run.start.epoch, run.num_epochs):
        last = epoch + 1 == run.num_epochs
        run.doing = f'the training of epoch {epoch}'
        train_metrics, speed = train_one_epoch(run, epoch, stop)
        if run.sparsity is not None:
            _logger.info(f'Sparsity: {run.sparsity.report()}.')
        run.doing = f'the batch-norm statistics after epoch {epoch}'
        share_statistics(run)
        run.doing = f'the validation after epoch {epoch}'
        due = run.data.evaluation is not None and ((epoch + 1) % run.args.val_interval == 0 or last)
        eval_metrics = validate_epoch(run) if due else {}
        lr = run.lr
        if run.scheduler is not None:
            run.scheduler.step(epoch + 1, eval_metrics.get(run.args.eval_metric))
        finish_epoch(run, epoch, train_metrics, eval_metrics, lr, speed, result)
        run.doing = f'the end of epoch {epoch}'
        if not last and stop.agreed():
            raise Interrupted(f'Stopped after epoch {epoch}, as asked: start again with {run.go_on} to go on.')


def train_one_epoch(run: Run, epoch: int, stop: StopSignals) -> Tuple[Dict[str, float], Dict[str, float]]:
    """Train for an epoch, or for the rest of one that was interrupted; returns its mean loss, and its speed."""
    args, task, loader = run.args, run.task, run.data.train
    start_epoch(run, epoch)
    skip = run.start.step if epoch == run.start.epoch else 0
    total, accum = len(loader), args.grad_accum_steps
    timer = StepTimer()
    batches = timer.over(seeded_batches(checked_batches(loader), args.seed, args.rank, epoch))
    # a stream of shards may hold more than it says
    bar = progress_bar(islice(batches, total), total, f'Epoch {epoch}', is_primary(args))
    watch = LossWatch(run, epoch, total, timer, bar)

    run.optimizer.zero_grad()
    for step, batch in enumerate(bar):
        if step < skip:
            continue
        seed_model(args.seed, args.rank, epoch, step)
        run.doing = f'the gradients of epoch {epoch}, step {step}'
        batch = run.batches.prepare(batch, training=True)
        group = step // accum
        group_size = min(accum, total - group * accum)  # the last group may be smaller
        update = step + 1 == group * accum + group_size
        with nullcontext() if update else task.no_sync():
            with run.autocast():
                loss = run.batches.loss(task, batch)
            backward(run, loss / group_size, update)
        watch.add(step, loss, run.batches.size(batch))
        if not update:
            continue

        run.optimizer.zero_grad()
        updates = epoch * run.updates_per_epoch + group + 1
        task.update_ema(step=updates)
        if run.scheduler is not None:
            run.scheduler.step_update(updates)
        if args.synchronize_step and run.device.type != 'cpu':
            torch.accelerator.synchronize()
        if (group + 1) % args.log_interval == 0 or step + 1 == total:
            watch.report(step, batch)
        if step + 1 < total:
            after_update(run, Position(epoch, step + 1), group + 1, stop, watch)
    metrics = dict(loss=watch.mean())
    return metrics, timer.speed(args.world_size)


def start_epoch(run: Run, epoch: int) -> None:
    """Set everything that depends on the epoch, and on nothing else."""
    args, loader = run.args, run.data.train
    for part in (loader.dataset, loader.sampler, getattr(run.task, 'criterion', None)):
        if hasattr(part, 'set_epoch'):
            part.set_epoch(epoch)
    run.job.start_epoch(args, epoch)
    run.task.train()
    run.frozen.rest()
    model: TrainStepAware = unwrap_model(run.task.get_eval_model())
    if hasattr(model, 'set_train_step'):
        # draws that all ranks share, at a step that a resumed run finds again
        model.set_train_step(args.seed, epoch * len(loader) + (run.start.step if epoch == run.start.epoch else 0))


def backward(run: Run, loss: torch.Tensor, update: bool) -> None:
    """Add the gradients of a loss to those there are; with `update`, clip them and step the optimizer."""
    args = run.args
    second_order = getattr(run.optimizer, 'is_second_order', False)
    parameters = run.task.get_clip_parameters(exclude_head=args.clip_mode == 'agc')
    if run.loss_scaler is not None:
        run.loss_scaler(
            loss, run.optimizer, clip_grad=args.clip_grad, clip_mode=args.clip_mode, parameters=parameters,
            create_graph=second_order, need_update=update)
        return
    loss.backward(create_graph=second_order)
    if update:
        if args.clip_grad is not None:
            dispatch_clip_grad(parameters, args.clip_grad, mode=args.clip_mode)
        run.optimizer.step()


class LossWatch:
    """Follows the loss of an epoch without waiting for the device at every step."""

    def __init__(self, run: Run, epoch: int, total: int, timer: StepTimer, bar: tqdm):
        self.run, self.epoch, self.total, self.timer, self.bar = run, epoch, total, timer, bar
        self.sum = torch.zeros((), device=run.device)
        self.last = self.sum
        self.first_bad = torch.full((), -1, device=run.device)
        self.lr_at: Dict[int, float] = {}
        self.count = 0

    def add(self, step: int, loss: torch.Tensor, size: int) -> None:
        """Take in the loss of a step."""
        self.last = loss.detach().float()
        self.sum += self.last * size
        self.count += size
        self.timer.images += size
        self.first_bad = torch.where((self.first_bad < 0) & ~self.last.isfinite(), step, self.first_bad)
        self.lr_at[step] = self.run.lr

    def check(self) -> None:
        """Raise an PSTError if a loss was NaN or infinite."""
        step = int(self.first_bad)
        if step >= 0:
            good = self._last_good()
            raise PSTError(
                f'The loss became NaN or infinite in epoch {self.epoch}, step {step}, at a learning rate of '
                f'{self.lr_at[step]:.3g}. The last good checkpoint is {good or "none"}. Try a smaller --lr, '
                f'--clip-grad, more --warmup-epochs, or --amp-dtype bfloat16.')
        self.lr_at.clear()

    def _last_good(self) -> Optional[Path]:
        try:
            return find_newest(self.run.output_dir) if self.run.output_dir is not None else None
        except PSTError:  # the loss matters more
            return None

    def report(self, step: int, batch: Any) -> None:
        """Show the state: in the bar where there is one, and as a line of the log where not and at the end."""
        self.check()
        report_bad_images(self.run.data.train)
        args, timer = self.run.args, self.timer
        if not is_primary(args):
            return
        mean = self.sum.item() / self.count
        if self.bar.disable or step + 1 == self.total:
            _logger.info(
                f'Train: {self.epoch} [{step + 1:>4d}/{self.total} ({(step + 1) / self.total:>4.0%})]  '
                f'Loss: {self.last.item():.4f} ({mean:.4f})  '
                f'Time: {timer.step.avg:.3f}s, {timer.images_per_second * args.world_size:.1f}/s  '
                f'LR: {self.run.lr:.3e}  Data: {timer.wait.avg:.3f}s, {timer.wait_share:.0%}')
        if not self.bar.disable:
            self.bar.set_postfix_str(
                f'loss {mean:.3f}, {timer.images_per_second * args.world_size:.0f} images/s, '
                f'data {timer.wait_share:.0%}')
        if args.save_images:
            images = self.run.batches.images(batch)
            save_image(images, self.run.output_dir / f'train-batch-{self.epoch}-{step}.jpg', normalize=True)

    def mean(self) -> float:
        """Mean loss over the images of all processes."""
        totals = torch.stack([self.sum, torch.full_like(self.sum, self.count)])
        if self.run.args.distributed:
            dist.all_reduce(totals)
        loss_sum, count = totals.tolist()
        return loss_sum / max(count, 1)


def after_update(run: Run, position: Position, updates: int, stop: StopSignals, watch: LossWatch) -> None:
    """Write a recovery checkpoint if it is time for one, or if the run has to stop here."""
    # agreeing costs a round trip between the processes, so they ask now and then
    stopping = (not stop.distributed or updates % 10 == 0) and stop.agreed()
    due = run.args.recovery_interval and updates % run.args.recovery_interval == 0
    if stopping or due:
        watch.check()
        if run.saver is not None:
            run.saver.save_step(position)
    if stopping:
        raise Interrupted(
            f'Stopped after step {position.step} of epoch {position.epoch}, as asked. The state is saved: start '
            f'again with {run.go_on} (or --resume and the recovery checkpoint) to go on.')


def share_statistics(run: Run) -> None:
    """Let all processes go on with the same batch-norm statistics."""
    args = run.args
    if args.distributed and args.dist_bn:
        distribute_bn(run.task.get_trainable_module(), args.world_size, args.dist_bn == 'reduce')
        if args.model_ema and not args.model_ema_force_cpu:
            distribute_bn(run.task.get_trainable_module(ema=True), args.world_size, args.dist_bn == 'reduce')


def validate_epoch(run: Run) -> Dict[str, float]:
    """Evaluate the model, and its moving average, whose metrics then count."""
    args, loader = run.args, run.data.evaluation
    metrics: Dict[str, float] = {}
    for title, ema in (('Validate', False), ('Validate (EMA)', True)):
        if ema and (not run.task.has_ema() or args.model_ema_force_cpu):
            continue
        model = run.task.get_eval_model(ema=ema)
        # evaluation needs no gradients, and so none of DDP
        model = model.module if isinstance(model, DistributedDataParallel) else model
        model.eval()
        metrics = evaluate(
            model,
            loader,
            run.task.create_evaluator(max_samples=evaluation_sample_limit(loader)),
            run.batches,
            run.autocast,
            distributed=args.distributed,
            title=title,
            show=is_primary(args),
            log_interval=args.log_interval,
        )
        _logger.info(f'{title}: {format_metrics(metrics)}')
    metrics.pop('images_per_second')
    return metrics


def finish_epoch(
        run: Run,
        epoch: int,
        train_metrics: Dict[str, float],
        eval_metrics: Dict[str, float],
        lr: float,
        speed: Dict[str, float],
        result: TrainResult,
) -> None:
    """Record the epoch, then save it: a kill in between repeats the epoch, and its record."""
    result.history.append(dict(train_metrics, **{f'eval_{k}': v for k, v in eval_metrics.items()}))
    if run.log is not None:
        try:
            run.log.epoch(epoch, train_metrics, eval_metrics, lr, speed)
        except (OSError, PSTError) as e:
            check_there(run.output_dir)
            raise PSTError(
                f'Cannot write the log to {run.output_dir}: {e}. The last checkpoint there is intact: make room, and '
                f'start again with --resume auto.') from e
    if run.saver is not None:
        result.best_metric, result.best_epoch = run.saver.save_epoch(epoch, eval_metrics.get(run.args.eval_metric))


def prepare(args: Namespace, job: Optional[Job] = None) -> Run:
    """Make every part of a training run; what is wrong with the arguments or the data shows here.

    What is cheap to check comes first: the data is opened before a model is made, and weights are fetched last. The
    folder of the run is as it was until nothing can be wrong any more.
    """
    with ExitStack() as hold:
        run = _prepare(args, job or Classification(), hold)
        run.hold = hold.pop_all()
    return run


def _prepare(args: Namespace, job: Job, hold: ExitStack) -> Run:
    given = copy.deepcopy(args)
    check_resume(args)
    factories.import_modules(args.device_modules)
    device = factories.init_device(args)
    dtype = factories.resolve_dtype(args)
    if not is_primary(args):
        logging.getLogger().setLevel(logging.WARNING)
    if device.type == 'cpu':
        choose_threads()

    check_recipe(args)
    splits = job.open(args)
    folder, checkpoint = on_first(args, lambda: claim_folder(args, hold, '') if args.experiment else (None, None))
    if args.resume and args.resume != 'auto':
        checkpoint = Path(args.resume)
    saved = read_saved(checkpoint) if checkpoint is not None else {}

    random_seed(args.seed, args.rank)
    model, frozen = job.create_model(args)
    data = job.create_data(args, model, dtype)

    facts = job.describe(given, model)
    weight = getattr(args, 'sparsity_weight', 0)  # a detector's command has no such flag
    scales = coupled_scales(model, job.input_size, args.model) if weight else None
    model.to(device=device, dtype=dtype, memory_format=torch.channels_last if args.channels_last else None)
    if args.sync_bn and args.distributed:
        model = factories.sync_batchnorm(model, device)
    sparsity = Sparsity(scales, model, weight) if scales is not None else None
    task = job.create_task(args, model, device, dtype)
    args.lr = factories.resolve_lr(args)
    optimizer = factories.optimizer_for(args, task.get_trainable_module())
    if sparsity is not None:
        sparsity.attach(optimizer)
    loss_scaler = factories.loss_scaler_for(args, device)
    if args.model_ema and (is_primary(args) or not args.model_ema_force_cpu):
        task.setup_ema(
            decay=args.model_ema_decay,
            use_warmup=args.model_ema_warmup,
            device=torch.device('cpu') if args.model_ema_force_cpu else None,
        )

    stream = Stream(
        args.world_size, len(data.train), len(splits.train) if hasattr(splits.train, '__len__') else None,
        splits.images.digest if splits.images is not None else None)
    start = Position()
    if checkpoint is not None:
        start = load_run(args, checkpoint, saved, task, optimizer, loss_scaler, stream, job.class_names, job.flags)
    if args.start_epoch is not None:
        start = Position(args.start_epoch)

    if args.torchcompile:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        task.compile_ema(backend=args.torchcompile, mode=args.torchcompile_mode)
    if args.distributed:
        # on is DDP's default, and newer torch warns of the argument
        buffers = dict(broadcast_buffers=False) if args.no_ddp_bb else {}
        task.prepare_distributed(device_ids=[device] if device.type == 'cuda' else None, **buffers)

    updates_per_epoch = math.ceil(len(data.train) / args.grad_accum_steps)
    scheduler, num_epochs = factories.schedule_for(args, optimizer, updates_per_epoch)
    check_start(args, start, num_epochs, checkpoint)
    run = Run(
        args=args,
        device=device,
        task=task,
        job=job,
        batches=job.create_batches(args, device, dtype),
        frozen=frozen,
        optimizer=optimizer,
        scheduler=scheduler,
        num_epochs=num_epochs,
        data=data,
        autocast=factories.autocast_for(args, device),
        loss_scaler=loss_scaler,
        output_dir=folder,
        saver=None,
        log=None,
        start=start,
        hold=hold,
        sparsity=sparsity,
    )
    move_schedule(run)
    if not args.experiment:
        name = '-'.join([
            datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(args.model), str(job.input_size[-1])])
        run.output_dir, _ = on_first(args, lambda: claim_folder(args, hold, name))
    run.output_dir = run.output_dir if is_primary(args) else None
    entries = {FACTS_KEY: facts, 'stream': stream._asdict()}
    on_first(args, lambda: open_folder(run, given, entries, checkpoint, saved))
    params = sum(p.numel() for p in model.parameters())
    _logger.info(
        f'{safe_model_name(args.model)}: {params:,} parameters, {args.num_classes} classes, input '
        f'{"x".join(map(str, job.input_size))}, on {device} x {args.world_size}, learning rate '
        f'{args.lr:.3g}, epochs {start.epoch} to {num_epochs}' + (f', in {run.output_dir}' if run.output_dir else ''))
    return run


def move_schedule(run: Run) -> None:
    """Move the schedule to where the run starts."""
    if run.scheduler is None or run.start == (0, 0):
        return
    run.scheduler.step(run.start.epoch)
    run.scheduler.step_update(
        run.start.epoch * run.updates_per_epoch + run.start.step // run.args.grad_accum_steps)


def open_folder(
        run: Run,
        given: Namespace,
        entries: Dict[str, Any],
        checkpoint: Optional[Path],
        saved: Dict[str, Any],
) -> None:
    """Make the folder that of this run, and what writes to it; for the first process alone.

    Args:
        run: The run.
        given: Its arguments as they were given.
        entries: What its checkpoints tell beside the state.
        checkpoint: The checkpoint it goes on from, or None.
        saved: Content of that checkpoint.

    Raises:
        PSTError: If that would end a run that is there, or cannot be written.
    """
    args, folder = run.args, run.output_dir
    own = checkpoint is not None and is_in(checkpoint, folder)
    if own and not args.overwrite:
        further = states_beyond(folder, run.start)[0]
        if further:
            position, path = further[0]
            raise PSTError(
                f'{path} has come further (epoch {position.epoch}, step {position.step}) than where this run would go '
                f'on (epoch {run.start.epoch}, step {run.start.step}): --resume auto alone goes on from there, '
                f'--overwrite removes it, and another --experiment leaves it alone.')
    log = RunLog(args, folder, run.start.epoch if own else 0, run.job.title, run.job.metrics)
    try:
        if args.overwrite:
            remove_states_beyond(folder, run.start) if own else remove_run(folder)
        remove_leftovers(folder)
        # started again, the same file must not remove what this run has done
        write_yaml(Namespace(**dict(vars(given), overwrite=False)), str(folder / 'args.yaml'))
        log.open()
    except (OSError, PSTError) as e:
        raise PSTError(f'Cannot write to {folder} ({getattr(e, "strerror", e)}): choose another --output.') from e
    run.hold.callback(log.close)
    run.log = log
    run.saver = AtomicSaver(
        run.task, folder, entries, optimizer=run.optimizer, args=args, amp_scaler=run.loss_scaler,
        max_history=args.checkpoint_hist, decreasing=args.eval_metric == 'loss')
    if own:
        run.saver.load_state_dict(saved.get('saver'))
        if 'eval_metric' in changed_settings(saved, args, run.job.flags):
            run.saver.forget_metrics()
        run.saver.mend_best()
