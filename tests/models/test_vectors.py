"""The published vectors of everything that follows the trunk, where they are at hand."""
import pytest
import torch
import torch.nn as nn
from timm.models.resnet import BasicBlock

from pst_timm.models import ResNetPST
from tests.helpers import PARITY, read_parity, relative_error


class Constant(nn.Module):
    """A stage that returns a given map."""

    def __init__(self, out: torch.Tensor):
        super().__init__()
        self.out = out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out


@pytest.mark.skipif(not PARITY.is_dir(), reason='the published vectors are not at hand')
def test_fusion_and_head_reproduce_the_published_vectors():
    weights, tensors, metadata = read_parity('fusion_head')
    width, c4, c5 = (int(metadata[key]) for key in ('width', 'c4', 'c5'))
    model = ResNetPST(
        BasicBlock, (1, 1, 1, 1), channels=(8, 16, c4, c5), pst_width=width,
        num_classes=int(metadata['num_classes'])).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    trunk = ('conv1.', 'bn1.', 'layer')
    assert all(k.startswith(trunk) or k.endswith('num_batches_tracked') for k in missing)
    model.layer3, model.layer4 = Constant(tensors['c4']), Constant(tensors['c5'])
    x = torch.zeros(2, 3, 224, 224)
    topks = sorted(int(key.removeprefix('logits_k')) for key in tensors if key.startswith('logits_k'))
    assert len(topks) >= 2
    with torch.no_grad():
        for topk in topks:
            model.set_topk(topk, fusion='gate')
            final, levels = model.forward_intermediates(x)
            assert relative_error(levels[3][:, :width], tensors[f'p_k{topk}']) < 1e-5
            assert relative_error(final, tensors[f'fused_k{topk}']) < 1e-5
            assert relative_error(model(x), tensors[f'logits_k{topk}']) < 1e-5
