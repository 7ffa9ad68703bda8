"""Outputs of a seeded model as they were recorded: a silent numeric change anywhere in it is caught.

`python -m tests.models.test_regression` records them again, for a change of the numbers that is meant.
"""
import json
from pathlib import Path

import pytest
import torch

from tests.helpers import relative_error
from tests.models.helpers import build, images

RECORD = Path(__file__).with_name('regression.json')
CASES = {
    'coarse': dict(),
    'gate': dict(topk=3),
    'joint': dict(topk=3, fine_fusion='joint'),
    'coarse, output stride 16': dict(output_stride=16),
    'gate, output stride 16': dict(topk=3, output_stride=16),
    'joint, two blocks': dict(topk=3, fine_fusion='joint', pst_depth=2),
    'gate, another trunk': dict(topk=3, name='backbone_pst', trunk='test_efficientnet'),
    'coarse, a trunk that rounds down': dict(name='backbone_pst', trunk='test_convnext'),
}


@torch.no_grad()
def outputs(case):
    """Logits, and the mean of every channel of the last two levels, in float64."""
    model = build(num_classes=8, **CASES[case]).double()
    x = images((97, 70), batch=1).double()
    _, levels = model.forward_intermediates(x)
    return torch.cat([model(x).flatten(), *(level.mean(dim=(2, 3)).flatten()[:8] for level in levels[-2:])])


@pytest.mark.parametrize('case', CASES)
def test_outputs_are_the_recorded_ones(case):
    recorded = torch.tensor(json.loads(RECORD.read_text())[case], dtype=torch.float64)
    assert relative_error(outputs(case), recorded) < 1e-4


def test_the_recorded_cases_differ():
    """A record in which fine attention did nothing would guard nothing."""
    recorded = [torch.tensor(values) for values in json.loads(RECORD.read_text()).values()]
    for i, a in enumerate(recorded):
        assert all(relative_error(a, b) > 1e-3 for b in recorded[:i])


if __name__ == '__main__':
    RECORD.write_text(json.dumps({case: [round(v, 8) for v in outputs(case).tolist()] for case in CASES}, indent=0))
