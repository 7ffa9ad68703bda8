"""`pst-timm detect` as a person types it: what it answers, and what it is told when it cannot."""
import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from pst_timm.cli import main
from pst_timm.detection import train, validate
from pst_timm.detection.flags import DETECTOR_KEYS, TRAIN_FLAGS, VALIDATE_FLAGS, train_args
from pst_timm.detection.models import KINDS, NECKS, create_detector
from pst_timm.engine.args import read_yaml
from pst_timm.engine.flags import TRAIN_FLAGS as CLASSIFY
from pst_timm.utils.errors import PSTError
from tests.commands.bad_inputs import BadInput, parametrize, refused
from tests.engine.helpers import ROOT, script_env

from .tiny import CLASSES, tiny_args, tiny_validate_args, write_squares

CONFIGS = sorted((ROOT / 'configs' / 'detect').glob('*.yaml'))


@pytest.fixture(scope='module')
def ready(tmp_path_factory):
    """A folder with data, a detector of little training, a classifier, and files that are none of these."""
    root = tmp_path_factory.mktemp('ready')
    data = write_squares(root / 'data', {'train': 8, 'val': 4, 'test': 4})
    train(tiny_args(data, root, epochs=4, val_split='', lr=0.01))
    torch.save({'state_dict': timm.create_model('test_resnet').state_dict(), 'arch': 'test_resnet'},
               root / 'classifier.pth.tar')
    (root / 'text.pth.tar').write_text('no checkpoint')
    (root / 'cut.pth.tar').write_bytes((root / 'run' / 'last.pth.tar').read_bytes()[:5000])
    return root


class TestValidate:
    def test_its_numbers_are_those_of_the_call(self, ready, tmp_path, capsys):
        words = ['detect', 'validate', '--data-dir', str(ready / 'data'), '--checkpoint', str(ready / 'run'),
                 '--device', 'cpu', '--workers', '0', '-b', '3', '--results-file', str(tmp_path / 'out.csv')]
        assert main([*words, '--split', 'test']) == 0
        said = capsys.readouterr().out
        told = json.loads(said.partition('--result\n')[2])
        called = validate(tiny_validate_args(ready / 'data', ready / 'run', split='test'))[0]
        for key, value in called.items():
            if key != 'images_per_second':
                assert told[key] == value, key
        assert {f'ap_{name}' for name in CLASSES} <= set(told) and told['images'] == 4
        with open(tmp_path / 'out.csv', newline='') as file:
            row = next(csv.DictReader(file))
        assert float(row['ap']) == told['ap'] and row['split'] == 'test'

    def test_a_sweep_has_a_row_for_each_setting(self, ready, tmp_path):
        rows = validate(tiny_validate_args(
            ready / 'data', ready / 'run', topk_sweep=[0, 2], results_file=str(tmp_path / 'a.json'),
            results_format='json'))
        assert [(r['topk'], r['fine_fusion']) for r in rows] == [(0, 'coarse'), (2, 'gate'), (2, 'joint')]
        written = json.loads((tmp_path / 'a.json').read_text())
        assert [r['ap'] for r in written] == [r['ap'] for r in rows]
        alone = validate(tiny_validate_args(ready / 'data', ready / 'run', topk=2, fine_fusion='joint'))[0]
        assert alone['ap'] == rows[2]['ap'] and alone['topk'] == 2

    def test_the_batch_and_the_workers_change_nothing(self, ready):
        found = [
            {k: v for k, v in validate(tiny_validate_args(ready / 'data', ready / 'run', **values))[0].items()
             if k.startswith(('ap', 'ar'))}
            for values in (dict(batch_size=4), dict(batch_size=1, workers=1))]
        assert found[0] == pytest.approx(found[1], abs=0.05)

    def test_a_class_that_is_called_like_a_size_hides_no_metric(self, ready, tmp_path):
        data = write_squares(tmp_path / 'data', {'train': 4, 'val': 4})
        for path in (data / 'annotations').iterdir():
            path.write_text(path.read_text().replace('"red"', '"medium"').replace('"green"', '"large"'))
        train(tiny_args(data, tmp_path, epochs=1, val_split=''))
        found = validate(tiny_validate_args(data, tmp_path / 'run'))[0]
        assert found['ap_medium'] is None and found['ap_large'] is None  # all squares are small
        assert found['ap_class_medium'] is not None and found['ap_class_large'] is not None

    def test_a_higher_threshold_leaves_boxes_out(self, ready):
        rows = [validate(tiny_validate_args(ready / 'data', ready / 'run', score_thresh=share))[0]
                for share in (0.01, 0.99)]
        assert rows[0]['ar100'] > 0 and rows[1]['ar100'] == 0


def test_predict_writes_pictures_and_data(ready, tmp_path, capsys):
    words = ['detect', 'predict', str(ready / 'run'), str(ready / 'data' / 'test'), '--device', 'cpu']
    assert main([*words, '-o', str(tmp_path / 'out'), '--json', str(tmp_path / 'out.json'), '--threshold', '0.05']) == 0
    boxes = json.loads((tmp_path / 'out.json').read_text())
    assert len(list((tmp_path / 'out').glob('*.png'))) == 4
    assert f'{len(boxes)} boxes with a score of 0.05 or more in 4 image(s).' in capsys.readouterr().out


def test_predict_writes_over_no_checkpoint_that_it_reads(ready, tmp_path, capsys):
    run = tmp_path / 'run'
    run.mkdir()
    content = (ready / 'run' / 'last.pth.tar').read_bytes()
    (run / 'last.pth.tar').write_bytes(content)
    for source in (run, run / 'last.pth.tar'):
        assert main(['detect', 'predict', str(source), str(ready / 'data' / 'test'), '--device', 'cpu', '--overwrite',
                     '--json', str(run / 'last.pth.tar')]) == 1
        assert 'is what is read' in capsys.readouterr().err
    assert (run / 'last.pth.tar').read_bytes() == content


@pytest.mark.parametrize('words', [[], ['train'], ['validate'], ['predict'], ['export']], ids=' '.join)
def test_help_does_not_wait_for_torch(words):
    done = subprocess.run(
        [sys.executable, '-X', 'importtime', '-m', 'pst_timm', 'detect', *words, '--help'],
        capture_output=True, text=True, cwd=ROOT, env=script_env())
    assert done.returncode == 0 and f'usage: pst-timm detect {" ".join(words)}' in done.stdout
    loaded = {line.rpartition('|')[2].strip() for line in done.stderr.splitlines()}
    assert 'argparse' in loaded and not loaded & {'torch', 'timm', 'torchvision', 'numpy', 'pycocotools'}


class TestFlags:
    def test_those_that_mean_the_same_are_the_same(self):
        theirs = {flag.key: flag for _, flags in CLASSIFY for flag in flags}
        for _, flags in TRAIN_FLAGS:
            for flag in flags:
                if flag.key in theirs:
                    other = theirs[flag.key]
                    assert (flag.names, flag.type, flag.role) == (other.names, other.type, other.role), flag.key

    def test_no_name_comes_twice(self):
        for groups in (TRAIN_FLAGS, VALIDATE_FLAGS):
            names = [name for _, flags in groups for flag in flags for name in flag.names]
            assert len(set(names)) == len(names)

    def test_choices_are_those_of_the_models(self):
        flags = {flag.key: flag for _, group in TRAIN_FLAGS for flag in group}
        assert flags['detector'].choices == KINDS and flags['neck'].choices == NECKS

    def test_defaults_are_those_of_create_detector(self):
        import inspect

        known = inspect.signature(create_detector).parameters
        args = train_args(data_dir='x')
        assert set(DETECTOR_KEYS) <= set(known)
        for key in set(DETECTOR_KEYS) - {'img_size', 'neck_kwargs', 'trunk_kwargs'}:
            default = known[key].default
            assert getattr(args, key) == (list(default) if isinstance(default, tuple) else default), key

    @pytest.mark.parametrize('values, said', [
        (dict(data_dir=None), 'Name the folder of the data'),
        (dict(scale_jitter=[1.5, 0.5]), '--scale-jitter needs a smallest and a largest'),
        (dict(pretrained_trunk=True, trunk_checkpoint='x'), 'choose one'),
        (dict(neck='fpn', topk=8), '--topk and --train-topk are for a neck or trunk with PST'),
        (dict(use_ema=True), '--use-ema chooses the weights'),
        (dict(eval_metric='top1'), "one of 'ap', 'ap50'"),
        (dict(amp=True, model_dtype='bfloat16'), '--amp needs float32 weights'),
        (dict(mixup=0.2), "unknown key 'mixup'"),
    ])
    def test_what_does_not_go_together_is_a_sentence(self, values, said):
        with pytest.raises(PSTError, match=said):
            train_args(**{'data_dir': 'x', **values})


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_names_what_there_is(path):
    values = read_yaml(str(path), TRAIN_FLAGS)
    args = train_args(**{'data_dir': 'x', **values})
    with torch.device('meta'):
        model = create_detector(
            args.detector, num_classes=3, **{key: getattr(args, key) for key in DETECTOR_KEYS})
    assert model.img_size == args.img_size
    assert re.search(rf'pst-timm detect train --config configs/detect/{path.name}|{path.name}', path.read_text())


def test_the_published_precision_in_the_recipes_is_torchvisions():
    from torchvision.models.detection import (
        FCOS_ResNet50_FPN_Weights,
        RetinaNet_ResNet50_FPN_V2_Weights,
        RetinaNet_ResNet50_FPN_Weights,
    )

    said = ''.join((ROOT / 'configs' / 'detect' / f'{name}_8gpu.yaml').read_text() for name in (
        'coco_resnet50_pst', 'coco_mobilenetv4'))
    for weights in (
            FCOS_ResNet50_FPN_Weights, RetinaNet_ResNet50_FPN_Weights, RetinaNet_ResNet50_FPN_V2_Weights):
        assert str(weights.COCO_V1.meta['_metrics']['COCO-val2017']['box_map']) in said


def fit(*words, data='{ready}/data'):
    return ['detect', 'train', '--data-dir', data, '--device', 'cpu', '--workers', '0', '--output', 'new', '-b', '4',
            *words]


def judge(*words, data='{ready}/data', checkpoint='{ready}/run'):
    return ['detect', 'validate', '--data-dir', data, '--checkpoint', checkpoint, '--device', 'cpu', '--workers', '0',
            *words]


def draw(*words, source='{ready}/run'):
    return ['detect', 'predict', source, '{ready}/data/test', '--device', 'cpu', *words]


TABLE = [
    BadInput('no action', ['detect'], 'action', code=2),
    BadInput('unknown action', ['detect', 'trian'], 'Did you mean train?', code=2),
    BadInput('train without data', ['detect', 'train'], '--data-dir'),
    BadInput('train on no folder', fit(data='nowhere'), 'nowhere'),
    BadInput('unknown flag', fit('--nek', 'pst'), '--nek'),
    BadInput('unknown detector', fit('--detector', 'yolo'), '--detector'),
    BadInput('unknown trunk', fit('--trunk', 'resnet81'), 'resnet81'),
    BadInput('trunk without levels', fit('--trunk', 'vit_tiny_patch16_224'), 'stride 16'),
    BadInput('no such split', fit('--val-split', 'holdout'), 'holdout'),
    BadInput('batch beyond the data', fit('--batch-size', '64'), '--batch-size'),
    BadInput('width of no head', fit('--neck-width', '100'), '100'),
    BadInput('unknown argument of the neck', fit('--neck-kwargs', 'depht=2'), 'depht'),
    BadInput('unknown argument of the trunk', fit('--trunk-kwargs', 'drop_pth=0.1'), 'drop_pth'),
    BadInput('mixup of classifiers', fit('--mixup', '0.2'), '--mixup'),
    BadInput('trunk from no file', fit('--trunk', 'test_resnet', '--trunk-checkpoint', 'no.pth.tar'), 'no.pth.tar'),
    BadInput('trunk from a text', fit('--trunk', 'test_resnet', '--trunk-checkpoint', '{ready}/text.pth.tar'),
             'text.pth.tar'),
    BadInput('trunk from another', fit('--trunk-checkpoint', '{ready}/classifier.pth.tar'), 'classifier.pth.tar'),
    BadInput('resume from nothing', fit('--resume', 'no.pth.tar'), 'no.pth.tar'),
    BadInput('resume from a cut file', fit('--resume', '{ready}/cut.pth.tar'), 'cut.pth.tar'),
    BadInput('resume from a classifier', fit('--trunk', 'test_resnet', '--resume', '{ready}/classifier.pth.tar'),
             'classifier.pth.tar'),
    BadInput('initial from a classifier', fit('--initial-checkpoint', '{ready}/classifier.pth.tar'),
             'classifier.pth.tar'),
    BadInput('frozen part that is not there', fit('--trunk', 'test_resnet', '--freeze', 'layer9'), 'layer9'),
    BadInput('published trunk that there is not', fit('--trunk', 'mobilenetv3_large_075', '--pretrained-trunk'),
             'mobilenetv3_large_075'),
    BadInput('image size', fit('--img-size', '16'), '--img-size'),
    BadInput('validate nothing', ['detect', 'validate', '--data-dir', 'x'], '--checkpoint'),
    BadInput('validate a classifier', judge(checkpoint='{ready}/classifier.pth.tar'), 'classifier.pth.tar'),
    BadInput('validate a cut file', judge(checkpoint='{ready}/cut.pth.tar'), 'cut.pth.tar'),
    BadInput('validate a folder without', judge(checkpoint='{ready}/data'), 'data'),
    BadInput('validate no split', judge('--split', 'holdout'), 'holdout'),
    BadInput('results over a file', judge('--results-file', '{ready}/text.pth.tar'), 'text.pth.tar'),
    BadInput('results into no folder', judge('--results-file', 'no/where.csv'), 'no'),
    BadInput('sweep twice', judge('--topk-sweep', '2', '2'), '--topk-sweep'),
    BadInput('sweep beside topk', judge('--topk-sweep', '2', '--topk', '2'), '--topk'),
    BadInput('average that there is not', judge('--use-ema'), '--use-ema'),
    BadInput('predict to nowhere', draw(), '--output', code=2),
    BadInput('predict with a classifier', draw('-o', 'out', source='{ready}/classifier.pth.tar'), 'classifier.pth.tar'),
    BadInput('predict with a name', draw('-o', 'out', source='resnet18'), 'resnet18'),
    BadInput('threshold beyond 1', draw('-o', 'out', '--threshold', '2'), '--threshold', code=2),
    BadInput('export under another ending', ['detect', 'export', '{ready}/run', '-o', 'a.pt'], '.onnx', code=2),
    BadInput('export of nothing', ['detect', 'export', '{ready}/run'], '--output', code=2),
]


@parametrize(TABLE)
def test_bad_input_is_one_sentence(row, ready, tmp_path, monkeypatch, capfd):
    row = row._replace(words=[str(word).replace('{ready}', str(ready)) for word in row.words])
    refused(row, tmp_path, monkeypatch, capfd)
    assert not list(Path(tmp_path).glob('new/*'))
