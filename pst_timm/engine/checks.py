"""What is wrong with the values of single flags that timm and torch would stumble over in the middle of the work.

Each function raises a `PSTError` that says what was expected; what they ask is loaded when they are called.
"""
from pathlib import PurePath

from pst_timm.utils.errors import PSTError, did_you_mean

__all__ = ['auto_augment', 'compile_backend', 'compile_mode', 'image_mode', 'optimizer', 'run_name']


def auto_augment(policy: str) -> None:
    """Make sure that timm makes an automatic augmentation of a text, and of all of it."""
    from pst_timm.data.augment import check_policy

    if policy:
        check_policy(policy)


def compile_backend(name: str) -> None:
    """Make sure that torch.compile has a backend."""
    from torch.compiler import list_backends

    known = list_backends(exclude_tags=())
    if name not in known:
        raise PSTError(f'torch has no compiler {name!r}.{did_you_mean(name, known)} It has {", ".join(known)}.')


def compile_mode(name: str) -> None:
    """Make sure that inductor has a mode."""
    from torch._inductor import list_mode_options

    known = list(list_mode_options())
    if name not in known:
        raise PSTError(f'expected one of {", ".join(known)}, got {name!r}.')


def image_mode(name: str) -> None:
    """Make sure that Pillow knows a mode, such as RGB."""
    channels_of_mode(name)


def channels_of_mode(name: str) -> int:
    """Channels of an image of a mode of Pillow."""
    from PIL import Image

    try:
        return Image.getmodebands(name)
    except KeyError:
        raise PSTError(f'Pillow has no images of the mode {name!r}; RGB and L are the usual ones.') from None


def optimizer(name: str) -> None:
    """Make sure that timm has an optimizer."""
    from timm.optim import list_optimizers

    known = list_optimizers()
    first, _, last = name.lower().rpartition('_')
    if first not in ('', 'lookahead') or last not in known:
        raise PSTError(
            f'unknown optimizer {name!r}.{did_you_mean(last, known)} timm.optim.list_optimizers() lists all.')


def run_name(name: str) -> None:
    """Make sure that the folder of a run lies below --output."""
    path = PurePath(name)
    if path.is_absolute() or '..' in path.parts or '\0' in name:
        raise PSTError(f'{name!r} is a folder outside --output: give a name, and the place with --output.')
