"""Figures show what the layers select, for any image a person may have; what cannot be drawn is explained."""
import re
import subprocess
import sys
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

import pst_timm
from pst_timm.commands import visualize as command
from pst_timm.data.images import find_images
from pst_timm.utils.errors import PSTError
from pst_timm.visualize import view as tool
from pst_timm.visualize.drawing import HEAD_COLORS, draw_sheet, draw_view
from pst_timm.visualize.view import look, visualize
from tests.helpers import randomize

pytest.importorskip('matplotlib')
NAMES = [f'a class with quite a long name ${i}_^' for i in range(10)]


def noise(shape=(70, 90, 3), seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / 'photo.png'
    Image.fromarray(noise()).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(('b/1.png', 'a/2.JPG', 'c.webp', 'a/1.jpeg')):
        path = tmp_path / 'photos' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(seed=i)).save(path)
    (tmp_path / 'photos' / 'notes.txt').write_text('no image')
    return tmp_path / 'photos'


def build(**kwargs):
    return randomize(timm.create_model('test_resnet_pst', num_classes=10, **kwargs)).eval()


@pytest.fixture
def seen(monkeypatch):
    """The models that the command draws, which it then does not."""
    models = []
    monkeypatch.setattr(tool, 'visualize', lambda source, model, *args, **kwargs: models.append(model) or [])
    return models


def panel(figure, title, nth=0):
    return [axes for axes in figure.axes if axes.get_title() == title][nth]


def drawn(axes, cell, columns, gid):
    """Indices of the tokens that are outlined in a panel, from where the outlines are."""
    tokens = []
    for patch in axes.patches:
        if patch.get_gid() == gid:
            (left, top), (right, bottom) = patch.get_bbox().get_points()
            row, col = int(top // cell), int(left // cell)
            # in the token and filling it
            assert row * cell <= top < bottom <= (row + 1) * cell and bottom - top > 0.7 * cell
            assert col * cell <= left < right <= (col + 1) * cell and right - left > 0.7 * cell
            tokens.append(row * columns + col)
    return sorted(tokens)


@pytest.mark.parametrize('img_size, topk, kwargs', [
    (96, 3, {}), (150, 5, {}), (97, 4, {'pst_depth': 2}), (64, 20, {}), (96, 5, {'output_stride': 16})])
def test_the_tokens_drawn_are_those_of_the_layer(photo, img_size, topk, kwargs):
    model = build(**kwargs)
    view = look(model, photo, topk, img_size=img_size)
    config = resolve_data_config({'img_size': img_size}, model=model)
    x = create_transform(**config)(Image.open(photo))[None]
    found = pst_timm.inspect_tokens(model, x, topk)
    tokens = found.blocks[-1]
    figure = draw_view(view)
    (H, W), (h, w) = tokens.fine_size, tokens.coarse_size
    fine_cell = 16
    coarse_cell = fine_cell * round(H / h)
    assert tokens.selected.shape[2] == min(topk, h * w)
    for head in range(2):
        selected = sorted(tokens.selected[0, head].tolist())
        children = sorted(c for c in tokens.children[0, head].flatten().tolist() if c >= 0)
        axes = panel(figure, f'Head {head + 1}: selected')
        assert drawn(axes, coarse_cell, w, 'coarse') == selected
        assert drawn(axes, fine_cell, W, 'fine') == children
        assert {patch.get_edgecolor()[:3] for patch in axes.patches} == {to_rgb(HEAD_COLORS[head])}
        veil = axes.images[-1].get_array()[..., 3]
        assert np.flatnonzero(veil == 0).tolist() == selected
        scores = panel(figure, f'Head {head + 1}: scores')
        assert set(drawn(scores, coarse_cell, w, 'coarse')) == set(selected)
        expected = tokens.scores[0, head] - tokens.scores[0, head].mean()
        np.testing.assert_allclose(scores.images[0].get_array().flatten(), expected, atol=1e-5)
        assert scores.images[0].get_interpolation() == 'nearest'
        # the map reaches over the whole panel, the image over its own pixels of it
        assert tuple(scores.images[0].get_extent()) == (0, w * coarse_cell, h * coarse_cell, 0)
        assert tuple(axes.images[0].get_extent()) == (0, img_size, img_size, 0)
    heat = panel(figure, 'Coarse attention').images[-1]
    np.testing.assert_allclose(
        heat.get_array() / 100, tokens.attention[0].mean(dim=(0, 1)).reshape(h, w), atol=1e-6)
    assert view.attention.sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(heat.get_clim(), [heat.get_array().min(), heat.get_array().max()])
    np.testing.assert_allclose(view.coarse, found.coarse[0].softmax(dim=0), atol=1e-6)
    np.testing.assert_allclose(view.fine, found.fine[0].softmax(dim=0), atol=1e-6)
    assert not np.allclose(view.coarse, view.fine)


def to_rgb(color):
    from matplotlib.colors import to_rgb

    return to_rgb(color)


def test_people_read_words(photo):
    model = timm.create_model('resnet18_pst', pretrained=True, topk=2).eval()
    assert look(model, photo, img_size=64).class_names[0] == 'goldfish'
    model.reset_classifier(3)
    assert look(model, photo, img_size=64).class_names == ['class 0', 'class 1', 'class 2']


def test_predictions_are_named_and_in_order(photo):
    view = look(build(), photo, 3, img_size=64, class_names=NAMES)
    for figure, most in ((draw_view(view), 5), (draw_sheet([view]), 3)):
        [axes] = [a for a in figure.axes if a.texts]
        written = [text.get_text() for text in axes.texts]
        likeliest = np.argsort(-np.maximum(view.coarse, view.fine))[:most]
        shown = [text for text in written if text.startswith('a class')]
        assert len(shown) == most
        for name, i in zip(shown, likeliest):
            assert NAMES[i].startswith(name.rstrip('…'))
            assert {f'{100 * view.coarse[i]:.1f}', f'{100 * view.fine[i]:.1f}'} <= set(written)
        widths = [bar.get_width() for bar in axes.patches]
        expected = np.stack([view.coarse, view.fine])[:, likeliest].T.flatten()
        np.testing.assert_allclose(widths, expected * max(widths) / expected.max(), rtol=1e-5)


def written(axes):
    """The texts that can be seen in a panel and beside it."""
    texts = [*axes.texts, axes.title]
    if axes.axison:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            # ticks beyond the end of a colour bar are not drawn
            ticks = [label for at, label in zip(axis.get_ticklocs(), axis.get_ticklabels()) if low <= at <= high]
            texts += [axis.label, *ticks]
    return [text for text in texts if text.get_text()]


@pytest.mark.parametrize('heads, size', [(1, (81, 81)), (2, (96, 160)), (4, (160, 96)), (8, (81, 81))])
def test_no_text_overlaps_or_leaves_the_figure(photo, heads, size):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    model = build(pst_head_dim=32 // heads, pretrained_cfg_overlay=dict(input_size=(3, *size)))
    view = look(model, photo, 3, class_names=NAMES)
    assert view.pixels.shape == (*size, 3) and len(view.scores) == heads
    for figure in (draw_view(view), draw_sheet([view, view])):
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        texts = [*figure.texts, *(text for axes in figure.axes for text in written(axes))]
        boxes = [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in texts]
        seen = ' '.join(text for text, _ in boxes)
        assert len(boxes) > 20 and 'share (%)' in seen and 'fine attention (gate) over k = 3 of' in seen
        for text, box in boxes:
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text
        for (a, first), (b, second) in combinations(boxes, 2):
            beside = first.x1 <= second.x0 or second.x1 <= first.x0
            # the boxes have room for letters that go far up or down, which few do
            above = first.y1 <= second.y0 + 3 or second.y1 <= first.y0 + 3
            assert beside or above, f'{a!r} overlaps {b!r}'


def test_the_input_is_shown_as_the_network_sees_it(photo):
    model = build(pretrained_cfg_overlay=dict(input_size=(3, 64, 64), crop_pct=1.0, mean=(0.2, 0.3, 0.4)))
    Image.fromarray(noise((64, 64, 3))).save(photo)
    view = look(model, photo, 1)
    np.testing.assert_allclose(view.pixels, noise((64, 64, 3)) / 255, atol=1e-5)
    np.testing.assert_array_equal(panel(draw_view(view), 'Input').images[0].get_array(), view.pixels)


def test_a_grey_model_takes_grey_images(photo):
    model = build(in_chans=1, pretrained_cfg_overlay=dict(
        input_size=(1, 64, 64), crop_pct=1.0, mean=(0.5,), std=(0.5,)))
    Image.fromarray(noise((64, 64))).save(photo)
    np.testing.assert_allclose(look(model, photo, 1).pixels[..., 1], noise((64, 64)) / 255, atol=1e-5)


def test_a_grey_model_made_by_name_takes_them_too(photo):
    Image.fromarray(noise((64, 64))).save(photo)
    assert look(timm.create_model('test_resnet_pst', in_chans=1).eval(), photo, 1).pixels.shape[:2] == (160, 160)


def test_the_caption_names_model_k_and_fusion(photo, folder):
    model = build(fine_fusion='joint')
    view = look(model, photo, 2, img_size=96)
    caption = 'test_resnet_pst, 96 x 96 px, fine attention (joint) over k = 2 of 9 tokens'
    for figure in (draw_view(view), draw_sheet([view, view])):
        assert [text.get_text() for text in figure.texts] == [caption]
    assert look(model, photo, 2, 'gate', img_size=96).caption == caption.replace('joint', 'gate')


def test_no_choice_is_said_to_be_none(photo, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(tool, 'DPI', 60)
    model = build()
    assert look(model, photo, 9, img_size=64).caption.endswith('over k = 4 of 4 tokens: all, so none is chosen')
    visualize(photo, model, tmp_path / 'x.png', topk=3, img_size=64)
    assert not caplog.messages
    visualize(photo, model, tmp_path / 'x.png', overwrite=True, topk=4, img_size=64)
    [message] = caplog.messages
    assert 'selects all 4 coarse tokens' in message


def test_a_nearly_even_map_shows_its_structure_and_rounding_shows_none(photo):
    view = look(build(), photo, 3, img_size=96)
    even = np.full((3, 3), 1 / 9)
    for attention, seen in ((even + np.linspace(-1e-3, 1e-3, 9).reshape(3, 3), True), (even + 1e-9 * np.eye(3), False)):
        figure = draw_view(replace(view, attention=attention))
        heat = panel(figure, 'Coarse attention').images[-1]
        spread = np.ptp(heat.norm(heat.get_array()))
        assert spread == pytest.approx(1) if seen else spread < 0.01
        [bar] = [axes for axes in figure.axes if axes.get_ylabel().startswith('share')]
        assert bar.get_ylabel() == 'share (%)\neven 11.1'
        assert [line.get_ydata()[0] for line in bar.lines if len(line.get_ydata()) == 2] == [pytest.approx(100 / 9)]
        # numbers that differ, written whole
        figure.canvas.draw()
        ticks = [label.get_text() for label in bar.get_yticklabels()]
        assert len(set(ticks)) == len(ticks) > 1 and not bar.yaxis.get_offset_text().get_text()


def test_the_models_settings_stay(photo):
    model = build(topk=4, fine_fusion='joint')
    look(model, photo, 2, 'gate', img_size=64)
    attention = model.pst.blocks[0].attn
    assert (attention.topk, attention.fine_fusion) == (4, 'joint')
    assert look(model, photo, img_size=64).selected.shape == (2, 4)


def test_contact_sheet(folder):
    model = build()
    views = [look(model, path, 2, img_size=96) for path in find_images(folder, 9)[0]]
    figure = draw_sheet(views)
    inputs = [axes for axes in figure.axes if axes.get_ylabel()]
    assert [axes.get_ylabel() for axes in inputs] == ['1.jpeg', '2.JPG', '1.png', 'c.webp']
    for axes, view in zip(inputs, views):
        np.testing.assert_array_equal(axes.images[0].get_array(), view.pixels)
    rows = sorted({axes.get_position().y0 for axes in figure.axes if axes.patches and axes.images}, reverse=True)
    for head, title in enumerate(('Head 1', 'Head 2')):
        left = panel(figure, title).get_position().x0
        column = {a.get_position().y0: a for a in figure.axes if abs(a.get_position().x0 - left) < 1e-6}
        assert len(column) == len(rows) == 4
        for y, view in zip(rows, views):
            assert drawn(column[y], 32, 3, 'coarse') == sorted(view.selected[head].tolist())
    # one scale of attention for all, so that rows can be compared
    [limits] = {axes.images[-1].get_clim() for axes in figure.axes if len(axes.images) == 2 and not axes.patches}
    expected = [np.median([end(view.attention) for view in views]) for end in (np.min, np.max)]
    assert limits == pytest.approx(100 * np.array(expected))


def test_command(photo, tmp_path):
    output = tmp_path / 'figure.png'
    words = [sys.executable, '-m', 'pst_timm', 'visualize', str(photo), '--model', 'test_resnet_pst',
             '--topk', '2', '--fusion', 'joint', '--img-size', '96', '--output', str(output)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f'Written: {output}\n' and 'random' not in done.stderr
    with Image.open(output) as image:
        assert image.format == 'PNG' and min(image.size) > 800 and image.info['Title'] == 'photo.png'
        assert len(image.convert('RGB').getcolors(2 ** 24)) > 100


def test_command_on_a_folder(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tool, 'DPI', 60)
    output = tmp_path / 'sheet.pdf'
    argv = ['--model', 'test_resnet_pst', '--limit', '2', '--each', '--output', str(output)]
    assert command.main([str(folder), *argv]) == 0
    names = ['sheet.pdf', 'sheet-01-1.pdf', 'sheet-02-1.pdf']
    assert capsys.readouterr().out.splitlines() == [
        '2 of 4 images drawn.', *(f'Written: {tmp_path / name}' for name in names)]
    assert all((tmp_path / name).read_bytes().startswith(b'%PDF') for name in names)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*names, 'photos'])


def test_a_checkpoint_brings_model_and_classes(photo, tmp_path, capsys, seen):
    path = tmp_path / 'last.pth.tar'
    model = randomize(timm.create_model('test_resnet_pst', num_classes=7)).eval()
    averaged = randomize(timm.create_model('test_resnet_pst', num_classes=7), seed=1).eval()
    torch.save({
        'arch': 'test_resnet_pst', 'state_dict': model.state_dict(), 'state_dict_ema': averaged.state_dict()}, path)
    argv = [str(photo), '--checkpoint', str(path), '--output', str(tmp_path / 'x.png')]
    assert command.main([*argv, '--model', 'test_resnet_pst']) == 0
    argv.append('--overwrite')
    assert command.main([*argv, '--no-use-ema']) == 0
    for loaded, expected in zip(seen, (averaged, model)):
        assert loaded.num_classes == 7 and torch.equal(loaded.fc.weight, expected.fc.weight) and not loaded.training
    assert command.main([*argv, '--num-classes', '5']) == 1
    assert 'has 7 classes, not 5' in capsys.readouterr().err
    assert command.main([*argv, '--model', 'resnet18_pst']) == 1
    assert 'is not a checkpoint of resnet18_pst' in capsys.readouterr().err


def test_random_weights_are_said_to_be_random(photo, capsys, seen):
    assert command.main([str(photo), '--model', 'test_resnet_pst', '--topk', '1']) == 0
    assert 'random' not in capsys.readouterr().err
    words = ['--num-classes', '3', '--topk', '1', '--overwrite']
    assert command.main([str(photo), '--model', 'test_resnet_pst.untrained', *words]) == 0
    assert 'random' in capsys.readouterr().err
    assert [model.num_classes for model in seen] == [10, 3]


@pytest.mark.parametrize('words, message', [
    ('nowhere.png --model test_resnet_pst', 'There is no image or folder nowhere.png.'),
    ('broken.png --model test_resnet_pst', 'broken.png cannot be read as an image: cannot identify image file'),
    ('cut.png --model test_resnet_pst', 'cut.png cannot be read as an image: '),
    ('mixed --model test_resnet_pst', 'mixed/broken.png cannot be read as an image'),
    ('empty --model test_resnet_pst', r'The folder empty has no images \(.png, '),
    ('photo.png', 'name a model with --model, or a checkpoint with --checkpoint.'),
    ('photo.png --model resnet18_ptt', 'Did you mean resnet18_pst'),
    ('photo.png --model test_resnet_pst.other', r"There are no weights 'test_resnet_pst\.other'"),
    ('photo.png --model test_resnet_pst --num-classes 7', 'know 10 classes, not 7'),
    ('photo.png --model test_resnet_pst.untrained --num-classes 0', "--num-classes: .* at least 1, got '0'"),
    ('photo.png --checkpoint nowhere.pth', 'There is no checkpoint nowhere.pth.'),
    ('photo.png --checkpoint plain.pth.tar', 'has no PST attention to look at'),
    ('photo.png --model test_resnet_pst --class-names names.txt', '2 class names for a model of 10 classes'),
    ('photo.png --model test_resnet_pst --class-names empty.txt', '0 class names for a model of 10 classes'),
    ('photo.png --model test_resnet_pst --class-names none.txt', 'Cannot read the class names none.txt'),
    ('photo.png --model test_resnet_pst --block 1', 'There is no PST block 1: the model has 1'),
    ('photo.png --model test_resnet_pst --output x.jpg', 'The output must be a .png, .pdf, .svg file, got x.jpg'),
    ('photo.png --model test_resnet_pst --output nowhere/x.png', 'nowhere/x.png: there is no folder nowhere'),
    ('photo.png --model test_resnet_pst --output photo.png', 'photo.png is what is read: name another file'),
    ('photo.png --model test_resnet_pst --topk 0', '--topk must be at least 1, got 0'),
    ('photo.png --model test_resnet_pst --topk two', "--topk: expected a whole number of at least 0, got 'two'"),
    ('photo.png --model test_resnet_pst --img-size 31', "--img-size: expected a whole number of at least 32, got '31'"),
    ('photo.png --model test_resnet_pst --limit 0', "--limit: expected a whole number of at least 1, got '0'"),
])
def test_errors_take_one_line_and_leave_nothing(words, message, photo, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ('empty', 'mixed'):
        (tmp_path / place).mkdir()
    for place in ('broken.png', 'mixed/broken.png'):
        (tmp_path / place).write_bytes(b'noise')
    (tmp_path / 'cut.png').write_bytes(photo.read_bytes()[:3000])
    (tmp_path / 'names.txt').write_text('one\ntwo\n')
    (tmp_path / 'empty.txt').write_text('')
    plain = timm.create_model('test_resnet')
    torch.save({'arch': 'test_resnet', 'state_dict': plain.state_dict()}, tmp_path / 'plain.pth.tar')
    before = {p: p.stat().st_size for p in tmp_path.rglob('*')}
    try:
        code = command.main(words.split())
    except SystemExit as e:
        code = e.code
    error = capsys.readouterr().err
    assert code != 0 and re.search(message, error.splitlines()[-1]), error
    assert error.splitlines()[-1].startswith('pst-timm visualize: error: ')
    assert {p: p.stat().st_size for p in tmp_path.rglob('*')} == before


def test_without_matplotlib_it_says_so_before_it_computes(photo, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    monkeypatch.setattr('pst_timm.checkpoints.load_model', lambda *args, **kwargs: pytest.fail('too late'))
    assert command.main([str(photo), '--model', 'test_resnet_pst', '--output', str(tmp_path / 'x.png')]) == 1
    assert 'pip install matplotlib' in capsys.readouterr().err
    assert not (tmp_path / 'x.png').exists()


def test_nothing_selected_is_nothing_to_draw(photo):
    with pytest.raises(PSTError, match='topk must be at least 1'):
        look(build(), photo, 0)
