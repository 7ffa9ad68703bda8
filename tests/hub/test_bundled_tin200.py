"""The weights of Tiny ImageNet in the package: what is said of them is what was measured on these very ones."""
import hashlib
import json
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.data import ImageNetInfo
from timm.models import get_pretrained_cfg

from pst_timm.checkpoints import load_model
from pst_timm.checkpoints.facts import as_plain
from pst_timm.cli import main
from pst_timm.engine import parse_train_args
from pst_timm.engine.flags import recipe
from pst_timm.models.digest import digest_note
from pst_timm.models.resnet_pst import WEIGHTS
from scripts.bundle_tin200 import CONFIGS, RECORDS, STAGES, card
from tests.helpers import relative_error

ROOT = Path(__file__).parents[2]
NAME = 'resnet18_pst.tin200'
PATH = WEIGHTS / f'{NAME}.safetensors'
RECORD = json.loads((RECORDS / f'{NAME}.json').read_text())
COARSE, TWIN = RECORD['metrics'][0], RECORD['twin']


@pytest.fixture(scope='module')
def model():
    return timm.create_model('resnet18_pst', pretrained=True).eval()


def test_the_record_is_of_these_weights_and_their_twins():
    for path, told in ((PATH, RECORD), (RECORDS / f'{TWIN["weights"]}.safetensors', TWIN)):
        weights = load_file(path)
        assert told['sha256'] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert told['notes'] == digest_note(weights) and told['bytes'] == path.stat().st_size < 30e6
        assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float16}
    cfg = get_pretrained_cfg('resnet18_pst')
    assert (cfg.tag, Path(cfg.file), cfg.notes) == ('tin200', PATH, (RECORD['notes'],))


def test_record_and_weights_tell_the_same_preprocessing(model):
    cfg, stored = model.pretrained_cfg, load_model(PATH).pretrained_cfg
    sizes = ('input_size', 'test_input_size', 'pool_size', 'num_classes')
    for key in (*sizes, 'crop_pct', 'interpolation', 'mean', 'std'):
        assert cfg[key] == stored[key], key
    assert (cfg['input_size'][1], cfg['test_input_size'][1]) == (RECORD['img_size'], RECORD['test_size'])
    assert list(cfg['label_names']) == list(stored['label_names']) == list(RECORD['top1_by_class'])
    assert cfg['label_descriptions'] == stored['label_descriptions']


def test_classes_are_those_of_the_folders_and_have_words(model):
    names, words = list(model.pretrained_cfg['label_names']), model.pretrained_cfg['label_descriptions']
    assert names == sorted(names) and len(names) == model.num_classes == 200
    known = ImageNetInfo()
    assert words == {name: known.label_name_to_description(name) for name in names}


def test_numbers_fit_together():
    assert [(row['img_size'], row['topk']) for row in RECORD['metrics']] == [
        (160, 0), (160, 2), (160, 2), (160, 8), (160, 8), (128, 0)]
    assert RECORD['images'] == 10_000
    assert sum(RECORD['top1_by_class'].values()) / 200 == pytest.approx(COARSE['top1'], abs=0.01)
    assert TWIN['difference'] == pytest.approx(COARSE['top1'] - TWIN['top1'], abs=0.01)
    assert TWIN['over_images'][0] < TWIN['difference'] < TWIN['over_images'][1]
    for row in (*RECORD['metrics'], TWIN):
        assert row['top1'] < row['top5'] < 100 and 0 < row['ece'] < 1


def test_the_recipes_are_those_of_the_stages():
    files = [CONFIGS / f'{name}.yaml' for name in STAGES]
    recipes = [recipe(parse_train_args(['--config', str(path), '--data-dir', '.'])) for path in files]
    told = [{k: v for k, v in stage['recipe'].items() if not k.endswith('_checkpoint')} for stage in RECORD['stages']]
    assert told == [as_plain(found) for found in recipes]
    assert [stage['recipe'].get('initial_checkpoint') or stage['recipe'].get('trunk_checkpoint')
            for stage in RECORD['stages']] == [None] + ['last.pth.tar'] * (len(STAGES) - 1)


def test_the_card_is_made_from_the_record_and_the_weights():
    assert card(RECORD, PATH) == (RECORDS / f'{NAME}.md').read_text()


def test_list_and_readme_tell_the_record(capsys):
    assert main(['list']) == 0
    shown = capsys.readouterr().out
    assert f'{NAME}, in the package: {COARSE["top1"]:.2f}% top-1 of 10000 images' in shown
    row = re.search(rf'^\| `{NAME}` \|.*', (ROOT / 'README.md').read_text(), re.M)[0]
    at_128 = RECORD['metrics'][-1]
    assert f'| {COARSE["top1"]:.2f} / {COARSE["top5"]:.2f} | {at_128["top1"]:.2f} / {at_128["top5"]:.2f} |' in row
    assert f'{RECORD["bytes"] / 1e6:.1f} MB' in row


def test_they_adapt_as_timms_do(model):
    x = torch.rand(1, 1, 64, 64)
    other = timm.create_model(NAME, pretrained=True, num_classes=5, in_chans=1).eval()
    levels = timm.create_model('resnet18_pst', pretrained=True, features_only=True).eval()
    with torch.no_grad():  # weights of three equal channels are added up
        features = model.forward_features(x.expand(-1, 3, -1, -1))
        assert relative_error(other.forward_features(x), features) < 1e-2
        assert other(x).shape == (1, 5)
        expected = model.forward_intermediates(x.expand(-1, 3, -1, -1), intermediates_only=True)
        for level, same in zip(levels(x.expand(-1, 3, -1, -1)), expected, strict=True):
            assert relative_error(level, same) < 1e-2
    assert timm.create_model('resnet18_pst').num_classes == 1000
