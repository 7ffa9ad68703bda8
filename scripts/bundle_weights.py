"""Train the weights that come with `test_resnet_pst`, measure them and put them into the package.

    python -m scripts.bundle_weights

It writes the weights and, beside them, the accuracy that the table of models shows.
"""
import argparse
import sys
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

from timm.utils import setup_default_logging

import pst_timm
from pst_timm.checkpoints import convert
from pst_timm.engine import parse_train_args, train, validate, validate_args
from pst_timm.models.resnet_pst import WEIGHTS
from pst_timm.utils.files import write_json
from scripts.demo import write_digits

__all__ = ['CONFIG', 'bundle', 'main', 'measure']

CONFIG = Path(pst_timm.__file__).resolve().parents[1] / 'configs' / 'test_digits.yaml'
NAME = 'test_resnet_pst.digits'


def measure(data: Path, checkpoint: Path, **kwargs: Any) -> Dict[str, Any]:
    """Accuracy of a checkpoint on the held-out digits.

    Args:
        data: Folder that `write_digits` wrote.
        checkpoint: The checkpoint.
        kwargs: Further arguments of `validate`.
    """
    [results] = validate(validate_args(
        model=NAME.split('.')[0], data_dir=str(data), checkpoint=str(checkpoint), num_classes=10, img_size=64,
        crop_pct=1.0, workers=1, device_modules=['pst_timm'], **kwargs))
    return results


def bundle(folder: Path, extra: Sequence[str] = ()) -> Dict[str, Any]:
    """Train, measure, and write weights and record.

    Args:
        folder: Where to write NAME.safetensors and NAME.json.
        extra: Further flags for the training.

    Returns:
        The record.
    """
    args = parse_train_args(['--config', str(CONFIG), '--output', 'output', '--experiment', NAME, *extra])
    data = Path(args.data_dir)
    _, images = write_digits(data, args.img_size)
    train(args)
    # the last epoch, not the best one: the held-out images choose nothing
    results = measure(data, convert(Path('output', NAME, 'last.pth.tar'), folder / f'{NAME}.safetensors').path)
    record = dict(
        weights=NAME,
        data_set="scikit-learn's digits, 20% held out",
        images=images,
        img_size=results['img_size'],
        top1=results['top1'],
        top5=results['top5'],
        loss=results['loss'],
        command='python -m scripts.bundle_weights',
    )
    write_json(folder / f'{NAME}.json', record)
    return record


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Train and write the weights; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog='python -m scripts.bundle_weights', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--folder', type=Path, default=WEIGHTS, help='where to write (default: into the package)')
    args, extra = parser.parse_known_args(argv)
    setup_default_logging()
    args.folder.mkdir(parents=True, exist_ok=True)
    for key, value in bundle(args.folder, extra).items():
        print(f'{key}: {value}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
