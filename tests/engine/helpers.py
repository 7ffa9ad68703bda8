"""Small data and short runs for the tests of the engine."""
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, Optional

import numpy as np
import torch
from PIL import Image

from pst_timm.engine import train_args, validate_args

ROOT = Path(__file__).resolve().parents[2]

TINY = dict(
    model='test_resnet_pst', num_classes=3, img_size=48, batch_size=8, workers=0, device='cpu', epochs=2, opt='sgd',
    lr=0.05, warmup_epochs=0, hflip=0., color_jitter=0., smoothing=0., log_interval=1, device_modules=['pst_timm'])


def tiny_image(label: int, seed: int, size: int = 32) -> Image.Image:
    """Noise with a bright band whose position tells the class."""
    pixels = np.random.default_rng([label, seed]).integers(0, 80, (size, size, 3), dtype=np.uint8)
    pixels[label * 10:label * 10 + 8] += 150
    return Image.fromarray(pixels)


def write_images(root: Path, counts: Dict[str, int], classes: int = 3) -> Path:
    """Write an image folder with so many images per class in each split."""
    for i, (split, count) in enumerate(counts.items()):
        for label in range(classes):
            folder = root / split / f'class{label}'
            folder.mkdir(parents=True)
            for n in range(count):
                tiny_image(label, 100 * i + n).save(folder / f'{n}.png')
    return root


def tiny_train_args(data: Path, output: Path, **values: Any) -> Namespace:
    """Arguments of a run of seconds."""
    return train_args(**{**TINY, 'data_dir': str(data), 'output': str(output), 'experiment': 'run', **values})


def tiny_validate_args(data: Path, **values: Any) -> Namespace:
    """Arguments of an evaluation of seconds."""
    keys = ('model', 'num_classes', 'img_size', 'batch_size', 'workers', 'device', 'device_modules')
    return validate_args(**{**{k: TINY[k] for k in keys}, 'data_dir': str(data), **values})


def as_words(args: Namespace, *keys: str) -> list:
    """Some arguments as words of a command line."""
    words = []
    for key in keys:
        value = getattr(args, key)
        words += [f'--{key.replace("_", "-")}', *map(str, value if isinstance(value, list) else [value])]
    return words


def script_env(**extra: str) -> Dict[str, str]:
    """Environment of a script: one thread, the repository on the path, no process group of the caller."""
    env = {k: v for k, v in os.environ.items() if k not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')}
    return dict(env, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', CI='true', **extra)


def run_script(name: str, *words: Any, cwd: Optional[Path] = None, **extra_env: str) -> subprocess.CompletedProcess:
    """Run a script of the repository as a user would, without a terminal."""
    return subprocess.run(
        [sys.executable, str(ROOT / name), *map(str, words)], cwd=cwd or ROOT, env=script_env(**extra_env),
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)


def load_weights(checkpoint: Path, key: str = 'state_dict') -> Dict[str, torch.Tensor]:
    """The weights in a checkpoint, which must hold nothing but data."""
    with torch.serialization.safe_globals([Namespace]):
        return torch.load(checkpoint, weights_only=True)[key]


def assert_same_weights(a: Dict[str, torch.Tensor], b: Dict[str, torch.Tensor]) -> None:
    """Bitwise equality."""
    assert a.keys() == b.keys()
    different = [k for k in a if not torch.equal(a[k], b[k])]
    assert not different, f'{len(different)} of {len(a)} weights differ, the first {different[0]}'
