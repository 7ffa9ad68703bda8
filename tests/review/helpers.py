"""A small classifier and images for the reviews."""
from pathlib import Path

import torch

from tests.checkpoints.helpers import build, run_args, save_checkpoint
from tests.engine.helpers import write_images

__all__ = ['CLASSES', 'make_data', 'make_source']

CLASSES = ('class0', 'class1', 'class2')  # what `write_images` calls them


def make_source(folder: Path, names=CLASSES) -> Path:
    """A training checkpoint of a small classifier that knows its preprocessing and class names."""
    facts = {
        'arch': 'test_resnet_pst', 'model_args': {},
        'pretrained_cfg': {'input_size': [3, 64, 64], 'num_classes': 3, 'crop_pct': 1.0, **(
            {'label_names': list(names)} if names else {})}}
    torch.manual_seed(0)
    return save_checkpoint(folder / 'last.pth.tar', build(), args=run_args(), facts=facts)


def make_data(folder: Path, **counts: int) -> Path:
    """Class folders of small images: splits with so many images a class."""
    return write_images(folder, counts or {'train': 4, 'validation': 3})
