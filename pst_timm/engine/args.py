"""From a command line, a YAML file or keyword arguments to checked arguments.

A mistake (unknown name, wrong type, value out of range) is an error before any work starts, and names the nearest
valid spelling.
"""
import argparse
import re
import reprlib
from argparse import Namespace
from copy import deepcopy
from typing import Any, Callable, Dict, Iterator, NoReturn, Optional, Sequence

import yaml

from pst_timm.utils.configs import read_config
from pst_timm.utils.errors import PSTError, did_you_mean
from pst_timm.utils.files import write_text
from pst_timm.utils.parsing import ArgumentParser

from .flags import TRAIN_FLAGS, VALIDATE_FLAGS, Flag, FlagGroups

__all__ = [
    'args_of', 'parse_args', 'parse_train_args', 'parse_validate_args', 'read_yaml', 'train_args', 'validate_args',
    'write_yaml',
]


def _by_key(groups: FlagGroups) -> Dict[str, Flag]:
    return {flag.key: flag for _, flags in groups for flag in flags}


class _Parser(ArgumentParser):
    """A parser whose errors are `PSTError`s."""

    def error(self, message: str) -> NoReturn:
        message = message.rstrip('.')
        raise PSTError(f'{message}.' if message.endswith('--help') else f'{message}. See {self.prog} --help.')


class _Refused(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        raise PSTError(f'{option_string}: {self.const}')


def _argparse_type(flag: Flag) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return flag.parse_one(text)
        except PSTError as e:
            raise argparse.ArgumentTypeError(str(e)) from None
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f'expected {flag.expected()}, got {text!r}') from None
    return convert


def _build_parser(groups: FlagGroups, prog: str, description: str) -> _Parser:
    parser = _Parser(prog=prog, description=description)
    parser.add_argument('-c', '--config', default='', metavar='FILE', help='YAML file with values for the flags below.')
    for title, flags in groups:
        group = parser.add_argument_group(title)
        for flag in flags:
            if flag.refused:
                group.add_argument(
                    *flag.names, action=_Refused, nargs='*', default=argparse.SUPPRESS, const=flag.refused,
                    help=argparse.SUPPRESS)
                continue
            kwargs = flag.argparse_kwargs()
            if not (flag.is_switch or flag.is_kwargs):
                kwargs['type'] = _argparse_type(flag)
            group.add_argument(*flag.names, **kwargs)
    return parser


def read_yaml(path: str, groups: FlagGroups = TRAIN_FLAGS) -> Dict[str, Any]:
    """Read and check a YAML file of flags.

    Args:
        path: File with one mapping, keys as in timm's configs (`batch_size`).
        groups: The flags it may name.

    Returns:
        Checked values by key.

    Raises:
        PSTError: If the file cannot be read, or names an unknown key or an unfit value; all of them are listed.
    """
    return _check_values(read_config(path), groups, where=f'{path}: ')


def _check_values(values: Dict[str, Any], groups: FlagGroups, where: str = '') -> Dict[str, Any]:
    flags = _by_key(groups)
    known = [key for key, flag in flags.items() if not flag.refused]
    checked, problems = {}, []
    for key, value in values.items():
        flag = flags.get(key)
        if flag is None:
            problems.append(f'{where}unknown key {key!r}.{did_you_mean(str(key), known)}')
        elif flag.refused:
            if value and value != flag.off:
                problems.append(f'{where}{key}: {flag.refused}')
        else:
            try:
                checked[key] = flag.parse_yaml(value)
            except PSTError as e:
                problems.append(f'{where}{key}: {e}')
            except (TypeError, ValueError, OverflowError):
                problems.append(f'{where}{key} must be {flag.expected()}, got {reprlib.repr(value)}.')
    if problems:
        raise PSTError('\n'.join(problems))
    return checked


def write_yaml(args: Namespace, path: str) -> None:
    """Write arguments as a YAML file that `read_yaml` reads and that starts the same run again."""
    write_text(path, yaml.safe_dump(dict(sorted(vars(args).items())), default_flow_style=False))


Check = Callable[[Namespace], Iterator[str]]
"""What no flag can check alone: sentences about arguments that do not go together."""


def parse_args(
        groups: FlagGroups,
        prog: str,
        description: str,
        argv: Optional[Sequence[str]],
        check: Check,
) -> Namespace:
    """Arguments of a command from its words.

    Args:
        groups: The flags of the command.
        prog: Its name.
        description: What it does, for the help.
        argv: The words, `sys.argv` if None.
        check: What no flag can check alone.

    Raises:
        PSTError: If a flag is unknown, or a value unfit.
    """
    parser = _build_parser(groups, prog, description)
    config_parser = _Parser(prog=prog, add_help=False)
    config_parser.add_argument('-c', '--config', default='')
    config, rest = config_parser.parse_known_args(argv)
    if config.config:
        parser.set_defaults(**read_yaml(config.config, groups))
    args = parser.parse_args(rest)
    del args.config
    return _finish(Namespace(**deepcopy(vars(args))), check)


def args_of(groups: FlagGroups, values: Dict[str, Any], check: Check) -> Namespace:
    """The same from keyword arguments, see `parse_args`."""
    args = {key: deepcopy(flag.default) for key, flag in _by_key(groups).items() if not flag.refused}
    args.update(_check_values(values, groups))
    return _finish(Namespace(**args), check)


def _finish(args: Namespace, check: Check) -> Namespace:
    """Check what no flag can check alone, and make one of the two names of the data."""
    problems = [*check(args)]
    if args.data and args.data_dir not in (None, args.data):
        problems.insert(0, f'{args.data!r} is given beside --data-dir {args.data_dir}: name the data once.')
    if problems:
        raise PSTError('\n'.join(problems))
    args.data_dir = args.data_dir or args.data
    args.data = None
    return args


TOO_LARGE = 2 ** 16  # for the width or depth of a model


def _wrong_together(args: Namespace) -> Iterator[str]:
    """What training and validation both refuse, a sentence each."""
    chans = args.input_size[0] if args.input_size else args.in_chans or 3
    for key in ('mean', 'std'):
        values = getattr(args, key)
        if values is not None and len(values) not in (1, chans):
            yield f'--{key} needs 1 or {chans} values (one per channel), got {len(values)}.'
    if args.input_size and args.in_chans not in (None, chans):
        yield f'--input-size {chans} ... and --in-chans {args.in_chans} contradict each other: give one of them.'
    if args.input_size and args.img_size not in (None, *args.input_size[1:]):
        yield f'--input-size and --img-size {args.img_size} contradict each other: give one of them.'
    if args.data_on_device and args.no_prefetcher:
        yield '--data-on-device and --no-prefetcher exclude each other: choose one.'
    if args.torchscript and args.torchcompile:
        yield '--torchscript and --torchcompile exclude each other: choose one.'
    if args.torchcompile_mode and args.torchcompile != 'inductor':
        yield f'--torchcompile-mode {args.torchcompile_mode} is for --torchcompile with inductor: leave the mode out.'
    if args.amp and args.model_dtype not in (None, 'float32'):
        yield f'--amp needs float32 weights: leave out --model-dtype {args.model_dtype}, or --amp.'
    if type(chans := args.model_kwargs.get('in_chans', 3)) is not int or not 0 < chans < 1000:
        yield f'--model-kwargs in_chans={chans!r}: expected the number of input channels; --in-chans says it too.'
    for key, flag in (('num_classes', '--num-classes'), ('pretrained', '--pretrained'), ('features_only', ''),
                      ('checkpoint_path', '--initial-checkpoint, or --checkpoint in validation'),
                      ('pretrained_cfg', ''), ('pretrained_cfg_overlay', '')):
        if key in args.model_kwargs:
            yield f'--model-kwargs cannot set {key}: ' + (f'say it with {flag}.' if flag else 'leave it out.')
    for key, value in args.model_kwargs.items():
        most = 1000 if re.search('depth|layers|blocks', key) else TOO_LARGE
        values = value if isinstance(value, (list, tuple)) else [value]
        if any(type(v) is int and v > most for v in values):
            yield f'--model-kwargs {key}={value}: no model is that large, expected at most {most}.'


def _wrong_in_training(args: Namespace) -> Iterator[str]:
    yield from _wrong_together(args)
    for key in ('scale', 'ratio', 'cutmix_minmax'):
        values = getattr(args, key)
        same = key == 'cutmix_minmax' and values is not None and values[0] == values[-1]
        if values is not None and (len(values) != 2 or values[0] > values[1] or same):
            yield f'--{key.replace("_", "-")} needs a smallest and a largest value, got {values}.'
    if args.scale[-1] == 0:
        yield '--scale 0 0 keeps nothing of an image: the largest value must be above 0.'
    if args.stored_size and not args.data_on_device:
        yield '--stored-size is for --data-on-device: add it, or leave the size out.'
    if args.torchscript and (args.freeze or args.freeze_trunk or args.linear_probe):
        yield '--freeze, --freeze-trunk and --linear-probe do not reach into a --torchscript model.'
    if args.pretrained_path and args.initial_checkpoint:
        yield '--pretrained-path and --initial-checkpoint both say which weights to start from: choose one.'
    if args.use_ema is not None and not (args.pretrained_path or args.initial_checkpoint):
        flag = '--use-ema' if args.use_ema else '--no-use-ema'
        yield f'{flag} chooses the weights of --initial-checkpoint or --pretrained-path, and neither is given.'
    if args.lr_noise is not None and (len(args.lr_noise) > 2 or args.lr_noise != sorted(args.lr_noise)):
        yield f'--lr-noise needs where the noise goes on, and perhaps where it goes off, got {args.lr_noise}.'
    if args.tta > 1 and (batch := args.validation_batch_size or args.batch_size) % args.tta:
        yield (
            f'--tta {args.tta} needs all copies of an image in one batch, and {batch} is no multiple of it: choose '
            f'another --validation-batch-size.')
    mixed_in_workers = args.workers and not (args.no_prefetcher or args.data_on_device)
    if args.mixup_off_epoch and args.use_multi_epochs_loader and mixed_in_workers:
        yield (
            '--mixup-off-epoch cannot reach the workers that --use-multi-epochs-loader keeps: leave one of them out, '
            'or add --no-prefetcher.')
    if (args.mixup or args.cutmix or args.cutmix_minmax) and args.batch_size % 2:
        yield f'Mixup and CutMix need an even --batch-size, got {args.batch_size}.'
    yield from _wrong_in_balance(args)


def _wrong_in_balance(args: Namespace) -> Iterator[str]:
    if args.use_multi_epochs_loader and (args.sampler or args.hard_examples):
        yield (
            '--use-multi-epochs-loader begins an epoch before it is told which one: leave it out for --sampler and '
            '--hard-examples, whose draw depends on the epoch.')
    if args.logit_adjust and args.bce_loss:
        yield '--logit-adjust is for the softmax, and --bce-loss takes each class for itself: choose one.'
    if args.hard_loss_warmup is not None and args.hard_loss_fraction is None:
        yield f'--hard-loss-warmup {args.hard_loss_warmup} is for --hard-loss-fraction: add it, or leave it out.'
    if bool(args.rare_aa) != (args.rare_below is not None):
        yield '--rare-aa says how, and --rare-below which classes are augmented: give both, or none.'
    if args.rare_aa and args.no_aug:
        yield f'--rare-aa {args.rare_aa} and --no-aug exclude each other: choose one.'


def _wrong_in_validation(args: Namespace) -> Iterator[str]:
    yield from _wrong_together(args)
    if args.model is not None and not all(args.model.split(',')):
        yield f'--model {args.model!r} has a name that is empty: separate names by single commas, without spaces.'
    if args.use_ema is not None and not args.checkpoint:
        flag = '--use-ema' if args.use_ema else '--no-use-ema'
        yield f'{flag} chooses the weights of a --checkpoint, and none is given.'
    if args.topk_sweep and len(set(args.topk_sweep)) < len(args.topk_sweep):
        yield f'--topk-sweep names a value twice, got {args.topk_sweep}.'
    if args.aot_autograd and (args.torchscript or args.torchcompile):
        yield '--aot-autograd is a --torchcompile of its own, and no --torchscript: choose one of the three.'


def parse_train_args(argv: Optional[Sequence[str]] = None, prog: str = 'train.py') -> Namespace:
    """Arguments of a training run from the words of a command line (`sys.argv` if None)."""
    return parse_args(TRAIN_FLAGS, prog, 'Train an image classifier.', argv, _wrong_in_training)


def parse_validate_args(argv: Optional[Sequence[str]] = None, prog: str = 'validate.py') -> Namespace:
    """Arguments of an evaluation from the words of a command line (`sys.argv` if None)."""
    return parse_args(VALIDATE_FLAGS, prog, 'Evaluate image classifiers.', argv, _wrong_in_validation)


def train_args(**values: Any) -> Namespace:
    """Arguments of a training run from keyword arguments, checked as those of the command line are."""
    return args_of(TRAIN_FLAGS, values, _wrong_in_training)


def validate_args(**values: Any) -> Namespace:
    """Arguments of an evaluation from keyword arguments, checked as those of the command line are."""
    return args_of(VALIDATE_FLAGS, values, _wrong_in_validation)
