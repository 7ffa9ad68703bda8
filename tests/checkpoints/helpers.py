"""Small trained-looking models in the forms in which runs leave them."""
import argparse
from pathlib import Path

import timm
import torch

import pst_timm  # registers the models  # noqa: F401
from tests.helpers import randomize


def build(**kwargs):
    kwargs = {'num_classes': 3, **kwargs}
    return randomize(timm.create_model('test_resnet_pst', **kwargs)).eval()


def images(channels=3, size=64):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, x=None):
    return model.eval()(images() if x is None else x)


def run_args(**values):
    return argparse.Namespace(**{
        'model': 'test_resnet_pst', 'img_size': 64, 'crop_pct': 1.0, 'mean': [0.5], 'std': [0.25],
        'interpolation': 'bilinear', 'model_kwargs': {}, 'num_classes': 3, 'data_dir': '/secret/place/scans',
        'output': '/secret/place/output', 'opt': 'adamw', 'lr': 0.003, 'epochs': 2, 'batch_size': 32, 'seed': 42,
        'eval_metric': 'top1', 'model_ema': False, **values,
    })


def save_checkpoint(path: Path, model, ema=None, **entries):
    content = {
        'arch': 'test_resnet_pst', 'state_dict': model.state_dict(), 'epoch': 1, 'version': 2, 'metric': 71.5,
        'args': run_args(), 'optimizer': {'state': {}}, **entries,
    }
    if ema is not None:
        content['state_dict_ema'] = ema.state_dict()
    torch.save(content, path)
    return path


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)
