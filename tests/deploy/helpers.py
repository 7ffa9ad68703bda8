"""A cheap model and a dear one of the same classes, and images of them."""
from pathlib import Path

import torch

from pst_timm.checkpoints.folder import save_folder
from tests.checkpoints.helpers import build
from tests.engine.helpers import write_images
from tests.review.helpers import CLASSES

__all__ = ['save_pair']


def save_pair(folder: Path) -> Path:
    """Write the models `small` and `large`, whose answers differ from image to image, and `data`."""
    for name, seed in (('small', 0), ('large', 5)):
        torch.manual_seed(seed)
        model = build()
        model.pretrained_cfg.update(input_size=(3, 64, 64), crop_pct=1., label_names=list(CLASSES))
        with torch.no_grad():
            model.fc.weight.mul_(4)
            model.fc.bias.zero_()
        save_folder(model, folder / name)
    write_images(folder / 'data', {'train': 40, 'validation': 12})
    return folder
