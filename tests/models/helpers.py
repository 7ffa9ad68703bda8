"""Models and inputs for the tests of the models."""
import re

import pytest
import timm
import torch

import pst_timm  # noqa: F401, registers the models
from tests.helpers import randomize

# `backbone_pst` stands for any trunk, and is as it is the first of these
MODELS = timm.list_models('*_pst', exclude_filters='backbone_pst')
BACKBONES = timm.list_models('*_pst', module='backbone_pst', exclude_filters='backbone_pst')
RESNETS = [name for name in MODELS if name not in BACKBONES]
# what takes seconds runs for these with -m slow alone
LARGE = (
    'efficientnet_b0_pst', 'regnety_008_pst', 'resnet26_pst', 'resnet34_pst', 'resnet50_pst', 'resnet101_pst',
    'resnext50_32x4d_pst')
SOME = [pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in MODELS]
TINY = 'test_resnet_pst'
# odd levels on the way: C4 is 7x5 over a C5 of 4x3
ODD_SIZE = (105, 75)
LEVELS = 5


def build(name=TINY, random=True, **kwargs):
    """A model in eval mode, randomised (batch-norm statistics and gate included) unless told otherwise."""
    model = timm.create_model(name, **kwargs)
    return (randomize(model) if random else model).eval()


def features_of(model, **kwargs):
    """A features_only model with the weights of a full one."""
    features = timm.create_model(model.pretrained_cfg['architecture'], features_only=True, **kwargs).eval()
    state = model.state_dict()
    features.load_state_dict({k: state[re.sub('^(model|body|graph_module)[.]', '', k)] for k in features.state_dict()})
    return features


def images(size=ODD_SIZE, batch=2, chans=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, chans, *size, generator=generator)


def unused(model):
    """Names of the trainable parameters that have no gradient."""
    return {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
