"""Every flag of `detect train` and `detect validate`, as data; those of the classifiers where they mean the same."""
from argparse import Namespace
from dataclasses import replace
from typing import Any, Iterator, List, Optional, Sequence

from pst_timm.engine.args import args_of, parse_args
from pst_timm.engine.flags import TRAIN_FLAGS as CLASSIFY_TRAIN
from pst_timm.engine.flags import VALIDATE_FLAGS as CLASSIFY_VALIDATE
from pst_timm.engine.flags import Flag, FlagGroups

__all__ = [
    'DETECTOR_KEYS', 'TRAIN_FLAGS', 'VALIDATE_FLAGS', 'parse_train_args', 'parse_validate_args', 'train_args',
    'validate_args',
]

UNIT = dict(low=0., high=1.)


def _taken(groups: FlagGroups, keys: str, **changes: Any) -> List[Flag]:
    """Flags of another command by their keys, with some of what is said of them changed."""
    known = {flag.key: flag for _, flags in groups for flag in flags}
    return [replace(known[key], **changes) for key in keys.split()]


def _group(groups: FlagGroups, title: str, without: str = '') -> List[Flag]:
    """A whole group of flags of another command, but for some keys."""
    return [flag for flag in dict(groups)[title] if flag.key not in without.split()]


def _model(name: str, type: type, default: Any, help: str, **kwargs: Any) -> Flag:
    return Flag((name,), help, type, default, role='model', **kwargs)


_DATA_DIR = [
    *_taken(CLASSIFY_TRAIN, 'data', help='Folder of the data (same as --data-dir).'),
    *_taken(CLASSIFY_TRAIN, 'data_dir', help='Folder with images and boxes: annotations as COCO has them (JSON), or '
            'as Pascal VOC does (JPEGImages, Annotations, ImageSets/Main).'),
]
_ARCHITECTURE = [
    _model('--detector', str, 'fcos', 'Kind of detector: fcos, retinanet, or retinanet_v2 (group norm, GIoU loss).',
           choices=('fcos', 'retinanet', 'retinanet_v2')),
    _model('--trunk', str, 'resnet18', 'Name of any timm model with feature maps.'),
    _model('--neck', str, 'pst', "Pyramid over the trunk: pst, its plain twin pan, or torchvision's fpn.",
           choices=('pst', 'pan', 'fpn')),
    _model('--neck-width', int, 128, 'Channels of neck and heads.', low=8, high=4096),
    _model('--neck-kwargs', dict, {}, 'Arguments for the neck, such as depth=2.', nargs='*'),
    _model('--trunk-kwargs', dict, {}, 'Arguments for the trunk, such as drop_path_rate=0.1.', nargs='*'),
    _model('--levels', int, [8, 16, 32], 'Strides of the maps that are taken from the trunk.', nargs='+', low=2,
           high=128),
    _model('--extra-levels', int, 2, 'Coarser maps above them: none, 1 (pooled) or 2 (convolved).', low=0, high=2),
    _model('--head-convs', int, 4, 'Convolutions of each head before its last one (fcos).', low=0, high=16),
    _model('--train-topk', int, 0, 'Coarse tokens that each head of the neck selects in training.', low=0,
           high=10 ** 6),
    _model('--train-fine-prob', float, 1., 'Share of the training steps that run fine attention.', **UNIT),
]
_ATTENTION = [
    _model('--topk', int, 0, 'Coarse tokens that each head of the neck selects at inference, 0 for none.', low=0,
           high=10 ** 6),
    _model('--fine-fusion', str, 'gate', 'How fine attention is added.', choices=('gate', 'joint')),
]
_BOXES = [
    _model('--score-thresh', float, 0.05, 'Boxes of a lower score are left out.', **UNIT),
    _model('--nms-thresh', float, 0.6, 'Of two boxes of a class that overlap more, the better one stays.', **UNIT),
    _model('--detections-per-img', int, 100, 'Boxes in an image, at most; the accuracy is that of as many, '
           'and of 100 in COCO.', low=1, high=10_000),
]
# arguments of `create_detector` that are flags of the same name, but for `kind`
DETECTOR_KEYS = tuple(
    flag.key for flag in (*_ARCHITECTURE, *_ATTENTION, *_BOXES) if flag.key != 'detector') + ('img_size',)

TRAIN_FLAGS: FlagGroups = [
    ('data', [
        *_DATA_DIR,
        *_taken(CLASSIFY_TRAIN, 'train_split', help='Split to train on.'),
        *_taken(CLASSIFY_TRAIN, 'val_split', default='val', help='Split to validate on; empty for none.'),
        *_taken(CLASSIFY_TRAIN, 'max_bad_images max_bad_share'),
    ]),
    ('model', [
        *_ARCHITECTURE,
        *_ATTENTION,
        *_BOXES,
        Flag(('--pretrained-trunk',), 'Begin with the published weights of the trunk.', bool, False, role='model'),
        *_taken(CLASSIFY_TRAIN, 'trunk_checkpoint', help='Begin with the trunk of a classifier: a model name with '
                'published weights, a checkpoint, or the folder of a run.'),
        *_taken(CLASSIFY_TRAIN, 'initial_checkpoint', help='Begin with the weights of this detector; what tells the '
                'classes starts anew where there are others.'),
        *_taken(CLASSIFY_TRAIN, 'use_ema resume overwrite no_resume_opt'),
        *_taken(CLASSIFY_TRAIN, 'img_size', default=640, low=32, high=4096,
                help='Longer side of the images in pixels.'),
        *_taken(CLASSIFY_TRAIN, 'batch_size', default=16),
        *_taken(CLASSIFY_TRAIN, 'validation_batch_size grad_accum_steps grad_checkpointing'),
    ]),
    ('transfer', _taken(CLASSIFY_TRAIN, 'freeze freeze_trunk')),
    ('device and precision', _group(CLASSIFY_TRAIN, 'device and precision', without='torchscript')),
    ('optimizer', _group(CLASSIFY_TRAIN, 'optimizer')),
    ('learning rate', _group(CLASSIFY_TRAIN, 'learning rate', without='epoch_repeats')),
    ('augmentation', [
        *_taken(CLASSIFY_TRAIN, 'no_aug', help='Train on the images as they are validated.'),
        *_taken(CLASSIFY_TRAIN, 'hflip vflip'),
        *_taken(CLASSIFY_TRAIN, 'color_jitter', default=0.),
        Flag(('--scale-jitter',), 'Range of the size of the training images over --img-size.', float, None, nargs=2,
             above=0., high=10.),
        Flag(('--box-crop',), 'Probability of a random crop that keeps boxes.', float, 0., **UNIT),
    ]),
    ('batch norm', _taken(CLASSIFY_TRAIN, 'sync_bn dist_bn')),
    ('moving average of the weights', _group(CLASSIFY_TRAIN, 'moving average of the weights')),
    ('run', [
        *_group(CLASSIFY_TRAIN, 'run', without='eval_metric tta no_prefetcher use_multi_epochs_loader'),
        *_taken(CLASSIFY_TRAIN, 'eval_metric', default='ap', choices=('ap', 'ap50')),
    ]),
]

VALIDATE_FLAGS: FlagGroups = [
    ('data', [
        *_DATA_DIR,
        *_taken(CLASSIFY_VALIDATE, 'split', default='val', help='Split to evaluate.'),
        *_taken(CLASSIFY_VALIDATE, 'max_bad_images max_bad_share workers pin_mem'),
    ]),
    ('model', [
        *_taken(CLASSIFY_VALIDATE, 'checkpoint', help='Detector to evaluate: a checkpoint, or the folder of a run.'),
        *_taken(CLASSIFY_VALIDATE, 'use_ema'),
        *(replace(flag, default=None, help=f'{flag.help[:-1]}; as it was trained if unset.')
          for flag in (*_ATTENTION, *_BOXES)),
        *_taken(CLASSIFY_VALIDATE, 'device_modules'),
    ]),
    ('preprocessing', [
        *_taken(CLASSIFY_VALIDATE, 'img_size', low=32, high=4096,
                help='Longer side of the images in pixels; as it was trained if unset.'),
        *_taken(CLASSIFY_VALIDATE, 'batch_size', default=16),
    ]),
    ('device and precision', _taken(
        CLASSIFY_VALIDATE, 'fast_norm amp amp_dtype model_dtype channels_last device torchcompile torchcompile_mode')),
    ('metrics', _taken(CLASSIFY_VALIDATE, 'topk_sweep')),
    ('run', _taken(CLASSIFY_VALIDATE, 'results_file results_format log_freq seed')),
]


def _wrong_together(args: Namespace) -> Iterator[str]:
    """What training and validation both refuse, a sentence each."""
    if not (args.data_dir or args.data):
        yield 'Name the folder of the data with --data-dir.'
    if args.torchcompile_mode and args.torchcompile != 'inductor':
        yield f'--torchcompile-mode {args.torchcompile_mode} is for --torchcompile with inductor: leave the mode out.'
    if args.amp and args.model_dtype not in (None, 'float32'):
        yield f'--amp needs float32 weights: leave out --model-dtype {args.model_dtype}, or --amp.'


def _wrong_in_training(args: Namespace) -> Iterator[str]:
    yield from _wrong_together(args)
    if args.scale_jitter is not None and args.scale_jitter[0] > args.scale_jitter[1]:
        yield f'--scale-jitter needs a smallest and a largest value, got {args.scale_jitter}.'
    starts = [k for k in ('pretrained_trunk', 'trunk_checkpoint', 'initial_checkpoint') if getattr(args, k)]
    if len(starts) > 1:
        flags = ' and '.join(f'--{k.replace("_", "-")}' for k in starts)
        yield f'{flags} all say which weights to begin with: choose one.'
    if args.use_ema is not None and not (args.trunk_checkpoint or args.initial_checkpoint):
        flag = '--use-ema' if args.use_ema else '--no-use-ema'
        yield f'{flag} chooses the weights of --initial-checkpoint or --trunk-checkpoint, and neither is given.'
    if args.lr_noise is not None and (len(args.lr_noise) > 2 or args.lr_noise != sorted(args.lr_noise)):
        yield f'--lr-noise needs where the noise goes on, and perhaps where it goes off, got {args.lr_noise}.'
    if args.neck != 'pst' and (args.topk or args.train_topk) and '_pst' not in args.trunk:
        yield f'--topk and --train-topk are for a neck or trunk with PST: leave them out for --neck {args.neck}.'


def _wrong_in_validation(args: Namespace) -> Iterator[str]:
    yield from _wrong_together(args)
    if not args.checkpoint:
        yield 'Nothing to evaluate: name a --checkpoint.'
    if args.topk_sweep and len(set(args.topk_sweep)) < len(args.topk_sweep):
        yield f'--topk-sweep names a value twice, got {args.topk_sweep}.'
    if args.topk_sweep and args.topk is not None:
        yield '--topk-sweep tries several values, and --topk sets one: choose one.'


def parse_train_args(argv: Optional[Sequence[str]] = None, prog: str = 'pst-timm detect train') -> Namespace:
    """Arguments of a training run from the words of a command line (`sys.argv` if None)."""
    return parse_args(TRAIN_FLAGS, prog, 'Train an object detector.', argv, _wrong_in_training)


def parse_validate_args(argv: Optional[Sequence[str]] = None, prog: str = 'pst-timm detect validate') -> Namespace:
    """Arguments of an evaluation from the words of a command line (`sys.argv` if None)."""
    return parse_args(VALIDATE_FLAGS, prog, 'Evaluate an object detector.', argv, _wrong_in_validation)


def train_args(**values: Any) -> Namespace:
    """Arguments of a training run from keyword arguments, checked as those of the command line are."""
    return args_of(TRAIN_FLAGS, values, _wrong_in_training)


def validate_args(**values: Any) -> Namespace:
    """Arguments of an evaluation from keyword arguments, checked as those of the command line are."""
    return args_of(VALIDATE_FLAGS, values, _wrong_in_validation)
