"""The card of a model shows what strangers chose, and is the same card whatever they chose."""
import re
import shlex
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

import pst_timm
from pst_timm.checkpoints.reading import Checkpoint
from pst_timm.hub.card import CITATION, Accuracy, model_card
from tests.checkpoints.helpers import build

BREAKING = [
    '\n---\nlicense: mit\n---\n', '```\n<script>alert(1)</script>\n```sh\nrm -rf ~', '![x](javascript:alert(1))',
    '| a | b |\n|---|---|', '</td><td>', "'; rm -rf ~; '", '$(reboot)', '# heading', '\u2028# heading', '~~~', '-->',
    '[a]: x', 'www.a.b https://a.b']
NASTY = st.text(alphabet='`|<>&*_[]()!#~\\:/-\n\r\u202e \'";a', min_size=1, max_size=40) | st.text(min_size=1)


@pytest.fixture(scope='module')
def model():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('pst_timm.hub.card.count_gmacs', lambda model, size: 0.017)  # which takes its time
        yield build().requires_grad_(False)


def card_of(model, text):
    """The card where everything that may be foreign is the same text."""
    cfg = dict(model.pretrained_cfg)
    model.pretrained_cfg = dict(cfg, interpolation=text, label_names=[text, 'b', text])
    recipe = {'opt': text, 'opt_kwargs': {'name': text}, 'aa': [text]}
    checkpoint = Checkpoint(
        Path('x.pth.tar'), {}, 'test_resnet_pst', args={'dataset': text}, recipe=recipe, epoch=1, ema=False)
    try:
        return model_card('acme/tiny', checkpoint, model, Accuracy(1., 2., 64, 0.9, text, 'by hand'), text), recipe
    finally:
        model.pretrained_cfg = cfg


def parts(card):
    """Front matter, the text outside code, and the blocks of code by their language, as CommonMark finds them."""
    front, body = re.fullmatch(r'---\n(.*?)\n---\n(.*)', card, re.DOTALL).groups()
    outside, blocks, ticks = [], [], None
    for line in body.split('\n'):
        if ticks is None and (found := re.match(r' {0,3}(`{3,}|~{3,})(.*)', line)):
            ticks = found[1]
            blocks.append((found[2], []))
        elif ticks is not None and re.fullmatch(rf' {{0,3}}{ticks[0]}{{{len(ticks)},}}\s*', line):
            ticks = None
        else:
            (outside if ticks is None else blocks[-1][1]).append(line)
    assert ticks is None, 'a block of code is open at the end'
    return front, outside, blocks


def shape(card):
    front, outside, blocks = parts(card)
    return (
        sorted(set(yaml.safe_load(front)) - {'datasets'}),  # only for what is called as data on the Hub are
        [re.sub(r'(# tiny).*', r'\1', line) for line in outside if line.startswith('#')],
        [len(re.findall(r'(?<!\\)(?:\\\\)*\|', line)) for line in outside if line.startswith('|')],
        [len(re.findall(r'(?<!\\)(?:\\\\)*\]\(', line)) for line in outside], [language for language, _ in blocks])


def broken_out(function):
    """Add the texts that are known to break out to those that hypothesis finds."""
    for text in BREAKING:
        function = example(text)(function)
    return function


@broken_out
@settings(max_examples=60, deadline=None)
@given(NASTY)
def test_foreign_text_changes_no_more_than_the_text(model, text):
    card, recipe = card_of(model, text)
    front, outside, blocks = parts(card)
    assert shape(card) == shape(card_of(model, 'name')[0])
    text_alone = '\n'.join(outside)
    assert not re.search('<[A-Za-z/!?]', text_alone) and '\u202e' not in card
    head = yaml.safe_load(front)
    assert head['license'] == 'apache-2.0' and head['tags'][0] == 'image-classification'
    code = {language: '\n'.join(lines) for language, lines in blocks}
    assert yaml.safe_load(code['yaml']) == recipe, 'the recipe is still what it was'
    for language, lines in blocks:
        if language == 'sh':
            [command] = lines
            assert len(shlex.split(command)) in (8, 13), 'one command, with one word for what is foreign'
            assert not re.search(r'[;$`|&]', re.sub(r"'[^']*'", '', command.replace("'\"'\"'", '')))


def test_an_endless_recipe_is_left_out(model):
    checkpoint = Checkpoint(Path('x'), {}, 'test_resnet_pst', recipe={'opt': 'a' * 10 ** 6})
    card = model_card('acme/tiny', checkpoint, model)
    assert len(card) < 10 ** 4 and 'How the model was trained did not come with the weights' in card


@pytest.mark.parametrize('make, strides', [
    (build, '2 to 32'), (lambda: build(output_stride=8), '2 to 8'),
    (lambda: pst_timm.create_pst('convnext_atto', num_classes=3), '4 to 32'),
], ids=['as it is', 'output_stride', 'a patch stem'])
def test_the_strides_are_those_of_the_maps(model, make, strides):
    """`model` is asked for since the multiply-adds are then not counted."""
    card = model_card('acme/tiny', Checkpoint(Path('x'), {}, 'test_resnet_pst'), make())
    assert re.findall(r'Feature maps at strides (\d+ to \d+)', card) == [strides]


def test_a_calibrated_model_is_called_so(model):
    checkpoint = Checkpoint(Path('x'), {}, 'test_resnet_pst')
    model.pretrained_cfg['temperature'] = 1.25
    card = model_card('acme/tiny', checkpoint, model)
    assert 'Probabilities are calibrated (T = 1.25' in card and 'not calibrated' not in card
    del model.pretrained_cfg['temperature']
    assert 'Probabilities are not calibrated.' in model_card('acme/tiny', checkpoint, model)


def test_the_authors_are_those_whom_the_package_cites():
    root = Path(__file__).resolve().parents[2]
    cited = yaml.safe_load((root / 'CITATION.cff').read_text(encoding='utf-8'))['preferred-citation']
    names = ' and '.join(f'{a["family-names"]}, {a["given-names"]}' for a in cited['authors'])
    assert f'author  = {{{names}}}' in CITATION and cited['title'] in CITATION
    assert CITATION in (root / 'README.md').read_text(encoding='utf-8')
