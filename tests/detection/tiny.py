"""Easy boxes and small detectors, for runs of seconds."""
import json
from pathlib import Path
from typing import Any, Dict

import numpy as np
import torch
from PIL import Image

from pst_timm.detection import create_detector
from pst_timm.detection.flags import train_args, validate_args

CLASSES = ('red', 'green')
# neck and heads as small as they can be
SMALL = dict(trunk='test_resnet', neck_width=64, head_convs=1, img_size=64)
RUN = dict(
    **SMALL, batch_size=4, workers=0, device='cpu', epochs=2, opt='adamw', lr=0.003, warmup_epochs=0, log_interval=1,
    hflip=0.5, vflip=0.5, scale_jitter=[0.8, 1.25])


def write_squares(root: Path, counts: Dict[str, int], size: int = 64) -> Path:
    """A folder of COCO's: one or two squares in each image, whose colours tell their classes, and now and then none."""
    for number, (split, count) in enumerate(counts.items()):
        folder = root / split
        folder.mkdir(parents=True)
        images, annotations = [], []
        for i in range(count):
            random = np.random.default_rng([number, i])
            pixels = random.integers(0, 60, (size, size, 3), dtype=np.uint8)
            for k in range(0 if i % 6 == 5 else 1 + i % 2):
                side = int(random.integers(12, 24))
                x, y = (int(v) for v in (random.integers(0, size // 2 - side // 2) + k * size // 2, random.integers(
                    0, size - side)))
                x, label = min(x, size - side), int(random.integers(0, 2))
                pixels[y:y + side, x:x + side, label] = 220
                annotations.append(dict(
                    id=len(annotations) + 1, image_id=i + 1, category_id=label + 1, bbox=[x, y, side, side],
                    area=side * side, iscrowd=0))
            Image.fromarray(pixels).save(folder / f'{i}.png')
            images.append(dict(id=i + 1, file_name=f'{i}.png', width=size, height=size))
        content = dict(images=images, annotations=annotations, categories=[
            dict(id=k + 1, name=name) for k, name in enumerate(CLASSES)])
        (root / 'annotations').mkdir(exist_ok=True)
        (root / 'annotations' / f'instances_{split}.json').write_text(json.dumps(content))
    return root


def tiny_args(data: Path, output: Path, **values: Any) -> Any:
    """Arguments of a run of seconds."""
    return train_args(**{**RUN, 'data_dir': str(data), 'output': str(output), 'experiment': 'run', **values})


def tiny_validate_args(data: Path, checkpoint: Path, **values: Any) -> Any:
    """Arguments of an evaluation of seconds."""
    return validate_args(**{
        'data_dir': str(data), 'checkpoint': str(checkpoint), 'device': 'cpu', 'workers': 0, 'batch_size': 4, **values})


def small(kind: str = 'fcos', neck: str = 'pst', **values: Any) -> torch.nn.Module:
    """A detector that is made and run in no time."""
    kwargs = {**SMALL, 'num_classes': 2, **values}
    if kind != 'fcos':
        kwargs.pop('head_convs')
    return create_detector(kind, neck=neck, **kwargs)


def batch(size: int = 64, count: int = 2) -> tuple:
    """Images with targets; the last has no box."""
    images = [torch.rand(3, size, size - 16 * (i % 2)) for i in range(count)]
    boxes = [torch.tensor([[4., 6., 30., 28.], [20., 30., 44., 60.]]) for _ in range(count - 1)]
    targets = [dict(boxes=b, labels=torch.tensor([0, 1])) for b in boxes]
    return images, [*targets, dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))]
