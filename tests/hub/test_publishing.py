"""From a checkpoint to a live Hub, and everything that may go wrong on the way."""
import contextlib
import json
import os
import re
import stat

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from pst_timm.checkpoints import load_model
from pst_timm.checkpoints.facts import describe
from pst_timm.checkpoints.fetching import check_fetchable
from pst_timm.checkpoints.folder import save_folder
from pst_timm.cli import main
from pst_timm.engine import parse_train_args
from pst_timm.engine.flags import recipe
from pst_timm.hub.publishing import publish
from pst_timm.utils.errors import PSTError, Unavailable
from tests.checkpoints.helpers import Payload, build, images, logits, run_args, save_checkpoint
from tests.helpers import randomize

REPO = 'acme/tiny'
FILES = ['README.md', 'config.json', 'model.safetensors']
RECIPE = {
    'model': 'test_resnet_pst', 'model_kwargs': {'topk': 0}, 'device_modules': ['pst_timm'], 'img_size': 64,
    'trunk_checkpoint': 'test_resnet.r160_in1k', 'opt': 'adamw', 'lr': 0.003, 'epochs': 2, 'scale': [0.5, 1.0]}


def facts(**entries):
    """What a run of today tells in its checkpoints."""
    cfg = {
        'num_classes': 3, 'input_size': [3, 64, 64], 'mean': [0.5] * 3, 'std': [0.25] * 3, 'interpolation': 'bilinear',
        'crop_pct': 1.0, 'label_names': ['cat', 'dog', 'newt']}
    return {'arch': 'test_resnet_pst', 'pretrained_cfg': cfg, 'recipe': RECIPE, **entries}


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint that could come from a run."""
    return save_checkpoint(tmp_path / 'last.pth.tar', build())


def fails(capsys, path, repo_id=REPO, words=()):
    """Exit code and message of a publish command that fails, which must be one paragraph."""
    code = main(['publish', str(path), '--repo-id', repo_id, *words])
    said = capsys.readouterr().err  # after what the client tells of its attempts
    message = said[said.index('pst-timm publish: error: '):]
    assert code != 0 and message.count('\n') == 1 and message.endswith('.\n')
    return code, message


def test_a_repository_has_three_files_and_no_pickle(hub, checkpoint, capsys):
    assert main(['publish', str(checkpoint), '--repo-id', REPO]) == 0
    assert f'{hub.url}/{REPO}/commit/' in capsys.readouterr().out
    assert hub.names(REPO) == FILES
    loaded = timm.create_model(f'hf-hub:{REPO}', pretrained=True)
    assert torch.equal(logits(loaded), logits(build()))
    assert 'notes' not in loaded.pretrained_cfg, 'a checksum must not outlive the weights it is of'
    assert len(timm.create_model(f'hf-hub:{REPO}', pretrained=True, features_only=True)(images(size=96))) == 5


def test_config_tells_what_the_weights_need(hub, tmp_path):
    model = build(in_chans=1, topk=4, fine_fusion='joint')
    args = run_args(model_kwargs={'topk': 4, 'fine_fusion': 'joint', 'pst_depth': 1})
    path = save_checkpoint(tmp_path / 'last.pth.tar', model, args=args)
    publish(path, REPO, class_names=['cat', 'dog', 'newt'])
    config = json.loads(hub.read(REPO, 'config.json'))
    assert (config['architecture'], config['num_classes']) == ('test_resnet_pst', 3)
    assert config['label_names'] == ['cat', 'dog', 'newt']
    assert config['model_args']['topk'] == 4 and config['model_args']['fine_fusion'] == 'joint'
    cfg = config['pretrained_cfg']
    assert (cfg['input_size'], cfg['mean'], cfg['std'], cfg['crop_pct']) == ([1, 64, 64], [0.5], [0.25], 1.0)
    assert 'secret' not in json.dumps(config) + hub.read(REPO, 'README.md').decode()
    loaded = timm.create_model(f'hf-hub:{REPO}', pretrained=True)
    x = images(channels=1)
    assert torch.equal(logits(loaded, x), logits(model, x))
    assert loaded.pretrained_cfg['label_names'] == ['cat', 'dog', 'newt']


def test_the_moving_average_is_preferred_and_said(hub, tmp_path, capsys):
    plain, ema = build(), randomize(build(), seed=1)
    path = save_checkpoint(tmp_path / 'last.pth.tar', plain, ema, args=run_args(model_ema=True))
    for words, said, model, measured in (
            ((), 'the moving average (EMA)', ema, True), (('--no-use-ema',), 'no EMA', plain, False)):
        assert main(['publish', str(path), '--repo-id', REPO, *words]) == 0
        assert f'Weights: {said}' in capsys.readouterr().out
        saved = hub.read(REPO, 'model.safetensors')
        (tmp_path / 'saved.safetensors').write_bytes(saved)
        assert torch.equal(load_file(tmp_path / 'saved.safetensors')['fc.weight'], model.fc.weight)
        # the run's accuracy is that of the average
        assert ('71.50' in hub.read(REPO, 'README.md').decode()) == measured
    assert len(hub.repositories[REPO].commits) == 3


@pytest.mark.parametrize('name', ['hf-hub:acme/tiny', 'local-dir:{folder}', 'test_resnet_pst.digits'])
def test_a_model_that_was_trained_further(hub, tmp_path, name):
    deep = {'pst_depth': 2} if ':' in name else {}
    first = save_checkpoint(tmp_path / 'first.pth.tar', build(**deep), args=run_args(model_kwargs=deep))
    publish(first, REPO, folder=tmp_path / 'folder')
    model = randomize(build(num_classes=5, **deep), seed=1)
    name = name.format(folder=tmp_path / 'folder')
    args = run_args(model=name, img_size=None, mean=None, std=None, crop_pct=None)
    config = timm.data.resolve_data_config(model=load_model(name))
    second = save_checkpoint(
        tmp_path / 'second.pth.tar', model, arch=name, args=args, facts=describe(model, name, {}, config))
    publish(second, REPO)
    config = json.loads(hub.read(REPO, 'config.json'))
    assert (config['architecture'], config['num_classes']) == ('test_resnet_pst', 5)
    cfg = config['pretrained_cfg']
    assert (cfg['input_size'], cfg['crop_pct']) == ([3, 64, 64], 1.0), 'the preprocessing it was trained with'
    assert cfg['mean'] == ([0.5] * 3 if deep else list(timm.data.IMAGENET_DEFAULT_MEAN))
    assert torch.equal(logits(timm.create_model(f'hf-hub:{REPO}', pretrained=True)), logits(model))


def test_a_branch_and_a_private_repository(hub, checkpoint, monkeypatch):
    publish(checkpoint, REPO, private=True)
    main_head = hub.repositories[REPO].branches['main']
    publish(save_checkpoint(checkpoint, randomize(build(), seed=1)), REPO, revision='v2')
    assert hub.repositories[REPO].private and hub.repositories[REPO].branches['main'] == main_head
    loaded = timm.create_model(f'hf-hub:{REPO}@v2', pretrained=True)
    assert torch.equal(loaded.fc.weight, randomize(build(), seed=1).fc.weight)
    monkeypatch.setenv('HF_TOKEN', 'hf_bob')
    with pytest.raises(OSError, match='404'):
        timm.create_model(f'hf-hub:{REPO}@main', pretrained=True, cache_dir=hub.folder / 'bob')


# the card

def numbers_of(card, row):
    return re.search(rf'^\| {row} \| (.*) \|$', card, re.MULTILINE)[1]


def test_the_card_tells_what_was_measured(hub, tmp_path):
    model = build(num_classes=4)
    run = tmp_path / 'run'
    run.mkdir()
    save_checkpoint(run / 'model_best.pth.tar', model, args=run_args(num_classes=4))
    (run / 'summary.csv').write_text(
        'epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\n0,2,2,11.25,55.5,0.1\n1,1,1,71.5,93.75,0.1\n')
    publish(run, REPO, license='cc-by-4.0')
    card = hub.read(REPO, 'README.md').decode()
    front = yaml.safe_load(card.split('---')[1])
    assert front['license'] == 'cc-by-4.0' and front['library_name'] == 'timm' and 'datasets' not in front
    assert numbers_of(card, 'parameters') == f'{sum(p.numel() for p in model.parameters()):,}'
    assert numbers_of(card, 'multiply-adds').startswith('0.017 G for one 64 x 64')
    assert numbers_of(card, 'scans') == '64 | 1.0 | coarse alone (`topk=0`) | 71.50 | 93.75'
    assert '11.25' not in card
    assert '@article{hu2025pyramid' in card and '## Limits' in card and '## Licence' in card
    # a checkpoint of before there were recipes
    assert 'How the model was trained did not come with the weights. The weights are those after epoch 2.' in card
    assert 'args.yaml' not in card and 'Measured in training, after epoch 2, the epoch that was best' in card


def test_the_card_is_titled_and_indexed(hub, checkpoint):
    publish(checkpoint, REPO)
    assert '\n# tiny: test_resnet_pst trained on scans\n' in hub.read(REPO, 'README.md').decode()
    publish(checkpoint, REPO, data_set='acme/scans')
    data = ModelCard(hub.read(REPO, 'README.md').decode()).data
    assert data.tags[:3] == ['image-classification', 'timm', 'pst_timm'] and data.datasets == ['acme/scans']
    assert (data.license, data.library_name, data.pipeline_tag) == ('apache-2.0', 'timm', 'image-classification')
    [found] = data.eval_results
    assert (data.model_name, found.dataset_name, found.metric_type, found.metric_name, found.metric_value) == (
        'tiny', 'acme/scans', 'accuracy', 'top-1 (%)', 71.5)
    publish(checkpoint, REPO, topk=8)  # with which nothing was measured
    assert 'model-index' not in hub.read(REPO, 'README.md').decode()


def test_the_command_of_the_card_starts_the_same_run(hub, tmp_path):
    path = save_checkpoint(tmp_path / 'last.pth.tar', build(), facts=facts())
    publish(path, REPO)
    card = hub.read(REPO, 'README.md').decode()
    (tmp_path / 'args.yaml').write_text(re.search(r'```yaml\n(.*?)```', card, re.DOTALL)[1])
    command = re.search(r'^pst-timm train (.*)$', card, re.MULTILINE)[1]
    words = command.replace('args.yaml', str(tmp_path / 'args.yaml')).split()
    args = parse_train_args(words)
    assert args.data_dir == 'PATH' and args.trunk_checkpoint == 'test_resnet.r160_in1k' and args.opt == 'adamw'
    # nothing but what differs from the defaults, and no folder of the machine
    assert recipe(args) == yaml.safe_load((tmp_path / 'args.yaml').read_text()) == RECIPE
    assert 'secret' not in card and 'The weights are those after epoch 2.' in card
    publish(save_checkpoint(path, build(), facts=facts(), args=run_args(dataset='torch/cifar10')), REPO)
    assert '--data-dir PATH --dataset torch/cifar10\n' in hub.read(REPO, 'README.md').decode()


def test_class_names_come_from_the_checkpoint(hub, tmp_path):
    path = save_checkpoint(tmp_path / 'last.pth.tar', build(), facts=facts())
    publish(path, REPO)
    config, card = (hub.read(REPO, name).decode() for name in ('config.json', 'README.md'))
    assert config.count('newt') == 1 and json.loads(config)['label_names'] == ['cat', 'dog', 'newt']
    assert numbers_of(card, 'classes') == '3: cat, dog, newt' and "model.pretrained_cfg['label_names']" in card
    assert 'label_descriptions' not in card
    loaded = timm.create_model(f'hf-hub:{REPO}', pretrained=True)
    assert loaded.pretrained_cfg['label_names'] == ['cat', 'dog', 'newt']
    publish(path, REPO, class_names=['a|b', 'b', 'c'])
    config, card = (hub.read(REPO, name).decode() for name in ('config.json', 'README.md'))
    assert 'newt' not in config + card and json.loads(config)['label_names'] == ['a|b', 'b', 'c']
    assert numbers_of(card, 'classes') == r'3: a\|b, b, c'
    with pytest.raises(PSTError, match='2 class names for a model of 3 classes'):
        publish(path, REPO, class_names=['a', 'b'])


def test_descriptions_of_the_classes_go_along(hub, tmp_path):
    told, words = facts(), {'cat': 'a cat', 'dog': 'a dog', 'newt': 'an amphibian'}
    told['pretrained_cfg']['label_descriptions'] = words
    publish(save_checkpoint(tmp_path / 'last.pth.tar', build(), facts=told), REPO)
    assert timm.create_model(f'hf-hub:{REPO}', pretrained=True).pretrained_cfg['label_descriptions'] == words
    assert 'names = [words[name] for name in names]' in hub.read(REPO, 'README.md').decode()


def test_many_class_names_are_in_the_config_alone(hub, tmp_path):
    names = [f'class{i}' for i in range(12)]
    publish(save_checkpoint(tmp_path / 'last.pth.tar', build(num_classes=12)), REPO, class_names=names)
    shown = numbers_of(hub.read(REPO, 'README.md').decode(), 'classes')
    assert shown == f'12: {", ".join(names[:10])}, ... (all in config.json)'


@pytest.mark.parametrize('umask, mode', [(0o022, 0o644), (0o077, 0o600)])
def test_files_have_the_modes_of_the_umask(checkpoint, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        publish(checkpoint, REPO, dry_run=True, folder=tmp_path / 'published')
        save_folder(build(), tmp_path / 'saved')
    finally:
        os.umask(before)
    for folder, names in (('published', FILES), ('saved', FILES[1:])):
        found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / folder).iterdir()}
        assert found == dict.fromkeys(names, mode)


def test_the_card_is_well_formed_and_its_snippets_run(hub, checkpoint, tmp_path, monkeypatch):
    publish(checkpoint, REPO)
    card = hub.read(REPO, 'README.md').decode()
    assert card.count('```') % 2 == 0
    for table in re.findall(r'(?:^\|.*\|\n)+', card, re.MULTILINE):
        assert len({len(re.findall(r'(?<!\\)\|', line)) for line in table.splitlines()}) == 1
    monkeypatch.chdir(tmp_path)
    Image.new('RGB', (80, 70), 'grey').save('image.jpg')
    names = {}
    with contextlib.redirect_stdout(None):
        for snippet in re.findall(r'```python\n(.*?)```', card, re.DOTALL):
            exec(snippet, names)
    assert names['probabilities'].shape == (1, 3) and len(names['maps']) == 5
    assert names['embedding'].shape == (1, 128)


def test_the_card_takes_the_results_of_validate(hub, checkpoint, tmp_path):
    row = dict(model='test_resnet_pst', top1=80.5, top5=99.25, img_size=96, crop_pct=0.875, interpolation='bicubic')
    single, sweep = tmp_path / 'single.json', tmp_path / 'sweep.csv'
    single.write_text(json.dumps([row]))
    rows = [dict(row, topk=0, fine_fusion='coarse'), dict(row, topk=8, fine_fusion='joint', top1=81.25)]
    sweep.write_text('\n'.join([','.join(rows[0]), *(','.join(map(str, r.values())) for r in rows)]))

    publish(checkpoint, REPO, results=single, data_set='acme/Tiny-scans')
    card, config = hub.read(REPO, 'README.md').decode(), json.loads(hub.read(REPO, 'config.json'))
    assert numbers_of(card, 'acme/Tiny-scans') == '96 | 0.875 | coarse alone (`topk=0`) | 80.50 | 99.25'
    assert yaml.safe_load(card.split('---')[1])['datasets'] == ['acme/Tiny-scans']
    assert '71.5' not in card and f'--model hf-hub:{REPO} --pretrained --img-size 96 --crop-pct 0.875' in card
    assert 'resolve_data_config(model=model, use_test_size=True)' in card
    cfg = config['pretrained_cfg']
    assert (cfg['input_size'], cfg['test_input_size'], cfg['test_crop_pct']) == ([3, 64, 64], [3, 96, 96], 0.875)

    publish(checkpoint, REPO, results=sweep, topk=8, fine_fusion='joint')
    card, config = hub.read(REPO, 'README.md').decode(), json.loads(hub.read(REPO, 'config.json'))
    assert '| coarse and fine, `topk=8`, `joint` fusion | 81.25 |' in card
    assert '--model-kwargs topk=8 fine_fusion=joint' in card
    assert (config['model_args']['topk'], config['model_args']['fine_fusion']) == (8, 'joint')
    publish(checkpoint, REPO, results=sweep)
    assert '| coarse alone (`topk=0`) | 80.50 |' in hub.read(REPO, 'README.md').decode()
    publish(checkpoint, REPO, topk=8)  # with which nothing was measured
    assert 'Not measured for these weights' in hub.read(REPO, 'README.md').decode()
    for topk, message in ((4, 'have 0 rows for topk=4'), (-1, 'non-negative')):
        with pytest.raises(PSTError, match=message):
            publish(checkpoint, REPO, results=sweep, topk=topk)
    single.write_text('{}')
    with pytest.raises(PSTError, match='is not a results file'):
        publish(checkpoint, REPO, results=single)


def test_results_of_other_weights_are_refused(hub, tmp_path):
    path = save_checkpoint(tmp_path / 'last.pth.tar', build(), build(), args=run_args(model_ema=True))
    row = dict(top1=80.5, top5=99.25, img_size=96, crop_pct=0.875, interpolation='bicubic')
    results = tmp_path / 'results.json'
    results.write_text(json.dumps([dict(row, model='resnet18_pst')]))
    with pytest.raises(PSTError, match='results are those of resnet18_pst'):
        publish(path, REPO, results=results)
    results.write_text(json.dumps([dict(row, model='test_resnet_pst', checkpoint=str(path))]))
    with pytest.raises(PSTError, match=r'whether the moving average in .* was measured'):
        publish(path, REPO, results=results)
    publish(path, REPO, results=results, use_ema=False)
    results.write_text(json.dumps([dict(row, model='local-dir:output/publish/tiny')]))
    assert publish(path, REPO, results=results).accuracy.top1 == 80.5


@pytest.mark.parametrize('change, culprit', [
    ({'top1': 1e9}, 'top1 = 1000000000.0'), ({'top1': -1}, 'top1 = -1.0'), ({'top1': float('nan')}, 'top1 = nan'),
    ({'top5': float('inf')}, 'top5 = inf'), ({'top5': 3}, 'top5 = 3.0, less than top1'),
    ({'img_size': 0}, 'img_size = 0'),
    ({'img_size': 10 ** 9}, 'img_size = 1000000000'), ({'crop_pct': float('nan')}, 'crop_pct = nan')])
def test_results_that_cannot_be_are_not_published(change, culprit, hub, checkpoint, tmp_path, capsys):
    row = dict(model='test_resnet_pst', top1=80.5, top5=99.25, img_size=96, crop_pct=0.875, interpolation='bicubic')
    (tmp_path / 'results.json').write_text(json.dumps([{**row, **change}]))
    code, message = fails(capsys, checkpoint, words=['--results', str(tmp_path / 'results.json')])
    assert code == 1 and culprit in message and not hub.requests


@pytest.mark.parametrize('metric', [1e9, -3., float('nan')])
def test_a_metric_that_cannot_be_is_not_published(metric, hub, tmp_path, capsys):
    path = save_checkpoint(tmp_path / 'last.pth.tar', build(), metric=metric)
    code, message = fails(capsys, path)
    assert code == 1 and 'which cannot have been measured' in message and str(path) in message and not hub.requests


def test_what_is_replaced_is_said(hub, checkpoint, caplog):
    publish(checkpoint, REPO)
    assert not caplog.messages
    hub.commit(REPO, 'main', 'more', {'notes.md': b'by hand'})
    publish(checkpoint, REPO)
    message = caplog.messages[0]
    assert 'its model.safetensors, config.json, README.md will be replaced' in message and 'notes.md' in message


def test_without_a_measurement_the_card_claims_nothing(hub, tmp_path, capsys):
    save_file(build().state_dict(), tmp_path / 'model.safetensors')
    timm.models.save_for_hf(build(), tmp_path, safe_serialization=True)
    assert main(['publish', str(tmp_path / 'model.safetensors'), '--repo-id', REPO]) == 0
    assert 'tells no accuracy' in capsys.readouterr().out
    card = hub.read(REPO, 'README.md').decode()
    assert 'Not measured for these weights.' in card and 'top-1 (%)' not in card


def test_a_dry_run_asks_nobody(hub, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv('HF_TOKEN')
    monkeypatch.chdir(tmp_path)
    assert main(['publish', str(checkpoint), '--repo-id', REPO, '--dry-run']) == 0
    assert 'nothing was published' in capsys.readouterr().out
    folder = tmp_path / 'output' / 'publish' / 'tiny'
    assert sorted(p.name for p in folder.iterdir()) == FILES and not hub.requests
    assert torch.equal(logits(timm.create_model(f'local-dir:{folder}', pretrained=True)), logits(build()))
    (folder / 'pytorch_model.bin').touch()
    _, message = fails(capsys, checkpoint, words=['--dry-run'])
    assert 'holds other files' in message


# what is refused before anything is sent

def test_weights_that_must_not_be_published(hub, tmp_path, capsys):
    nan = build()
    nan.layer1[0].conv1.weight.data[0, 0, 0, 0] = float('nan')
    plain = timm.create_model('test_resnet', num_classes=3)
    mark = tmp_path / 'executed'
    for name, model, entries, expected in (
            ('nan', nan, {}, 'NaN or infinite weights in 1 tensors, the first is layer1.0.conv1.weight'),
            ('other', build(pst_depth=2), {}, 'is not a checkpoint of test_resnet_pst'),
            ('plain', plain, {'arch': 'test_resnet'}, 'no architecture of this package'),
            ('unknown', build(), {'arch': 'resnet7'}, 'does not name an architecture that is known here'),
            ('evil', build(), {'args': Payload(mark)}, 'could run code'),
    ):
        path = save_checkpoint(tmp_path / f'{name}.pth.tar', model, **entries)
        code, message = fails(capsys, path)
        assert code == 1 and expected in message
    assert not mark.exists() and not hub.requests


def test_a_difference_between_checkpoint_and_folder_is_refused(hub, checkpoint, capsys, monkeypatch):
    def careless(model, folder, **kwargs):
        timm.models.save_for_hf(model, folder, **kwargs)
        path = f'{folder}/model.safetensors'
        weights = load_file(path)
        weights['fc.bias'] += 1e-3
        save_file(weights, path)

    monkeypatch.setattr('pst_timm.checkpoints.folder.save_for_hf', careless)
    code, message = fails(capsys, checkpoint)
    assert code == 1 and 'cannot be loaded again' in message  # the checksum sees it first
    monkeypatch.setattr('pst_timm.checkpoints.folder.digest_note', lambda weights: 'none')
    code, message = fails(capsys, checkpoint)
    assert code == 1 and 'gives other logits than the checkpoint' in message
    with pytest.raises(PSTError):
        publish(checkpoint, REPO, dry_run=True, folder=checkpoint.parent / 'folder')
    assert not list((checkpoint.parent / 'folder').iterdir())
    assert not hub.names(REPO) and hub.count('POST') == 0


@pytest.mark.parametrize('repo_id, message', [
    ('tiny', 'must name the owner too'),
    ('acme/ti ny', 'cannot name a repository'),
    ('bob/tiny', 'is not ours: the token is that of alice, who may write to alice, acme'),
])
def test_names_that_are_not_ours(hub, checkpoint, repo_id, message, capsys):
    hub.create('bob/tiny')
    code, said = fails(capsys, checkpoint, repo_id)
    assert code == 1 and message in said and hub.names('bob/tiny') == []


def test_foreign_content_is_not_overwritten(hub, checkpoint, capsys):
    hub.create(REPO)
    hub.commit(REPO, 'main', 'a model', {'config.json': b'{"architecture": "resnet50"}'})
    _, message = fails(capsys, checkpoint)
    assert 'another architecture (resnet50, not test_resnet_pst)' in message
    hub.commit(REPO, 'main', 'a pickle', {'pytorch_model.bin': b'x'}, deleted=['config.json'])
    _, message = fails(capsys, checkpoint)
    assert 'pytorch_model.bin, a pickle' in message
    assert hub.names(REPO) == ['pytorch_model.bin']


def test_no_token(hub, checkpoint, capsys, monkeypatch):
    monkeypatch.delenv('HF_TOKEN')
    code, message = fails(capsys, checkpoint)
    assert code == 1 and 'run `hf auth login`, or set HF_TOKEN' in message and not hub.requests


# what goes wrong on the way

@pytest.mark.parametrize('request_, kind, code, expected', [
    ('GET /api/whoami-v2', 401, 1, 'does not accept the access token'),
    ('GET /api/whoami-v2', 429, 75, 'rate limit'),
    ('POST /api/repos/create', 403, 1, 'may not write to acme/tiny'),
    ('POST /api/repos/create', 500, 75, 'fault of its own (HTTP 500)'),
    ('POST .*/preupload/', 401, 1, 'does not accept the access token'),
    ('POST .*/preupload/', 403, 1, 'may not write to acme/tiny'),
    ('POST .*/preupload/', 404, 1, 'knows no repository or branch'),
    ('POST .*/objects/batch', 429, 75, 'rate limit'),
    ('PUT /lfs/', 403, 1, 'may not write to acme/tiny'),
    ('PUT /lfs/', 500, 75, 'fault of its own (HTTP 500)'),
    ('PUT /lfs/', 'drop', 75, 'cannot be reached'),
    ('PUT /lfs/', 'corrupt', 1, 'other bytes than were sent (wrong hash)'),
    ('POST /lfs/verify', 422, 1, 'other bytes than were sent (wrong hash)'),
    ('POST .*/commit/', 401, 1, 'does not accept the access token'),
    ('POST .*/commit/', 409, 1, 'changed by someone else'),
    ('POST .*/commit/', 500, 75, 'fault of its own (HTTP 500)'),
    ('POST .*/commit/', 'drop', 75, 'cannot be reached'),
])
def test_failures_are_told_and_leave_nothing_half_published(hub, checkpoint, request_, kind, code, expected, capsys):
    failure = hub.fail(request_, kind)
    got, message = fails(capsys, checkpoint)
    assert got == code and expected in message and failure.seen
    assert hub.names(REPO) == []
    hub.failures.clear()
    assert main(['publish', str(checkpoint), '--repo-id', REPO]) == 0
    assert hub.names(REPO) == FILES


def test_a_failed_update_leaves_the_published_version(hub, checkpoint, capsys):
    publish(checkpoint, REPO)
    before = hub.read(REPO, 'model.safetensors')
    save_checkpoint(checkpoint, randomize(build(), seed=1))
    hub.fail('POST .*/commit/', 500)
    fails(capsys, checkpoint)
    assert hub.read(REPO, 'model.safetensors') == before and len(hub.repositories[REPO].commits) == 2


def test_an_upload_interrupted_twice_completes(hub, checkpoint):
    failure = hub.fail('PUT /lfs/', 'drop', times=2)
    publish(checkpoint, REPO)
    assert failure.seen == 2 and hub.count('PUT /lfs/') == 3 and hub.names(REPO) == FILES


def test_what_has_arrived_is_not_sent_again(hub, checkpoint, capsys):
    hub.fail('POST .*/commit/', 500, times=2)
    publish(checkpoint, REPO)
    assert hub.count('POST .*/commit/') == 3 and hub.count('PUT /lfs/') == 1
    # nor by another process, later
    save_checkpoint(checkpoint, randomize(build(), seed=1))
    failure = hub.fail('POST .*/commit/', 'drop')
    code, message = fails(capsys, checkpoint)
    assert code == 75 and 'run the same command again to go on' in message
    assert hub.count('PUT /lfs/') == 2
    failure.times = 0
    publish(checkpoint, REPO)
    assert hub.count('PUT /lfs/') == 2
    assert torch.equal(
        timm.create_model(f'hf-hub:{REPO}', pretrained=True).fc.weight, randomize(build(), seed=1).fc.weight)


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub, checkpoint):
    hub.fail('POST .*/commit/', 'lost', times=1)
    done = publish(checkpoint, REPO)
    assert hub.names(REPO) == FILES and len(hub.repositories[REPO].commits) == 2
    assert done.url.endswith(hub.repositories[REPO].branches['main'])


@pytest.mark.parametrize('request_', ['GET /api/whoami', 'POST /api/repos/create', 'PUT /lfs/', 'POST .*/commit/'])
def test_a_server_that_never_answers_is_waited_for_so_long(request_, hub, checkpoint, capsys, monkeypatch):
    monkeypatch.setattr('pst_timm.hub.upload.SLOWEST', 1e12)
    hub.fail(request_, 'stall')
    code, message = fails(capsys, checkpoint, words=['--timeout', '1'])
    assert code == 75 and 'did not answer within 1 s' in message and '--timeout' in message
    assert not hub.names(REPO) and hub.count(request_) == 1


def test_reading_waits_as_long_as_the_client_is_told(hub):
    hub.create(REPO)
    hub.fail('GET /api/models/', 'stall')
    with pytest.raises(Unavailable, match=r'no answer within 0\.2 s; HF_HUB_ETAG_TIMEOUT'):
        check_fetchable(f'hf-hub:{REPO}', timeout=0.2)


def test_the_network_is_down(hub, checkpoint, capsys, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', 'http://127.0.0.1:9')
    code, message = fails(capsys, checkpoint)
    assert code == 75 and 'cannot be reached' in message
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    code, message = fails(capsys, checkpoint)
    assert code == 75 and 'unset HF_HUB_OFFLINE' in message
