"""What validate measures, against the plain formulas."""
import csv
import json
from contextlib import contextmanager

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.data import create_dataset, create_loader

from pst_timm.checkpoints import load_model
from pst_timm.commands.validate import main as validate_main
from pst_timm.deploy import runtime
from pst_timm.engine import train, validate, validation
from pst_timm.metrics.calibration import calibration_error, fit_temperature
from pst_timm.metrics.classification import ClassReport, RealLabels
from pst_timm.utils.errors import PSTError

from .helpers import load_weights, tiny_train_args, tiny_validate_args


@pytest.fixture(scope='module')
def folder(images, tmp_path_factory):
    """Folder of a run of two epochs."""
    return train(tiny_train_args(  # two epochs are few for fine attention to tell from coarse
        images, tmp_path_factory.mktemp('validate'), epochs=2, lr=0.01,
        model_kwargs=dict(pst_zero_init=False))).output_dir


@pytest.fixture(scope='module')
def truth(images, folder):
    """Logits and labels of the validation images by the plain way, coarse and with fine attention."""
    model = timm.create_model('test_resnet_pst', num_classes=3).eval()
    model.load_state_dict(load_weights(folder / 'last.pth.tar'))
    loader = create_loader(
        create_dataset('', root=str(images), split='validation'), (3, 48, 48), 32, use_prefetcher=False,
        num_workers=0, device=torch.device('cpu'), interpolation='bicubic', crop_pct=0.95)
    [(x, y)] = list(loader)
    logits = {}
    with torch.inference_mode():
        for k, fusion in ((0, 'gate'), (2, 'gate'), (2, 'joint')):
            model.set_topk(k, fusion)
            logits[k, fusion] = model(x)
    return logits, y


def expected(logits, target):
    return dict(
        top1=100 * (logits.argmax(-1) == target).float().mean().item(), loss=F.cross_entropy(logits, target).item())


def run(images, folder, load=load_model, **values):
    return validate(tiny_validate_args(images, **{'checkpoint': str(folder / 'last.pth.tar'), **values}), load)


def test_accuracy_and_loss(images, folder, truth):
    logits, target = truth
    [results] = run(images, folder)
    want = expected(logits[0, 'gate'], target)
    assert results['top1'] == pytest.approx(want['top1'], abs=1e-3)
    assert results['loss'] == pytest.approx(want['loss'], abs=1e-4)
    assert results['top1_err'] == pytest.approx(100 - results['top1'])
    assert (results['img_size'], results['crop_pct'], results['param_count']) == (48, 0.95, 0.56)
    assert results['images_per_second'] > 0


def test_model_kwargs_switch_fine_attention(images, folder, truth):
    logits, target = truth
    for fusion in ('gate', 'joint'):
        [results] = run(images, folder, model_kwargs=dict(topk=2, fine_fusion=fusion))
        assert results['loss'] == pytest.approx(F.cross_entropy(logits[2, fusion], target).item(), abs=1e-4)
    assert (logits[2, 'joint'] - logits[0, 'gate']).abs().max() > 1e-3


def test_sweep_equals_single_runs(images, folder, truth, tmp_path):
    logits, target = truth
    rows = run(images, folder, topk_sweep=[0, 2])
    assert [(r['topk'], r['fine_fusion']) for r in rows] == [(0, 'coarse'), (2, 'gate'), (2, 'joint')]
    for row, key in zip(rows, ((0, 'gate'), (2, 'gate'), (2, 'joint'))):
        want = expected(logits[key], target)
        assert row['top1'] == pytest.approx(want['top1'], abs=1e-3)
        assert row['loss'] == pytest.approx(want['loss'], abs=1e-4)
    torch.save(timm.create_model('test_resnet', num_classes=3).state_dict(), tmp_path / 'plain.pth')
    with pytest.raises(PSTError, match='needs a model with settings to compare'):
        run(images, folder, model='test_resnet', checkpoint=str(tmp_path / 'plain.pth'), topk_sweep=[0, 2])


class Sharpened(torch.nn.Module):
    """Any model with what `protocols.Adjustable` asks for, and nothing else."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.num_classes, self.pretrained_cfg = model.num_classes, model.pretrained_cfg
        self.factor = 1.

    def forward(self, x):
        return self.model(x) * self.factor

    def inference_settings(self):
        return dict(factor=self.factor)

    def sweep_settings(self, values):
        return [dict(factor=float(v)) for v in values]

    def settings_columns(self, setting, img_size):
        return dict(sharpness=setting['factor'], size='x'.join(map(str, img_size)))

    @contextmanager
    def with_settings(self, **settings):
        before, self.factor = self.factor, settings['factor']
        yield
        self.factor = before


def test_any_adjustable_model_can_be_swept(images, folder, truth, monkeypatch, capsys):
    (logits, target), loaded = truth, load_model(folder / 'last.pth.tar')
    monkeypatch.setattr(runtime, 'open_source', lambda *args, **kwargs: Sharpened(loaded))
    rows = run(images, folder, runtime.open_source, topk_sweep=[1, 3])
    assert [(r['sharpness'], r['size']) for r in rows] == [(1., '48x48'), (3., '48x48')]
    assert not {'topk', 'fine_fusion', 'selected'} & {*rows[0]}
    for row in rows:
        assert row['loss'] == pytest.approx(expected(logits[0, 'gate'] * row['sharpness'], target)['loss'], abs=1e-4)
    assert validate_main([
        '--data-dir', str(images), '--checkpoint', str(folder / 'last.pth.tar'), '-j', '0', '--device', 'cpu',
        '--topk-sweep', '1', '3']) == 0
    assert 'sharpness' in capsys.readouterr().out.splitlines()[0]


def test_pooling_past_the_head_is_refused(images, folder, tmp_path):
    with pytest.raises(PSTError, match=r'the 64 channels .* the 128 of its head: leave it out'):
        run(images, folder, img_size=96, test_pool=True)
    torch.save(timm.create_model('test_resnet', num_classes=3).state_dict(), tmp_path / 'plain.pth')
    plain = dict(model='test_resnet', checkpoint=str(tmp_path / 'plain.pth'))
    [row] = run(images, folder, img_size=192, test_pool=True, **plain)
    assert row['crop_pct'] == 1. and 'top1' in row


def test_sweep_measures_every_setting_by_itself(images, folder, truth):
    logits, target = truth
    rows = run(images, folder, topk_sweep=[0, 2], calibrate=True)
    for row, key in zip(rows, ((0, 'gate'), (2, 'gate'), (2, 'joint'))):
        assert row['ece'] == pytest.approx(calibration_error(logits[key].double(), target), abs=1e-3)


def test_sweep_table_shows_what_differs(images, folder, capsys):
    assert validate_main([
        '--data-dir', str(images), '--model', 'test_resnet_pst', '--num-classes', '3', '--img-size', '48', '-j', '0',
        '--checkpoint', str(folder / 'last.pth.tar'), '--device', 'cpu', '--topk-sweep', '0', '2']) == 0
    lines = capsys.readouterr().out.splitlines()
    header = lines[0].split()
    assert header[:2] == ['topk', 'fine_fusion'] and 'loss' in header and 'model' not in header


def test_a_k_beyond_the_tokens_is_shown_as_what_it_is(images, folder, capsys):
    """48 px have 2 x 2 coarse tokens."""
    rows = run(images, folder, topk_sweep=[3, 64])
    assert [(r['topk'], r['selected']) for r in rows] == [(3, 3), (3, 3), (64, 4), (64, 4)]
    assert validate_main([
        '--data-dir', str(images), '--checkpoint', str(folder / 'last.pth.tar'), '--device-modules', 'pst_timm',
        '-j', '0', '--device', 'cpu', '--topk-sweep', '4', '64']) == 0
    table = capsys.readouterr().out.split('--result')[0]
    assert '64 (all 4)' in table and '4 (all' not in table.replace('64 (all', '')


@pytest.mark.parametrize('values', [dict(torchcompile='eager'), dict(reparam=True)])
def test_sweep_of_a_compiled_or_folded_model(images, folder, values):
    rows, plain = run(images, folder, topk_sweep=[0, 2], **values), run(images, folder, topk_sweep=[0, 2])
    assert [r['loss'] for r in rows] == pytest.approx([r['loss'] for r in plain], abs=1e-4)
    assert len({r['loss'] for r in rows}) == 3


def test_sweep_of_a_scripted_model_is_refused(images, folder):
    """The scripted copy would keep the setting it was made with, and all rows would be equal."""
    with pytest.raises(PSTError, match='--topk-sweep cannot change a scripted model'):
        run(images, folder, topk_sweep=[0, 2], torchscript=True)


def test_sweep_times_every_setting_and_leaves_no_trace(images, folder):
    model = load_model(folder / 'last.pth.tar')
    rows = run(images, folder, lambda *args, **kwargs: model, topk_sweep=[2, 1])
    assert len({r['images_per_second'] for r in rows}) > 1
    assert model.inference_settings() == dict(topk=0, fine_fusion='gate')


def test_sweep_leaves_the_plain_result_alone(images, folder):
    [plain] = run(images, folder, batch_size=4)
    rows = run(images, folder, batch_size=4, topk_sweep=[2, 0])
    assert [r['topk'] for r in rows] == [2, 2, 0]
    assert rows[2]['loss'] == pytest.approx(plain['loss'], abs=1e-5)


def test_folding_and_precision_keep_the_result(images, folder):
    [plain] = run(images, folder)
    for values in (
            dict(reparam=True), dict(channels_last=True), dict(torchcompile='eager'), dict(workers=1),
            dict(no_prefetcher=True), dict(aot_autograd=True), dict(torchscript=True),
            dict(reparam=True, topk_sweep=[0])):
        results = run(images, folder, **values)[-1]
        assert results['loss'] == pytest.approx(plain['loss'], abs=1e-3), values
    [low] = run(images, folder, amp=True, amp_dtype='bfloat16')
    assert low['loss'] != plain['loss'] and low['loss'] == pytest.approx(plain['loss'], abs=0.1)


def test_calibration_error_and_temperature():
    torch.manual_seed(0)
    n = 4000
    logits = torch.randn(n, 5, dtype=torch.float64)
    target = torch.multinomial(logits.softmax(-1), 1).squeeze(1)
    # labels drawn from the model's own probabilities: it is calibrated
    assert calibration_error(logits, target) < 0.03
    assert fit_temperature(logits, target) == pytest.approx(1., abs=0.1)
    # three times too sure of itself
    assert calibration_error(3 * logits, target) > 0.1
    assert fit_temperature(3 * logits, target) == pytest.approx(3., rel=0.1)
    # all sure, half right
    sure = F.one_hot(torch.zeros(10, dtype=torch.long), 2).double() * 100
    assert calibration_error(sure, torch.tensor([0, 1] * 5)) == pytest.approx(0.5)


def test_calibrate(images, folder, truth):
    logits, target = truth
    [results] = run(images, folder, calibrate=True)
    logits = logits[0, 'gate'].double()
    assert results['ece'] == pytest.approx(calibration_error(logits, target), abs=1e-3)
    tempered = F.cross_entropy(logits / results['temperature'], target)
    for factor in (0.8, 1.25):
        assert tempered <= F.cross_entropy(logits / (factor * results['temperature']), target)


@pytest.mark.parametrize('average', ['micro', 'macro', 'weighted'])
def test_precision_recall_and_f1(average):
    sklearn = pytest.importorskip('sklearn.metrics')
    torch.manual_seed(0)
    logits, target = torch.randn(60, 4), torch.randint(0, 4, (60,))
    measure = ClassReport(average)
    for x, y in zip(logits.split(25), target.split(25)):
        measure.update(x, y)
    want = sklearn.precision_recall_fscore_support(target, logits.argmax(-1), average=average)[:3]
    assert list(measure.results().values()) == pytest.approx([100 * w for w in want], abs=1e-3)


def test_several_models_and_a_folder_of_checkpoints(images, folder, tmp_path, capsys):
    results = run(images, folder, checkpoint=str(folder), results_file=str(tmp_path / 'r.csv'))
    assert len(results) == len(list(folder.glob('*.pth.tar'))) >= 3
    assert [r['top1'] for r in results] == sorted((r['top1'] for r in results), reverse=True)
    with open(tmp_path / 'r.csv') as f:
        assert [r['checkpoint'] for r in csv.DictReader(f)] == [r['checkpoint'] for r in results]
    # one that cannot be loaded does not spoil the rest
    (tmp_path / 'some').mkdir()
    (tmp_path / 'some' / 'bad.pth').write_bytes(b'no checkpoint')
    save_file(load_weights(folder / 'last.pth.tar'), str(tmp_path / 'some' / 'good.safetensors'))
    words = [
        '--data-dir', str(images), '--model', 'test_resnet_pst', '--num-classes', '3', '--img-size', '48', '-j', '0',
        '--checkpoint', str(tmp_path / 'some'), '--results-format', 'json', '--results-file', str(tmp_path / 'r.json'),
        '--device', 'cpu']
    assert validate_main(words) == 1
    rows = json.loads((tmp_path / 'r.json').read_text())
    assert 'top1' in rows[0] and 'cannot be read' in rows[1]['error']
    printed = capsys.readouterr().out
    assert 'good.safetensors' in printed.split('--result')[0]
    with pytest.raises(PSTError, match='has no checkpoints'):
        run(images, folder, checkpoint=str(images))


def test_valid_and_real_labels(images, folder, tmp_path):
    (tmp_path / 'labels.txt').write_text('0\n1\n2\n')
    assert run(images, folder, valid_labels=str(tmp_path / 'labels.txt'))[0]['loss'] == run(images, folder)[0]['loss']
    with pytest.raises(PSTError, match='text file of class indices'):
        run(images, folder, valid_labels='nowhere.txt')
    with pytest.raises(PSTError, match='50,000 validation images'):
        run(images, folder, real_labels='default')


def test_real_labels_count_every_good_answer(tmp_path):
    class Names:
        def filenames(self, basename):
            return [f'ILSVRC2012_val_{i + 1:08d}.JPEG' for i in range(3)]

    (tmp_path / 'real.json').write_text(json.dumps([[0, 2], [], [1]]))
    measure = RealLabels(Names(), str(tmp_path / 'real.json'))
    logits = F.one_hot(torch.tensor([2, 0, 0]), 6).float()
    measure.update(logits, None)
    assert measure.results()['real_top1'] == 50.  # the image without labels does not count


def test_memory_is_retried_with_smaller_batches(images, folder, monkeypatch):
    seen, plain = [], validation.evaluate

    def evaluate(model, loader, *args, **kwargs):
        seen.append(loader.loader.batch_size)
        if seen[-1] > 4:
            raise RuntimeError('CUDA out of memory')
        return plain(model, loader, *args, **kwargs)

    monkeypatch.setattr(validation, 'evaluate', evaluate)
    [results] = run(images, folder, retry=True)
    assert seen == [8, 6, 4] and 'top1' in results
    with pytest.raises(RuntimeError, match='out of memory'):
        run(images, folder)
