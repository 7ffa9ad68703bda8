"""What `pst-timm train` refuses, in one sentence that names the culprit and before any work."""
import os
from pathlib import Path

import pytest
import timm
import torch

from pst_timm.engine import dry_run

from .bad_inputs import BadInput, parametrize, refused

WORDS = (
    'train --data-dir images --model test_resnet_pst --img-size 48 -b 8 -j 0 --device cpu --epochs 1 --warmup-epochs 0 '
    '--output runs --lr 0.01 --color-jitter 0').split()


def bad(name, flags, culprit, make=None, code=1):
    """A row: flags that are added to a run that would do."""
    return BadInput(name, [*WORDS, *flags.split(' ')], culprit, make, code)


def write(name, text):
    def make(folder: Path):
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return make


def weights(change):
    """A file of the model's weights, changed; beside it, what a package of that name would be."""
    def make(folder: Path):
        state = timm.create_model('test_resnet_pst', num_classes=3).state_dict()
        torch.save(change(state), folder / 'start.pth')
    return make


def config(name, content, culprit):
    """A row: a YAML file."""
    make = write('bad.yaml', content)
    return BadInput(f'config-{name}', [*WORDS, '--config', 'bad.yaml'], culprit, make)


def a_pipe(folder: Path):
    os.mkfifo(folder / 'bad.yaml')


def weigh(text):
    return write('w.csv', text)


EMPTY = weights(lambda state: {})
PREFIXED = weights(lambda state: {f'backbone.{k}': v for k, v in state.items()})
WRAPPED = weights(lambda state: {'net': {'weights': state}})
NAN = weights(lambda state: {k: v * float('nan') if v.is_floating_point() else v for k, v in state.items()})
HALF = weights(lambda state: dict(list(state.items())[:50]))
PLAIN = weights(lambda state: timm.create_model('test_resnet', num_classes=3).state_dict())

TABLE = [
    # augmentation and preprocessing
    bad('scale-of-nothing', '--scale 0 0', '--scale'),
    bad('scale-infinite', '--scale inf inf', '--scale'),
    bad('scale-alone', '--scale 0.5', '--scale'),
    bad('ratio-zero', '--ratio 0 1', '--ratio'),
    bad('ratio-absurd', '--ratio 1e30 1e31', '--ratio'),
    bad('crop-zero', '--crop-pct 0', '--crop-pct'),
    bad('crop-tiny', '--crop-pct 1e-9', '--crop-pct'),
    bad('crop-infinite', '--crop-pct inf', '--crop-pct'),
    bad('interpolation', '--interpolation bicubical', "got 'bicubical'"),
    bad('interpolation-random', '--interpolation random', '--interpolation'),
    bad('train-interpolation', '--train-interpolation bicubical', "got 'bicubical'"),
    bad('aa-unknown', '--aa autoaugment', '--aa'),
    bad('aa-glued', '--aa randm9', '--aa'),
    bad('aa-skipped-part', '--aa rand-mhigh', "'mhigh'"),
    bad('aa-unknown-part', '--aa rand-x9', '--aa'),
    bad('aa-unknown-set', '--aa rand-m9-tall', "'tall'"),
    bad('mean-infinite', '--mean inf', '--mean'),
    bad('mean-of-two', '--mean 0.5 0.5', '--mean'),
    bad('std-zero', '--std 0', '--std'),
    bad('jitter-infinite', '--color-jitter inf', '--color-jitter'),
    bad('image-mode', '--input-img-mode XYZ', "'XYZ'"),
    bad('channels-of-no-mode', '--in-chans 2', '--in-chans'),
    bad('channels-without-mean', '--in-chans 4 --input-img-mode RGBA', '--mean'),
    bad('size-twice', '--input-size 3 48 48 --img-size 64', '--img-size 64'),
    bad('mixup-odd', '--mixup 0.5 -b 7', '--batch-size'),
    bad('tta-across-batches', '--tta 3', '--tta 3'),
    # the machine
    bad('seed-huge', '--seed 4294967296', '--seed'),
    bad('seed-negative', '--seed -1', '--seed'),
    bad('device-unknown', '--device gpu', '--device gpu'),
    bad('device-absent', '--device cuda:99', '--device cuda:99'),
    bad('device-without-content', '--device meta', '--device meta'),
    bad('compile-backend', '--torchcompile inductr', "'inductr'"),
    bad('compile-mode', '--torchcompile-mode fastest', "'fastest'"),
    bad('compile-mode-alone', '--torchcompile-mode max-autotune', '--torchcompile-mode'),
    bad('workers', '-j 100000', '--workers'),
    bad('module-missing', '--device-modules no_such_package', 'no_such_package'),
    bad('module-relative', '--device-modules .x', '--device-modules .x'),
    bad('img-size-absurd', '--img-size 1000000', '--img-size'),
    bad('batch-absurd', '--img-size 20000', '--batch-size'),
    # optimizer and schedule
    bad('opt-unknown', '--opt adamm', 'Did you mean'),
    bad('opt-prefix', '--opt foo_sgd', "'foo_sgd'"),
    bad('opt-of-apex', '--opt fusedlamb', 'fusedlamb'),
    bad('betas-alone', '--opt adamw --opt-betas 0.9', 'takes 2 betas, got 1'),
    bad('betas-too-many', '--opt adamw --opt-betas 0.9 0.9 0.9', 'takes 2 betas, got 3'),
    bad('betas-range', '--opt adamw --opt-betas 0.9 1.5', '--opt-betas'),
    bad('eps-negative', '--opt adamw --opt-eps -1', '--opt-eps'),
    bad('opt-kwargs-form', '--opt-kwargs nesterov', "got 'nesterov'"),
    bad('opt-kwargs-unknown', '--opt-kwargs nesterof=True', "'nesterof'"),
    bad('opt-kwargs-type', '--opt-kwargs nesterov=maybe', 'nesterov=maybe'),
    bad('opt-kwargs-not-of-it', '--opt-kwargs betas=(0.9,0.9)', 'sgd has no betas'),
    bad('momentum-range', '--momentum 2', '--momentum'),
    bad('momentum-none', '--momentum 0', 'momentum'),
    bad('lr-zero', '--lr 0', '--lr'),
    bad('lr-infinite', '--lr inf', '--lr'),
    bad('lr-base-zero', '--lr-base 0', '--lr-base'),
    bad('clip-grad-zero', '--clip-grad 0', '--clip-grad'),
    bad('layer-decay', '--layer-decay 50', '--layer-decay'),
    bad('smoothing-of-everything', '--smoothing 1', '--smoothing'),
    bad('cutmix-of-one-size', '--cutmix-minmax 0.5 0.5', '--cutmix-minmax'),
    bad('tta-beside-single-images', '--tta 4 -vb 4', '--tta 4'),
    bad('kwargs-endless', '--model-kwargs pst_depth=1000000', 'pst_depth=1000000'),
    bad('kwargs-too-wide', '--model-kwargs pst_width=100000', 'pst_width=100000'),
    bad('sched-unknown', '--sched cosin', "got 'cosin'"),
    bad('sched-steps-of-nothing', '--sched step --decay-epochs 0', '--decay-epochs 0'),
    bad('sched-longer-than-the-run', '--sched wsd --decay-epochs 5', '--sched wsd'),
    bad('sched-cycles-of-nothing', '--lr-cycle-mul 0 --lr-cycle-limit 2', '--lr-cycle-mul'),
    bad('noise-of-three', '--lr-noise 0.1 0.2 0.3', '--lr-noise'),
    bad('noise-backwards', '--lr-noise 0.9 0.1', '--lr-noise'),
    bad('start-beyond-the-end', '--start-epoch 5', '--start-epoch 5'),
    # the model
    bad('model-pattern', '--model resnet*', "'resnet*'"),
    bad('model-tag', '--model resnet18.a1_in2k', 'resnet18.a1_in1k'),
    bad('pooling', '--gp average', 'average'),
    bad('size-of-a-vit', '--model test_vit --img-size 50', '--img-size'),
    bad('kwargs-form', '--model-kwargs topk', "got 'topk'"),
    bad('kwargs-no-name', '--model-kwargs =5', "'=5'"),
    bad('kwargs-torn', '--model-kwargs topk="8', 'topk="8'),
    bad('kwargs-twice', '--model-kwargs topk=1 topk=2', 'topk is given twice'),
    bad('kwargs-unknown', '--model-kwargs topk=2 topkk=1', 'topkk=1'),
    bad('kwargs-type', '--model-kwargs topk=2 pst_depth=deep', "pst_depth='deep'"),
    bad('kwargs-range', '--model-kwargs topk=-1', 'topk=-1'),
    bad('kwargs-in-forward', '--model-kwargs drop_rate=5', 'dropout probability'),
    bad('kwargs-channels', '--model-kwargs in_chans=x', "in_chans='x'"),
    bad('kwargs-classes', '--model-kwargs num_classes=7', '--num-classes'),
    bad('kwargs-weights', '--model-kwargs checkpoint_path=x.pth', 'checkpoint_path'),
    bad('kwargs-features', '--model-kwargs features_only=True', 'features_only'),
    bad('kwargs-contradiction', '--gp avg --model-kwargs global_pool=max', "global_pool='max'"),
    bad('freeze', '--freeze layr1', 'layer1'),
    # weights to start from
    bad('use-ema-of-nothing', '--use-ema', '--use-ema'),
    bad('two-starts', '--pretrained-path a.pth --initial-checkpoint b.pth', '--pretrained-path'),
    *(
        bad(f'{flag[2:]}-{name}', f'{flag} start.pth', culprit, make)
        for flag in ('--pretrained-path', '--initial-checkpoint', '--trunk-checkpoint')
        for name, make, culprit in (
            ('missing', None, 'start.pth'), ('empty', EMPTY, 'start.pth'), ('prefixed', PREFIXED, 'start.pth'),
            ('wrapped', WRAPPED, 'start.pth'), ('nan', NAN, 'start.pth'), ('half', HALF, 'start.pth'))
    ),
    bad('pretrained-path-of-another', '--pretrained-path start.pth', 'is of another model', PLAIN),
    bad('initial-checkpoint-without-ema', '--initial-checkpoint start.pth --use-ema', '--use-ema', HALF),
    # a teacher
    bad('teacher-unknown', '--kd-model-name resnet181', 'resnet18'),
    bad('teacher-tag', '--kd-model-name resnet18.a1_in2k', 'resnet18.a1_in1k'),
    bad('teacher-without-weights', '--kd-model-name resnet34_pst', 'resnet34_pst'),
    bad('teacher-of-other-classes', '--kd-model-name test_resnet_pst', 'knows 10 classes'),
    bad('teacher-missing', '--kd-model-name nowhere/last.pth.tar', 'nowhere/last.pth.tar'),
    bad('teacher-empty', '--kd-model-name start.pth', 'start.pth', EMPTY),
    bad('teacher-without-an-architecture', '--kd-model-name start.pth', 'does not name a known architecture', PLAIN),
    # sparsity
    bad('sparsity-negative', '--sparsity-weight -1', '--sparsity-weight'),
    bad('sparsity-no-number', '--sparsity-weight nan', '--sparsity-weight'),
    bad('sparsity-of-a-vit', '--model test_vit --img-size 160 --sparsity-weight 0.1', 'test_vit has none'),
    # balance and hard examples
    bad('sampler-unknown', '--sampler uniform', "got 'uniform'"),
    bad('sampler-of-kept-workers', '--sampler sqrt --use-multi-epochs-loader', '--use-multi-epochs-loader'),
    bad('weights-missing', '--hard-examples none.csv', 'none.csv is no file'),
    bad('weights-a-folder', '--hard-examples images', 'images is no file'),
    bad('weights-a-pipe', '--hard-examples bad.yaml', 'bad.yaml is no file', a_pipe),
    bad('weights-empty', '--hard-examples w.csv', 'w.csv is empty', write('w.csv', '')),
    bad('weights-binary', '--hard-examples w.csv', 'w.csv', write('w.csv', b'PK\3\4\0\0\xff\xfe')),
    bad('weights-without-column', '--hard-examples w.csv', 'no column weight', weigh('image,loss\nclass0/0.png,1\n')),
    bad('weights-cut-off', '--hard-examples w.csv', 'line 3', weigh('image,weight\nclass0/0.png,1\nclass0/1.p')),
    bad('weights-negative', '--hard-examples w.csv', 'line 2 gives class0/0.png',
        weigh('image,weight\nclass0/0.png,-1\n')),
    bad('weights-no-number', '--hard-examples w.csv', 'the weight nan', weigh('image,weight\nclass0/0.png,nan\n')),
    bad('weights-huge', '--hard-examples w.csv', '1e300', weigh('image,weight\nclass0/0.png,1e300\n')),
    bad('weights-twice', '--hard-examples w.csv', 'names class0/0.png again',
        weigh('image,weight\nclass0/0.png,1\nclass0/0.png,1\n')),
    bad('weights-of-others', '--hard-examples w.csv', 'none of the training',
        weigh('image,weight\ntrain/class0/0.png,1\n')),
    bad('weights-of-nothing', '--hard-examples w.csv', 'nothing to draw from',
        weigh('image,weight\n' + ''.join(f'class{c}/{i}.png,0\n' for c in range(3) for i in range(16)))),
    bad('weights-that-leave-a-class-out', '--hard-examples w.csv --logit-adjust 1', '--logit-adjust 1',
        weigh('image,weight\n' + ''.join(f'class1/{i}.png,0\n' for i in range(16)))),
    bad('adjust-zero', '--logit-adjust 0', '--logit-adjust'),
    bad('adjust-infinite', '--logit-adjust inf', '--logit-adjust'),
    bad('adjust-binary', '--logit-adjust 1 --bce-loss', '--bce-loss'),
    bad('fraction-zero', '--hard-loss-fraction 0', '--hard-loss-fraction'),
    bad('fraction-above-one', '--hard-loss-fraction 1.5', '--hard-loss-fraction'),
    bad('loss-warmup-alone', '--hard-loss-warmup 2', '--hard-loss-warmup 2'),
    bad('loss-warmup-negative', '--hard-loss-fraction 0.5 --hard-loss-warmup -1', '--hard-loss-warmup'),
    bad('rare-aa-alone', '--rare-aa rand-m9', '--rare-below'),
    bad('rare-below-alone', '--rare-below 9', '--rare-aa'),
    bad('rare-aa-unknown', '--rare-aa autoaugment --rare-below 9', '--rare-aa'),
    bad('rare-below-one', '--rare-aa rand-m9 --rare-below 0', '--rare-below'),
    bad('rare-aa-without-augmentation', '--rare-aa rand-m9 --rare-below 9 --no-aug', '--no-aug'),
    bad('rare-aa-on-the-device', '--rare-aa rand-m9 --rare-below 9 --data-on-device', '--rare-aa rand-m9'),
    # YAML
    config('latin-1', 'experiment: Größe'.encode('latin-1'), 'bad.yaml, line 1 is not text in UTF-8'),
    config('key-twice', 'epochs: 1\nlr: 0.1\nepochs: 2', "line 3: 'epochs' is there twice"),
    config('base-8', 'seed: 010', 'bad.yaml, line 1: seed: 010'),
    config('base-60', 'lr: 1:30', 'bad.yaml, line 1: lr: 1:30'),
    config('date', 'experiment: 2020-01-01', 'experiment: 2020-01-01 is a date'),
    config('code', 'experiment: !!python/object/apply:os.system [ls]', 'python/object'),
    config('bomb', 'a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n' + ''.join(
        f'{chr(98 + i)}: &{chr(98 + i)} [{", ".join([f"*{chr(97 + i)}"] * 10)}]\n' for i in range(9)), 'aliases'),
    config('deep', 'a: ' + '[' * 5000, 'too deeply'),
    config('tab', 'epochs: 1\n\tlr: 0.1', 'bad.yaml, line 2 is not valid YAML'),
    config('two-documents', 'epochs: 1\n---\nlr: 0.1', 'bad.yaml, line 2 is not valid YAML'),
    config('key-of-a-number', '5: 1', 'unknown key 5'),
    config('switch-for-a-text', 'experiment: no', 'experiment must be a text'),
    config('names-of-arguments', 'model_kwargs: {1: 2}', 'model_kwargs must be key=value pairs'),
    config('value-of-a-flag', 'aa: rand-x9', 'bad.yaml: aa'),
    config('value-endless', f'scale: {list(range(999))}', 'scale'),
    BadInput('config-a-folder', [*WORDS, '--config', 'images'], 'images is a folder'),
    BadInput('config-a-pipe', [*WORDS, '--config', 'bad.yaml'], 'bad.yaml is a folder, or no ordinary file', a_pipe),
    # the run
    bad('data-twice', 'images2', "'images2'"),
    bad('eval-metric', '--eval-metric f1', '--eval-metric'),
    bad('experiment-outside', '--experiment ../run', "'../run'"),
    bad('output-is-a-file', '--output file.txt', 'file.txt', write('file.txt', 'mine')),
    bad('number-absurd', f'--epochs {10 ** 20}', '--epochs'),
]


@parametrize(TABLE)
def test_train_refuses(row, tmp_path, images, monkeypatch, capfd):
    (tmp_path / 'images').symlink_to(images)
    refused(row, tmp_path, monkeypatch, capfd)
    assert not list(tmp_path.glob('runs/*/*.tar'))


@pytest.mark.parametrize('code', ['1 / 0', 'import sys; sys.exit(3)', 'def f(:'])
def test_a_module_that_breaks_on_import_is_named(code, tmp_path, images, monkeypatch, capfd):
    name = f'broken_{len(code)}'
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / 'images').symlink_to(images)
    refused(bad('import', f'--device-modules {name}', name, write(f'{name}.py', code)), tmp_path, monkeypatch, capfd)


def test_nothing_is_calculated_where_the_size_fits(monkeypatch):
    monkeypatch.setattr(dry_run, '_run_once', None)
    for name in ('test_resnet_pst', 'test_vit', 'test_convnext', 'test_efficientnet'):
        model = timm.create_model(name)
        total, largest = dry_run._try_forward(None, model, (3, 160, 160))
        assert 0 < largest < total and not next(model.parameters()).is_meta and model.training
