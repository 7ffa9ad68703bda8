"""The whole way of a model on a small scale: images, training, validation, a file for others, a prediction, pictures.

    python -m scripts.demo

trains `resnet18_pst` from scratch on the handwritten digits that come with scikit-learn (1,797 real scans). Ctrl-C
stops it; with `--resume auto` it goes on.
"""
import argparse
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.utils import setup_default_logging

from pst_timm.checkpoints import load_model
from pst_timm.checkpoints.folder import save_folder
from pst_timm.commands.common import fail
from pst_timm.data.images import open_image
from pst_timm.engine import Interrupted, PSTError, parse_train_args, parse_validate_args, train, validate
from pst_timm.utils.tables import format_table
from pst_timm.visualize.view import visualize

__all__ = ['classify', 'command_to_go_on', 'main', 'run_demo', 'write_digits']

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / 'configs' / 'digits.yaml'
TARGET = 97.0  # top-1 in percent
TOPK = 2  # of the 2 x 2 coarse tokens at 64 px


def write_digits(folder: Path, size: int = 64, seed: int = 0) -> Tuple[int, int]:
    """Write scikit-learn's digits as an image folder, 80% for training and 20% for validation, alike in all classes.

    Args:
        folder: Where to write `train/0/*.png` and so on.
        size: Height and width of the images; the scans have 8 x 8 pixels.
        seed: Seed of the split.

    Returns:
        Number of training and validation images.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = (digits.images / digits.images.max() * 255).round().astype('uint8')
    train_ids, val_ids = train_test_split(
        range(len(pixels)), test_size=0.2, random_state=seed, stratify=digits.target)
    if folder.exists():
        shutil.rmtree(folder)
    for split, ids in (('train', train_ids), ('validation', val_ids)):
        for label in digits.target_names:
            (folder / split / str(label)).mkdir(parents=True)
        for i in ids:
            image = Image.fromarray(pixels[i]).resize((size, size), Image.Resampling.BICUBIC)
            image.save(folder / split / str(digits.target[i]) / f'{i:04d}.png')
    return len(train_ids), len(val_ids)


def classify(model: torch.nn.Module, image: Path) -> Tuple[str, float]:
    """Label and probability of an image.

    Args:
        model: A model from a folder that names its classes, in inference mode; it knows the names of its classes.
        image: The image file.
    """
    transform = create_transform(**resolve_data_config(model=model))
    with torch.inference_mode():
        probabilities = model(transform(open_image(image))[None]).softmax(dim=-1)[0]
    best = int(probabilities.argmax())
    return model.pretrained_cfg['label_names'][best], probabilities[best].item()


def validate_settings(args: argparse.Namespace, checkpoint: Path) -> List[Dict[str, Any]]:
    """Evaluate a checkpoint coarse and with fine attention, both fusions; one row of results each.

    Args:
        args: Arguments that the checkpoint was trained with.
        checkpoint: The checkpoint, which knows architecture, classes and preprocessing.
    """
    words = ['--data-dir', args.data_dir, '--checkpoint', str(checkpoint), '--workers', str(args.workers)]
    rows = []
    for name, kwargs in (
            ('coarse', []),
            (f'fine, topk={TOPK}, gate', [f'topk={TOPK}', 'fine_fusion=gate']),
            (f'fine, topk={TOPK}, joint', [f'topk={TOPK}', 'fine_fusion=joint']),
    ):
        command = words + (['--model-kwargs', *kwargs] if kwargs else [])
        announce('validate.py', command)
        [results] = validate(parse_validate_args(command))
        rows.append(dict(attention=name, top1=results['top1'], top5=results['top5'], loss=results['loss']))
    return rows


def announce(script: str, words: Sequence[str]) -> None:
    """Print the command that does by hand what the demo does next."""
    print(f'\n$ python {script} {shlex.join(words)}', flush=True)


def command_to_go_on(extra: Sequence[str] = ()) -> str:
    """The command that goes on with a demo that was stopped.

    Args:
        extra: Further flags that it was started with.
    """
    python = Path(sys.executable)
    # as a person would type it; not resolved, since the python of an environment is a link out of it
    python = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
    words = [str(python), '-m', 'scripts.demo', *extra]
    return shlex.join(words if '--resume' in words else [*words, '--resume', 'auto'])


def run_demo(extra: Sequence[str] = ()) -> float:
    """Run the demo; writes to `output/` in the current folder, prints the table and returns the top-1.

    Args:
        extra: Further flags for the training, such as `--epochs 1`.

    Raises:
        Interrupted: If it was stopped while it trained.
        PSTError: If a flag is wrong, or something could not be written.
    """
    began = time.perf_counter()
    data, output = Path('output/digits'), Path('output/demo')
    sizes = write_digits(data)
    print(f'Digits: {sizes[0]} training and {sizes[1]} validation images in {data}.')

    command = ['--config', str(CONFIG), '--output', str(output.parent), '--experiment', output.name, *extra]
    announce('train.py', command)
    args = parse_train_args(command)
    if not args.resume and Path(args.output, args.experiment) == output:
        args.overwrite = True  # an earlier demo, which this one must not go on with
    trained = time.perf_counter()
    result = train(args)
    trained = time.perf_counter() - trained
    output = result.output_dir

    rows = validate_settings(args, result.best_checkpoint)

    folder = output / f'{args.model}_digits'
    save_folder(load_model(result.best_checkpoint), folder, [str(i) for i in range(10)])
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    image = sorted(data.glob('validation/7/*.png'))[0]
    label, probability = classify(model, image)
    [picture] = visualize(image, model, output / 'attention.png', overwrite=True, topk=TOPK)

    print(f'\n{image} is a {label} (probability {probability:.3f}).\n')
    decimals = dict(top1=2, top5=2, loss=3)
    print(format_table([{k: f'{v:.{decimals[k]}f}' if k in decimals else v for k, v in r.items()} for r in rows]))
    print()
    print(format_table([
        dict(what='top-1, coarse', result=f'{rows[0]["top1"]:.2f}% (at least {TARGET:.0f}% wanted)'),
        dict(what='training', result=f'{trained:.0f} s, {len(result.history)} epochs'),
        dict(what='all together', result=f'{time.perf_counter() - began:.0f} s'),
        dict(what='picture: training', result=output / 'curve.png'),
        dict(what='picture: attention', result=picture),
        dict(what='checkpoint', result=result.best_checkpoint),
        dict(what='weights', result=folder / 'model.safetensors'),
        dict(what='load them', result=f"timm.create_model('local-dir:{folder}', pretrained=True)"),
    ]))
    return rows[0]['top1']


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the demo; returns 0 if the model is as good as it should be, 75 if it was stopped."""
    parser = argparse.ArgumentParser(
        prog='python -m scripts.demo', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='Further flags go to the training, as in --epochs 1.')
    _, extra = parser.parse_known_args(argv)
    setup_default_logging()
    try:
        top1 = run_demo(extra)
    except (Interrupted, KeyboardInterrupt):
        print(f'\nStopped; to go on: {command_to_go_on(extra)}', file=sys.stderr)
        return Interrupted.exit_code
    except PSTError as e:
        return fail(parser.prog, e)
    if top1 < TARGET:
        print(f'The model reached {top1:.2f}% top-1, less than {TARGET:.0f}%.', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
