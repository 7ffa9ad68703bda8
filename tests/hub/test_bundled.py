"""The weights that come with the package, and what is said of them."""
import hashlib
import json
import re
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file
from timm.data import ImageNetInfo
from timm.models import get_pretrained_cfg

from pst_timm.checkpoints import label_names, read_checkpoint
from pst_timm.checkpoints.building import load_model
from pst_timm.cli import main
from pst_timm.commands.list import bundled_weights
from pst_timm.models.digest import digest_note
from pst_timm.models.resnet_pst import WEIGHTS
from scripts import bundle_tin200
from scripts.bundle_weights import bundle, measure
from scripts.demo import write_digits
from tests.helpers import relative_error

README = (Path(__file__).parents[2] / 'README.md').read_text()
RECORDS = {record['weights']: record for record in bundled_weights()}
NAMES = ['resnet18_pst.tin200', 'test_resnet_pst.digits']
DIGITS = RECORDS['test_resnet_pst.digits']
weights = pytest.mark.parametrize('name', NAMES)
# classes, image size, and that without weights
SIZES = {'resnet18_pst.tin200': (200, 96, 224), 'test_resnet_pst.digits': (10, 64, 160)}


def file_of(name):
    return WEIGHTS / f'{name}.safetensors'


def test_they_are_all_there_is():
    assert timm.list_pretrained('*pst*') == timm.list_models('*pst*', pretrained=True) == sorted(RECORDS) == NAMES
    assert sorted(WEIGHTS.glob('*.safetensors')) == [file_of(name) for name in NAMES]
    assert file_of(NAMES[0]).stat().st_size < 30 * 2 ** 20 and file_of(NAMES[1]).stat().st_size < 3 * 2 ** 20


@weights
def test_they_are_the_default_and_change_nothing_unless_asked_for(name):
    arch, tag = name.split('.')
    classes, size, usual = SIZES[name]
    cfg = get_pretrained_cfg(arch)
    assert (cfg.tag, Path(cfg.file)) == (tag, file_of(name))
    for kwargs in ({}, dict(features_only=True)):
        assert timm.create_model(arch, **kwargs).pretrained_cfg['input_size'] == (3, usual, usual)
    assert timm.create_model(arch).num_classes == 1000
    served = timm.create_model(arch, pretrained=True)
    assert served.num_classes == classes and served.pretrained_cfg['input_size'] == (3, size, size)
    assert torch.equal(served.fc.weight, read_checkpoint(file_of(name)).weights['fc.weight'].float())


@weights
def test_they_adapt_as_timms_do(name):
    served = timm.create_model(name.split('.')[0], pretrained=True).eval()
    other = timm.create_model(name, pretrained=True, num_classes=4, in_chans=1).eval()
    x = torch.rand(1, 1, 64, 64)
    assert other(x).shape == (1, 4)
    with torch.no_grad():  # weights of three equal channels are added up
        features = served.forward_features(x.expand(-1, 3, -1, -1))
        assert relative_error(other.forward_features(x), features) < 1e-3
        maps = timm.create_model(name, pretrained=True, features_only=True).eval()(x.expand(-1, 3, -1, -1))
        levels = served.forward_intermediates(x.expand(-1, 3, -1, -1), intermediates_only=True)
    assert [m.shape[-1] for m in maps] == [32, 16, 8, 4, 2]
    assert all(torch.equal(a, b) for a, b in zip(maps, levels, strict=True))


@weights
def test_a_replaced_file_is_noticed_and_a_file_of_ones_own_is_not(name, tmp_path):
    tensors = load_file(file_of(name))
    assert get_pretrained_cfg(name).notes == (digest_note(tensors),)
    tensors['fc.bias'] += 1
    save_file(tensors, tmp_path / 'other.safetensors')
    own = dict(file=str(tmp_path / 'other.safetensors'))
    arch = name.split('.')[0]
    model = timm.create_model(arch, pretrained=True, pretrained_cfg_overlay=own)
    assert torch.equal(model.fc.bias, tensors['fc.bias'].float())
    cfg = dict(get_pretrained_cfg(name).to_dict(), **own)
    with pytest.raises(RuntimeError, match='damaged or replaced'):
        timm.create_model(arch, pretrained=True, pretrained_cfg=cfg)


@weights
def test_the_file_says_nothing_of_its_machine(name):
    assert not re.search(rb'"/\w+/', file_of(name).read_bytes()[:100_000])


@weights
def test_list_and_readme_tell_the_record(name, capsys):
    record = RECORDS[name]
    assert main(['list']) == 0
    shown = capsys.readouterr().out
    assert f'{record["top1"]:.2f}% top-1 of {record["images"]} images' in shown
    assert f'{record["img_size"]} px' in shown and record['command'] in shown
    [row] = re.findall(rf'^\| `{re.escape(name)}` \|(.*)\|$', README, re.M)
    cells = [cell.strip() for cell in row.split('|')]
    size = f'{file_of(name).stat().st_size / 1e6:.1f} MB'
    assert cells[1:] == [str(SIZES[name][0]), str(record['img_size']), f'{record["images"]:,}',
                         f'{record["top1"]:.2f}', f'{record["top5"]:.2f}', size]
    assert record['command'].split(' --')[0] in README


class TestDigits:
    def test_the_recorded_accuracy_is_what_is_measured(self, tmp_path):
        pytest.importorskip('sklearn')
        assert write_digits(tmp_path)[1] == DIGITS['images']
        results = measure(tmp_path, file_of(DIGITS['weights']))
        one_image = 100 / DIGITS['images']
        assert results['top1'] == pytest.approx(DIGITS['top1'], abs=one_image * 1.01)
        assert DIGITS['top1'] > 99
        assert results['loss'] == pytest.approx(DIGITS['loss'], rel=0.02)

    @pytest.mark.slow
    def test_the_command_makes_weights_and_record(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        record = bundle(tmp_path, ['--epochs', '1', '--warmup-epochs', '0'])
        assert record.keys() == DIGITS.keys() and record['top1'] < DIGITS['top1']
        assert json.loads((tmp_path / f'{DIGITS["weights"]}.json').read_text()) == record
        model = load_model(tmp_path / f'{DIGITS["weights"]}.safetensors')
        assert model.num_classes == 10 and tuple(model.pretrained_cfg['input_size']) == (3, 64, 64)


class TestPhotographs:
    name = 'resnet18_pst.tin200'
    record = json.loads((bundle_tin200.RECORDS / f'{name}.json').read_text())
    short = RECORDS[name]

    def test_the_record_is_of_this_file(self):
        content = file_of(self.name).read_bytes()
        assert (self.record['sha256'], self.record['bytes']) == (hashlib.sha256(content).hexdigest(), len(content))
        first = self.record['metrics'][0]
        assert {**{k: self.record[k] for k in self.short if k in self.record},
                **{k: first[k] for k in ('top1', 'top5', 'loss')}} == self.short

    def test_the_file_knows_what_it_is(self):
        loaded, cfg = load_model(file_of(self.name)), get_pretrained_cfg(self.name)
        assert label_names(loaded) == list(cfg.label_names)
        for key in ('architecture', 'num_classes', 'input_size', 'mean', 'std', 'interpolation', 'crop_pct'):
            assert loaded.pretrained_cfg[key] == getattr(cfg, key), key

    def test_accuracy_and_classes_agree(self):
        by_class, cfg = self.record['top1_by_class'], get_pretrained_cfg(self.name)
        assert list(by_class) == list(cfg.label_names) and len(by_class) == self.record['classes']
        coarse = self.record['metrics'][0]
        assert sum(by_class.values()) / len(by_class) == pytest.approx(coarse['top1'], abs=0.01)
        assert coarse['topk'] == 0 and coarse['top1'] >= 50
        assert [row['topk'] for row in self.record['metrics'][1:]] == [2, 2, 8, 8]
        assert get_pretrained_cfg(self.name).notes == (self.record['notes'],)

    def test_classes_have_their_words(self):
        cfg, words = get_pretrained_cfg(self.name), ImageNetInfo()
        assert cfg.label_descriptions == {name: words.label_name_to_description(name) for name in cfg.label_names}

    def test_the_card_is_made_of_file_and_record(self):
        text = (bundle_tin200.RECORDS / f'{self.name}.md').read_text()
        assert text == bundle_tin200.card(self.record, file_of(self.name))

    def test_recipes_are_those_of_the_tree(self):
        for name, stage in zip(('cpu64', 'cpu96'), self.record['stages'], strict=True):
            recipe = yaml.safe_load((bundle_tin200.CONFIGS / f'{name}.yaml').read_text())
            assert {k: v for k, v in stage['recipe'].items() if recipe.get(k, v) != v} == {}
            assert stage['epochs'] == recipe['epochs']
