"""Every flag of `train` and `validate`, as data. Names, types and defaults are timm's."""
import argparse
import ast
import math
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

from . import checks

__all__ = ['ROLES', 'TRAIN_FLAGS', 'VALIDATE_FLAGS', 'Flag', 'FlagGroups', 'keys_with_role', 'recipe', 'shared_keys']

ROLES = {
    'model': 'which model, and where its weights come from',
    'preprocessing': 'how an image becomes the input of the model',
    'recipe': 'how the model is trained',
    'data': 'which images',
    'metrics': 'what is computed from the answers',
    'machine': 'where and how fast, with the same result but for rounding and the order of random draws',
    'output': 'what a run writes and shows, and what it goes on from',
}
LARGEST = 10 ** 12  # whole number of any flag; beyond it are mistakes, and what does not fit into a C integer


@dataclass(frozen=True)
class Flag:
    """One flag of the command line, which is also a key of the YAML file."""
    names: Tuple[str, ...]
    help: str
    type: Callable = str
    default: Any = None
    nargs: Union[int, str, None] = None
    choices: Optional[Sequence[str]] = None
    low: Optional[float] = None
    """Smallest value allowed."""
    high: Optional[float] = None
    """Largest value allowed."""
    above: Optional[float] = None
    """What a value must be greater than."""
    check: Optional[Callable[[Any], None]] = None
    """Raises a `PSTError`, with a sentence, for a value that its type and range do not tell to be wrong."""
    refused: str = ''
    """Why the flag is known but not supported; the sentence shown to whoever uses it."""
    off: Any = None
    """The value with which a refused flag does nothing; a config that timm's script wrote has it."""
    role: str = 'recipe'
    """What the flag is about, one of `ROLES`."""
    source: bool = False
    """Whether a value may be a path of this machine, which means nothing on another one."""

    @property
    def key(self) -> str:
        """Name in the YAML file and in the arguments."""
        name = next((n for n in self.names if n.startswith('--')), self.names[0])
        return name.lstrip('-').replace('-', '_')

    @property
    def is_switch(self) -> bool:
        return self.type is bool

    @property
    def is_optional_switch(self) -> bool:
        """Whether it is a switch that is neither on nor off if it is not given."""
        return self.is_switch and self.default is None

    @property
    def is_kwargs(self) -> bool:
        return self.type is dict

    @property
    def is_list(self) -> bool:
        return self.nargs == '+' or isinstance(self.nargs, int)

    def expected(self) -> str:
        """What a value has to be, in words."""
        kind = {bool: 'true or false', int: 'an integer', float: 'a number', str: 'a text', dict: 'key=value pairs'}
        text = kind[self.type]
        if self.choices:
            text = 'one of ' + ', '.join(repr(c) for c in self.choices)
        elif self.above is not None:
            text += f' above {self.above}' + (f', at most {self.high}' if self.high is not None else '')
        elif self.low is not None and self.high is not None:
            text += f' from {self.low} to {self.high}'
        elif self.low is not None:
            text += f', at least {self.low}'
        if self.is_list:
            text = f'a list of {self.nargs if isinstance(self.nargs, int) else "one or more"} values, each {text}'
        return text

    def parse_one(self, text: str) -> Any:
        """A word of the command line to a value.

        Raises:
            ValueError: If it is not a value of this flag.
        """
        return self._check(self.type(text))

    def parse_yaml(self, value: Any) -> Any:
        """A value of a YAML file to a value of this flag.

        Raises:
            ValueError: If it is of another type, or out of range.
        """
        if value is None:
            if self.default is None:
                return None
            raise ValueError('empty')
        if self.is_kwargs:
            if isinstance(value, dict) and all(isinstance(key, str) and key for key in value):
                return dict(value)
            raise ValueError('not a mapping of names')
        if self.is_list:
            values = value if isinstance(value, list) else [value]
            if isinstance(self.nargs, int) and len(values) != self.nargs:
                raise ValueError('wrong length')
            if not values and values != self.default:  # an empty list is a value only where it is the default
                raise ValueError('no values')
            return [self._yaml_scalar(v) for v in values]
        return self._yaml_scalar(value)

    def _yaml_scalar(self, value: Any) -> Any:
        # a bool is an int to Python, but not to the person who wrote the file
        if isinstance(value, bool) != self.is_switch:
            raise ValueError('wrong type')
        if self.type is int and not isinstance(value, int):
            raise ValueError('wrong type')
        if self.type is str and not isinstance(value, str):
            raise ValueError('wrong type')
        # YAML 1.1 reads 1e-3, without a dot, as a text
        return self._check(self.type(value))

    def _check(self, value: Any) -> Any:
        if self.choices and value not in self.choices:
            raise ValueError('not a choice')
        if self.type is float and not math.isfinite(value):
            raise ValueError('not a number to calculate with')
        if self.type is int and abs(value) > LARGEST:
            raise ValueError('absurd')
        if (self.low is not None and value < self.low) or (self.above is not None and value <= self.above):
            raise ValueError('too small')
        if self.high is not None and value > self.high:
            raise ValueError('too large')
        if self.check is not None:
            self.check(value)
        return value

    def argparse_kwargs(self) -> Dict[str, Any]:
        """Keyword arguments of `ArgumentParser.add_argument`; the checks of `parse_one` are added by the caller."""
        if self.is_optional_switch:
            return dict(action=argparse.BooleanOptionalAction, default=None, help=self.help)
        if self.is_switch:
            return dict(action='store_true', default=self.default, help=self.help)
        kwargs = dict(default=self.default, help=self.help, nargs=self.nargs)
        if self.is_kwargs:
            return dict(kwargs, action=_ParseKwargs, metavar='KEY=VALUE')
        if self.names[0].startswith('-'):
            kwargs['metavar'] = self.key.rsplit('_', 1)[-1].upper()
            if self.nargs == '?':
                kwargs['const'] = 'inductor'  # a bare --torchcompile
        return kwargs


class _ParseKwargs(argparse.Action):
    """timm's `ParseKwargs`, loaded when the flag is used, so that the help does not wait for torch."""

    def __call__(self, parser, namespace, values, option_string=None):
        from timm.utils import ParseKwargs

        seen = set()
        for word in filter(None, values):
            key, equals, value = word.partition('=')
            if not equals or not key.isidentifier():
                raise argparse.ArgumentError(self, f'expected KEY=VALUE, such as drop_rate=0.1, got {word!r}')
            if key in seen:
                raise argparse.ArgumentError(self, f'{key} is given twice')
            if _is_torn(value):
                raise argparse.ArgumentError(self, f'{word!r} has quotes or brackets that do not close')
            seen.add(key)
        ParseKwargs(self.option_strings, self.dest)(parser, namespace, values, option_string)


def _is_torn(text: str) -> bool:
    """Whether a text begins as a quoted one, a list or a mapping does, and is none."""
    if text[:1] not in tuple('\'"([{'):
        return False
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return True
    return False


FlagGroups = List[Tuple[str, List[Flag]]]


def _flag(names: str, type: Callable, default: Any, help: str, **kwargs: Any) -> Flag:
    return Flag(tuple(names.split()), help, type, default, **kwargs)


def _as(role: str, *flags: Flag) -> List[Flag]:
    return [replace(flag, role=role) for flag in flags]


def _switch(name: str, help: str, **kwargs: Any) -> Flag:
    return Flag((name,), help, bool, False, **kwargs)


def _choice(name: str, help: str, **kwargs: Any) -> Flag:
    """A switch with a third state, neither --name nor --no-name."""
    return Flag((name,), help, bool, None, **kwargs)


def _refused(reason: str, switches: str = '', values: str = '', lists: str = '', **off: Any) -> List[Flag]:
    flags = [
        *(Flag((n,), 'Not supported here.', bool, False, refused=reason) for n in switches.split()),
        *(Flag(tuple(n.split('=')), 'Not supported here.', str, refused=reason) for n in values.split()),
        *(Flag((n,), 'Not supported here.', str, nargs='+', refused=reason) for n in lists.split()),
    ]
    return [replace(flag, off=off.get(flag.key)) for flag in flags]


_NAFLEX = "NaFlex (variable token sequences) is for vision transformers and is not part of this engine; " \
    "use timm's own script for it."
_SCHEDULED = "Scheduled resolutions are not part of this engine; train at one size (--img-size), or use timm's " \
    "own script, which reads the same config."
_AUGMIX = "Augmentation splits (AugMix, split batch norm, JSD loss) are not part of this engine; use --aa " \
    "augmix-m5-w4-d2 for AugMix images without splits, or timm's own script."
_FUSER = "The legacy TorchScript fusers are gone from current torch; use --torchcompile for fused kernels."
_TF = "TensorFlow preprocessing is not part of this engine; evaluate ported TensorFlow weights with timm's own script."

_UNIT = dict(low=0., high=1.)
MANY = 10 ** 12  # more samples than there are
_POSITIVE = dict(above=0.)
_SEED = dict(low=0, high=4_000_000_000)  # numpy takes 32 bits, and each process adds its rank
_INTERPOLATIONS = ('', 'nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
_SCHEDULES = ('cosine', 'tanh', 'step', 'multistep', 'constant', 'plateau', 'poly', 'wsd', 'rsqrt', 'none')

_DATA = _as(
    'data',
    _flag('data', str, None, 'Folder, .tar file or shard folder with the images (same as --data-dir).', nargs='?'),
    _flag('--data-dir', str, None, 'Folder, .tar file or shard folder with the images.'),
    _flag('--dataset', str, '', 'Kind and name: empty for a folder or .tar, wds/, hfds/NAME, hfids/NAME, torch/NAME.'),
    _switch('--dataset-download', 'Let datasets that can be downloaded (torch/, hfds/) do so.'),
    _flag('--class-map', str, '', 'Text file that maps class names to indices.'),
    _flag('--input-img-mode', str, None, "PIL mode of the images ('RGB' or 'L'), from --in-chans if unset.",
          check=checks.image_mode),
    _flag('--input-key', str, None, 'Name of the image in a sample of a dataset that names them.'),
    _flag('--target-key', str, None, 'Name of the label in a sample of a dataset that names them.'),
    _switch('--dataset-trust-remote-code', 'Let a Hugging Face dataset run its own loading code.'),
)

_BAD_IMAGES = _as(
    'data',
    _flag('--max-bad-images', int, 100, 'Unreadable images to skip before the run ends with an error.', low=0),
    _flag('--max-bad-share', float, 0.01, 'Share of the images that may be unreadable, likewise.', **_UNIT),
)

_USE_EMA = _choice(
    '--use-ema', 'Take the moving average of the weights from the checkpoint, or the weights as trained; if unset, the '
    'moving average where there is one.', role='model')

_PREPROCESSING = _as(
    'preprocessing',
    _flag('--img-size', int, None, 'Height and width of the input in pixels, from the model if unset.', low=1),
    _flag('--input-size', int, None, 'Channels, height and width, instead of --img-size.', nargs=3, low=1),
    _flag('--crop-pct', float, None, 'Share of the image that the centre crop of the evaluation keeps.',
          low=0.01, high=4.),
    _flag('--mean', float, None, 'Mean of the pixels, one value per channel, from the model if unset.', nargs='+'),
    _flag('--std', float, None, 'Standard deviation of the pixels, from the model if unset.', nargs='+', low=1e-8),
    _flag('--interpolation', str, '', 'How images are resized (bilinear, bicubic, ...), from the model if empty.',
          choices=_INTERPOLATIONS),
    _switch('--data-on-device', 'Read all images once, keep them on the device as bytes, and make the batches there.'),
)

_PRECISION = [
    _switch('--fast-norm', 'Run norm layers in the low precision of autocast.'),
    _switch('--amp', 'Mixed precision: autocast, and a loss scaler for float16 on a GPU.'),
    _flag('--amp-dtype', str, 'float16', 'Low precision of --amp.', choices=('float16', 'bfloat16')),
    _flag('--model-dtype', str, None, 'Precision of the weights themselves (without --amp).',
          choices=('float32', 'float16', 'bfloat16')),
]

_MACHINE = _as(
    'machine',
    _switch('--channels-last', 'Keep images and weights in channels_last order.'),
    _flag('--device', str, None, 'Device: cuda, mps, cpu, cuda:1, ...; the best one present if unset.'),
    _switch('--torchscript', 'Compile the model with torch.jit.script.'),
    _flag('--torchcompile', str, None, 'Compile with torch.compile, by inductor or the backend named.', nargs='?',
          check=checks.compile_backend),
    _flag('--torchcompile-mode', str, None, 'Mode of torch.compile.', check=checks.compile_mode),
)

TRAIN_FLAGS: FlagGroups = [
    ('data', [
        *_DATA,
        _flag('--stored-size', int, None, 'Side of the training images of --data-on-device: the shorter side is '
              'resized to it, the middle kept; as they are if unset.', low=1, role='preprocessing'),
        _flag('--train-split', str, 'train', 'Split, or folder below the data, to train on.', role='data'),
        _flag('--val-split', str, 'validation', 'Split, or folder below the data, to validate on; empty for none.',
              role='data'),
        _flag('--train-num-samples', int, None, 'Training samples, where the dataset cannot tell (shards).', low=1,
              high=MANY, role='data'),
        _flag('--val-num-samples', int, None, 'Validation samples, where the dataset cannot tell (shards).', low=1,
              high=MANY, role='data'),
        *_BAD_IMAGES,
    ]),
    ('model', [
        _flag('--model', str, 'resnet50', 'Name of any timm model.', role='model'),
        _switch('--pretrained', 'Start from the published weights of the model.', role='model'),
        _flag('--pretrained-path', str, None, 'Start from the weights in this file as if they were the published ones '
              '(--pretrained is not needed); the classifier starts anew.',
              role='model', source=True),
        _flag('--initial-checkpoint', str, '', 'Start from the weights in this checkpoint; a classifier for another '
              'number of classes starts anew.', role='model', source=True),
        _USE_EMA,
        _flag('--trunk-checkpoint', str, '', 'Load the trunk of a model with PST from the plain timm model: a name '
              'with published weights, or a checkpoint file.', role='model', source=True),
        _flag('--resume', str, '', "Checkpoint to go on from with model, optimizer and epoch; 'auto' takes the newest "
              'valid one of --output/--experiment and starts afresh if there is none.', role='output'),
        _switch('--overwrite', 'Remove the run that is in --output/--experiment for this one; with --resume and a '
                'checkpoint of that run, what came after the checkpoint.', role='output'),
        _switch('--no-resume-opt', 'Leave the optimizer state of the checkpoint behind.', role='output'),
        _flag('--num-classes', int, None, "Number of classes; that of the data if unset, or else the model's own.",
              low=1, role='model'),
        _flag('--gp', str, None, 'Global pooling (avg, max, avgmax, catavgmax, fast...), from the model if unset.',
              role='model'),
        _flag('--in-chans', int, None, 'Input channels, from the model if unset.', low=1, role='model'),
        *_PREPROCESSING,
        _flag('-b --batch-size', int, 128, 'Training images per process and step.', low=1),
        _flag('-vb --validation-batch-size', int, None, 'Validation images per process and step.', low=1,
              role='machine'),
        _flag('--grad-accum-steps', int, 1, 'Batches whose gradients are added up for one update.', low=1),
        _switch('--grad-checkpointing', 'Recompute activations in the backward pass to save memory.', role='machine'),
        _flag('--model-kwargs', dict, {}, 'Arguments for the model, such as topk=8.', nargs='*', role='model'),
        _flag('--head-init-scale', float, None, 'Factor on the initial weights of the classifier.'),
        _flag('--head-init-bias', float, None, 'Initial bias of the classifier.'),
    ]),
    ('transfer', [
        _flag('--freeze', str, None, 'Modules (layer1, layer2.0) or groups (stem) that stay as they are, batch-norm '
              'statistics included.', nargs='+'),
        _switch('--freeze-trunk', 'Freeze stem and stages; train what the model adds to them, and the classifier.'),
        _switch('--linear-probe', 'Freeze everything but the classifier.'),
    ]),
    ('device and precision', [
        *_PRECISION,
        *_MACHINE,
        _switch('--no-ddp-bb', "Do not broadcast the buffers before each of DDP's forward passes.", role='machine'),
        _switch('--synchronize-step', 'Wait for the device at the end of each step.', role='machine'),
        _flag('--dist-timeout', float, 600., 'Seconds for which a process waits for the others before it gives up.',
              low=1., role='machine'),
        _flag('--local_rank', int, 0, 'Ignored; torchrun sets it in the environment.', role='machine'),
        _flag('--device-modules', str, None, 'Python packages to import first, such as pst_timm for its models.',
              nargs='+', role='model'),
    ]),
    ('optimizer', [
        _flag('--opt', str, 'sgd', 'Name of the optimizer.', check=checks.optimizer),
        _flag('--opt-eps', float, None, "Epsilon, the optimizer's own if unset.", low=0.),
        _flag('--opt-betas', float, None, "Betas, the optimizer's own if unset.", nargs='+', **_UNIT),
        _flag('--momentum', float, 0.9, 'Momentum.', **_UNIT),
        _flag('--weight-decay', float, 2e-5, 'Weight decay.', low=0.),
        _flag('--clip-grad', float, None, 'Clip gradients to this size, none if unset.', **_POSITIVE),
        _flag('--clip-mode', str, 'norm', 'How gradients are clipped.', choices=('norm', 'value', 'agc')),
        _flag('--layer-decay', float, None, 'Factor on the learning rate from each layer to the one below it.',
              above=0., high=1.),
        _flag('--layer-decay-min-scale', float, 0, 'Smallest factor that layer decay arrives at.', low=0.),
        _flag('--layer-decay-no-opt-scale', float, None, 'Do not train layers whose factor falls below this.', low=0.),
        _flag('--opt-kwargs', dict, {}, 'More arguments for the optimizer.', nargs='*'),
    ]),
    ('learning rate', [
        _flag('--sched', str, 'cosine', 'Schedule: cosine, tanh, step, multistep, poly, plateau, wsd, constant, none.',
              choices=_SCHEDULES),
        _switch('--sched-on-updates', 'Move along the schedule at every update instead of every epoch.'),
        _flag('--lr', float, None, 'Learning rate; from --lr-base and the global batch if unset.', **_POSITIVE),
        _flag('--lr-base', float, 0.1, 'Learning rate at a global batch of --lr-base-size.', **_POSITIVE),
        _flag('--lr-base-size', int, 256, 'Global batch that --lr-base is meant for.', low=1),
        _flag('--lr-base-scale', str, '', "How --lr-base grows with the batch, from the optimizer if empty.",
              choices=('', 'linear', 'sqrt')),
        _flag('--lr-noise', float, None, 'Shares of the schedule where noise goes on (and off).', nargs='+', **_UNIT),
        _flag('--lr-noise-pct', float, 0.67, 'Largest share of the learning rate that is noise.', low=0.),
        _flag('--lr-noise-std', float, 1.0, 'Standard deviation of the noise.', low=0.),
        _flag('--lr-cycle-mul', float, 1.0, 'Factor on the length from cycle to cycle.', **_POSITIVE),
        _flag('--lr-cycle-decay', float, 0.5, 'Factor on the learning rate from cycle to cycle.', low=0.),
        _flag('--lr-cycle-limit', int, 1, 'Number of cycles.', low=1),
        _flag('--lr-k-decay', float, 1.0, 'k of the cosine and poly schedules.', low=0.),
        _flag('--warmup-lr', float, 1e-5, 'Learning rate at which the warm-up starts.', low=0.),
        _flag('--min-lr', float, 0, 'Learning rate at which the schedule ends.', low=0.),
        _flag('--epochs', int, 300, 'Epochs to train.', low=1),
        _flag('--epoch-repeats', float, 0., 'Passes over an iterable dataset in each epoch.', low=0.),
        _flag('--start-epoch', int, None, 'Epoch to start at, whatever the checkpoint says.', low=0, role='output'),
        _flag('--decay-milestones', int, [90, 180, 270], 'Epochs of the multistep schedule.', nargs='+', low=0),
        _flag('--decay-epochs', float, 90, 'Epochs between the steps of the step schedule.', low=0.),
        _flag('--warmup-epochs', int, 5, 'Epochs over which the learning rate rises.', low=0),
        _switch('--warmup-prefix', 'Put the warm-up before the schedule instead of into it.'),
        _flag('--cooldown-epochs', int, 0, 'Epochs at --min-lr after the schedule.', low=0),
        _flag('--patience-epochs', int, 10, 'Epochs without gain before the plateau schedule steps.', low=0),
        _flag('--decay-rate --dr', float, 0.1, 'Factor of the step schedules.', low=0.),
    ]),
    ('augmentation and regularisation', [
        _switch('--no-aug', 'Train on resized, centre-cropped images alone.'),
        _flag('--train-crop-mode', str, None, 'How training crops are taken.', choices=('rrc', 'rkrr', 'rkrc')),
        _flag('--scale', float, [0.08, 1.0], 'Range of the area that a random crop keeps.', nargs='+', low=0.,
              high=100.),
        _flag('--ratio', float, [3. / 4., 4. / 3.], 'Range of the aspect ratio of a random crop.', nargs='+', above=0.,
              high=1000.),
        _flag('--hflip', float, 0.5, 'Probability of a left-right flip.', **_UNIT),
        _flag('--vflip', float, 0., 'Probability of an upside-down flip.', **_UNIT),
        _flag('--color-jitter', float, 0.4, 'Strength of the colour jitter.', low=0., high=1000.),
        _flag('--color-jitter-prob', float, None, 'Probability of the colour jitter, always if unset.', **_UNIT),
        _flag('--grayscale-prob', float, None, 'Probability of dropping the colours.', **_UNIT),
        _flag('--gaussian-blur-prob', float, None, 'Probability of blurring.', **_UNIT),
        _flag('--aa', str, None, 'Automatic augmentation, such as rand-m7-mstd0.5-inc1.', check=checks.auto_augment),
        _flag('--aug-repeats', float, 0, 'Repeated augmentation: copies of an image across the processes.', low=0.),
        _switch('--bce-loss', 'Binary cross-entropy over the classes.'),
        _switch('--bce-sum', 'Sum the binary cross-entropy over the classes instead of averaging it.'),
        _flag('--bce-target-thresh', float, None, 'Turn soft targets above this into ones.', **_UNIT),
        _flag('--bce-pos-weight', float, None, 'Weight of the positive term of the binary cross-entropy.', low=0.),
        _flag('--reprob', float, 0., 'Probability of random erasing.', **_UNIT),
        _flag('--remode', str, 'pixel', 'What random erasing fills in.', choices=('const', 'rand', 'pixel')),
        _flag('--recount', int, 1, 'Rectangles of random erasing.', low=1, high=10_000),
        _flag('--mixup', float, 0., 'Alpha of Mixup, 0 for none.', low=0.),
        _flag('--cutmix', float, 0., 'Alpha of CutMix, 0 for none.', low=0.),
        _flag('--cutmix-minmax', float, None, 'Smallest and largest side of CutMix.', nargs='+', **_UNIT),
        _flag('--mixup-prob', float, 1.0, 'Probability of Mixup or CutMix.', **_UNIT),
        _flag('--mixup-switch-prob', float, 0.5, 'Probability of CutMix where both are on.', **_UNIT),
        _flag('--mixup-mode', str, 'batch', 'Whether one draw serves the batch, a pair or an image.',
              choices=('batch', 'pair', 'elem')),
        _flag('--mixup-off-epoch', int, 0, 'Epoch from which Mixup is off, 0 for never.', low=0),
        _flag('--smoothing', float, 0.1, 'Label smoothing.', low=0., high=0.999),
        _flag('--train-interpolation', str, 'random', 'How training images are resized: random, bilinear, bicubic.',
              choices=('random', *_INTERPOLATIONS)),
        _flag('--drop', float, 0., 'Dropout before the classifier.', **_UNIT),
        _flag('--drop-connect', float, None, 'Old name of --drop-path.', **_UNIT),
        _flag('--drop-path', float, None, 'Stochastic depth.', **_UNIT),
        _flag('--drop-block', float, None, 'DropBlock, where the model has it.', **_UNIT),
    ]),
    ('balance and hard examples', [
        _flag('--sampler', str, None, 'Draw images with replacement so that classes come alike often (balanced), or '
              'half of the way (sqrt), or by their effective number of images (effective).',
              choices=('balanced', 'sqrt', 'effective')),
        _flag('--hard-examples', str, None, 'CSV file with the columns image and weight, such as `pst-timm audit` '
              'writes: draw images as often as their weights say, times those of --sampler.', source=True),
        _flag('--logit-adjust', float, None, 'Add this times the logarithm of the share of each class to the logits in '
              'the training loss; 1 is the usual strength.', above=0., high=100.),
        _flag('--hard-loss-fraction', float, None, 'Of each batch, only this share with the largest losses counts.',
              above=0., high=1.),
        _flag('--hard-loss-warmup', int, None, 'Epochs at the start in which all losses count; --warmup-epochs if '
              'unset.', low=0),
        _flag('--rare-aa', str, None, 'Automatic augmentation instead of --aa for the images of rare classes.',
              check=checks.auto_augment),
        _flag('--rare-below', int, None, 'Rare classes have fewer training images than this.', low=1),
    ]),
    ('batch norm', [
        _flag('--bn-momentum', float, None, 'Momentum of the batch norms, where the model takes it.', **_UNIT),
        _flag('--bn-eps', float, None, 'Epsilon of the batch norms, where the model takes it.', low=0.),
        _switch('--sync-bn', 'Batch statistics over all processes (GPU).'),
        _flag('--dist-bn', str, 'reduce', 'How processes agree on the running statistics after each epoch.',
              choices=('', 'reduce', 'broadcast')),
    ]),
    ('moving average of the weights', [
        _switch('--model-ema', 'Keep a moving average of the weights, and validate it.'),
        _switch('--model-ema-force-cpu', 'Keep it on the CPU, without validating it.'),
        _flag('--model-ema-decay', float, 0.9998, 'Decay of the average.', **_UNIT),
        _switch('--model-ema-warmup', 'Let the decay grow from zero.'),
    ]),
    ('sparsity', [
        _flag('--sparsity-weight', float, 0., 'Weight of a penalty (group lasso) on the scales of batch norms, which '
              'empties channels for `pst-timm prune`; 1e-4 to 1e-2 are usual.', low=0.),
    ]),
    ('distillation', [
        _flag('--kd-model-name', str, None, 'Teacher: a timm model with published weights, or a training checkpoint, '
              'run folder, .safetensors file or folder with config.json.', source=True),
        _flag('--kd-distill-type', str, 'logit', 'What the student copies.', choices=('logit', 'feature', 'token')),
        _flag('--kd-loss-type', str, 'kl', 'Loss between the logits.', choices=('kl',)),
        _flag('--distill-loss-weight', float, None, "Weight of the teacher's loss.", low=0.),
        _flag('--task-loss-weight', float, None, "Weight of the labels' loss; the teacher's is one minus it if unset.",
              low=0.),
        _flag('--kd-temperature', float, 4.0, 'Temperature of the logits.', low=1e-6),
        _flag('--kd-student-feature-dim', int, None, "Width of the student's features, found if unset.", low=1),
        _flag('--kd-teacher-feature-dim', int, None, "Width of the teacher's features, found if unset.", low=1),
        _flag('--kd-token-distill-type', str, 'soft', 'Soft or hard labels for the token.', choices=('soft', 'hard')),
    ]),
    ('run', [
        _flag('--seed', int, 42, 'Seed; the random state of each epoch follows from seed, epoch and rank.',
              **_SEED),
        _flag('--worker-seeding', str, 'all', 'Which generators the loader workers seed.', choices=('all', 'part')),
        _flag('--log-interval', int, 50, 'Updates between log lines.', low=1, role='output'),
        _flag('--val-interval', int, 1, 'Epochs between validations.', low=1),
        _flag('--recovery-interval', int, 0, 'Updates between recovery checkpoints, 0 for none.', low=0, role='output'),
        _flag('--checkpoint-hist', int, 10, 'Checkpoints to keep.', low=1, role='output'),
        _flag('-j --workers', int, 4, 'Processes that load images.', low=0, high=1024, role='machine'),
        _switch('--save-images', 'Save the first training images of each log interval, to look at.', role='output'),
        _switch('--pin-mem', 'Pin the memory of the batches.', role='machine'),
        _switch('--no-prefetcher', 'Normalise images in the workers instead of on the device.', role='machine'),
        _flag('--output', str, '', 'Folder for all runs, output/train if empty.', role='output'),
        _flag('--experiment', str, '', 'Name of the folder for this run, from date and model if empty.', role='output',
              check=checks.run_name),
        _flag('--eval-metric', str, 'top1', 'Metric that ranks the checkpoints.', choices=('top1', 'top5', 'loss')),
        _flag('--tta', int, 0, 'Copies of each image in the validation data, whose outputs are averaged.', low=0),
        _switch('--use-multi-epochs-loader', 'Keep the loader workers from epoch to epoch (their random state too).',
                role='machine'),
        _switch('--log-tensorboard', 'Write TensorBoard logs into the run folder.', role='output'),
        _switch('--log-wandb', 'Log to Weights & Biases.', role='output'),
        _flag('--wandb-project', str, None, 'Project, the experiment if unset.', role='output'),
        _flag('--wandb-tags', str, [], 'Tags.', nargs='+', role='output'),
        _flag('--wandb-resume-id', str, '', 'Run to go on with.', role='output'),
    ]),
    ('not supported', [
        *_refused(
            _NAFLEX,
            switches='--naflex-loader --naflex-patchify-channels-first',
            values='--naflex-max-seq-len --naflex-loss-scale',
            lists='--naflex-train-seq-lens --naflex-patch-sizes --naflex-patch-size-probs',
            naflex_max_seq_len=576, naflex_loss_scale='linear', naflex_train_seq_lens=[128, 256, 576, 784, 1024]),
        *_refused(
            _SCHEDULED,
            values='--train-size-schedule --train-size-schedule-spread --train-size-random-mix '
                   '--train-batches-per-epoch=--train-steps-per-epoch --variable-batch-loss-scale',
            lists='--train-img-sizes --train-batch-sizes --train-size-probs',
            train_size_schedule='constant', train_size_schedule_spread=0.65, train_size_random_mix=0.1,
            variable_batch_loss_scale='none'),
        *_refused(_AUGMIX, switches='--jsd-loss --split-bn --resplit', values='--aug-splits'),
        *_refused(_FUSER, values='--fuser'),
    ]),
]

VALIDATE_FLAGS: FlagGroups = [
    ('data', [
        *_DATA,
        _flag('--split', str, 'validation', 'Split, or folder below the data, to evaluate.', role='data'),
        _flag('--num-samples', int, None, 'Samples, where the dataset cannot tell (shards).', low=1, high=MANY,
              role='data'),
        *_BAD_IMAGES,
        _flag('-j --workers', int, 4, 'Processes that load images.', low=0, high=1024, role='machine'),
        _switch('--pin-mem', 'Pin the memory of the batches.', role='machine'),
        _switch('--no-prefetcher', 'Normalise images in the workers instead of on the device.', role='machine'),
    ]),
    ('model', [
        _flag('-m --model', str, None, 'Name of any timm model, or several separated by commas; from the checkpoint if '
              'unset.', role='model'),
        _switch('--pretrained', 'Evaluate the published weights.', role='model'),
        _flag('--checkpoint', str, '', 'Checkpoint to evaluate, or a folder of them.', role='model', source=True),
        _USE_EMA,
        _flag('--num-classes', int, None, "Number of classes, the model's own if unset.", low=1, role='model'),
        _flag('--gp', str, None, 'Global pooling, from the model if unset.', role='model'),
        _flag('--in-chans', int, None, 'Input channels, from the model if unset.', low=1, role='model'),
        _flag('--model-kwargs', dict, {}, 'Arguments for the model, such as topk=8.', nargs='*', role='model'),
        _switch('--reparam', 'Fold convolution and batch norm pairs first.', role='model'),
        _switch('--test-pool', 'Pool over larger inputs as the older timm models expect.', role='model'),
        _flag('--device-modules', str, None, 'Python packages to import first, such as pst_timm for its models.',
              nargs='+', role='model'),
    ]),
    ('preprocessing', [
        *_PREPROCESSING,
        _flag('-b --batch-size', int, 256, 'Images per step.', low=1, role='machine'),
        _switch('--use-train-size', "Evaluate at the model's training size where it has a larger test size.",
                role='preprocessing'),
        _flag('--crop-mode', str, None, 'How the centre crop is taken.', choices=('squash', 'border', 'center'),
              role='preprocessing'),
        _flag('--crop-border-pixels', int, None, 'Pixels to cut from each edge first.', low=0, role='preprocessing'),
    ]),
    ('device and precision', [
        *_PRECISION,
        *_MACHINE,
        _flag('--num-gpu', int, 1, 'GPUs to spread each batch over.', low=1, role='machine'),
        _switch('--aot-autograd', 'Compile through AOTAutograd, without a code generator.', role='machine'),
    ]),
    ('metrics', [
        _flag('--real-labels', str, '', "ImageNet-ReaL labels: a JSON file, or 'default' for timm's own copy.",
              role='metrics'),
        _flag('--valid-labels', str, '', 'Text file with the class indices that count.', role='metrics'),
        _flag('--metrics-avg', str, None, 'Also precision, recall and F1, averaged in this way.',
              choices=('micro', 'macro', 'weighted'), role='metrics'),
        _switch('--calibrate', 'Also the expected calibration error, and with the temperature of least loss.',
                role='metrics'),
        _switch('--answers', 'Also which images are classified right, as hexadecimal digits of four images each.',
                role='metrics'),
        _flag('--topk-sweep', int, None, 'Evaluate fine attention with each of these topk, a run for each fusion.',
              nargs='+', low=0, role='metrics'),
    ]),
    ('run', [
        _flag('--results-file', str, '', 'File for the results.', role='output'),
        _flag('--results-format', str, 'csv', 'Format of the file.', choices=('csv', 'json'), role='output'),
        _flag('--log-freq', int, 10, 'Batches between log lines.', low=1, role='output'),
        _switch('--retry', 'Halve the batch and try again when the memory is not enough.', role='machine'),
        _flag('--seed', int, 42, 'Seed.', **_SEED),
    ]),
    ('not supported', [
        *_refused(_NAFLEX, switches='--naflex-loader', values='--naflex-max-seq-len', naflex_max_seq_len=576),
        *_refused(_FUSER, values='--fuser'),
        *_refused(_TF, switches='--tf-preprocessing'),
    ]),
]


def keys_with_role(*roles: str, groups: FlagGroups = TRAIN_FLAGS) -> List[str]:
    """Keys of the flags with one of these roles (all roles if none is named), in the order of --help."""
    return [
        flag.key for _, flags in groups for flag in flags if not flag.refused and (not roles or flag.role in roles)]


def shared_keys(*roles: str) -> List[str]:
    """Keys with one of these roles in training and in validation: what both take in the same words."""
    evaluation = set(keys_with_role(*roles, groups=VALIDATE_FLAGS))
    return [key for key in keys_with_role(*roles) if key in evaluation]


def recipe(args: Union[Namespace, Mapping[str, Any]], groups: FlagGroups = TRAIN_FLAGS) -> Dict[str, Any]:
    """What one needs, beside the data, to train the same model again.

    Args:
        args: Arguments of a training run, as they were given: a run resolves the learning rate and others in its own.
        groups: The flags of its command.

    Returns:
        By key, the flags about model, preprocessing and training that differ from their defaults, and always the
        model; of a file of this machine the name alone, so that a repeated run asks for it and does not go without.
    """
    from pst_timm.checkpoints.fetching import is_published

    values = args if isinstance(args, Mapping) else vars(args)
    flags = [flag for _, flags in groups for flag in flags]
    chosen = set(keys_with_role('model', 'preprocessing', 'recipe', groups=groups))
    found = {}
    for flag in flags:
        value = values.get(flag.key, flag.default)
        unset = value == flag.default or (flag.source and not value)
        if flag.key not in chosen or (unset and flag.key != 'model'):
            continue
        found[flag.key] = Path(value).name if flag.source and not is_published(value) else value
    return found
