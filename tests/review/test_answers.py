"""What a model gives for images, against the model run by hand."""
import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from pst_timm.checkpoints import load_model
from pst_timm.data.samples import look_of
from pst_timm.review.answers import Outputs, answers, open_labelled, open_loose, open_subject
from pst_timm.utils.errors import PSTError
from tests.review.helpers import CLASSES, make_data, make_source


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp('review')
    return make_source(root), make_data(root / 'data', validation=3)


@pytest.mark.parametrize('batch_size, workers', [(1, 0), (4, 0), (4, 1), (100, 0)])
def test_answers_are_those_of_the_model_by_hand(place, batch_size, workers):
    source, data = place
    subject = open_subject(str(source), device='cpu')
    got = Outputs.gather(answers(subject, open_labelled(subject, data), batch_size, workers))
    paths = sorted((data / 'validation').rglob('*.png'))
    assert [data / 'validation' / name for name in got.names] == paths
    model = load_model(source)
    transform = create_transform(**resolve_data_config({}, model=model))
    with torch.inference_mode():
        for i, path in enumerate(paths):
            x = transform(Image.open(path).convert('RGB'))[None]
            features = model.forward_features(x)
            torch.testing.assert_close(torch.from_numpy(got.logits[i]), model(x)[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(
                torch.from_numpy(got.embeddings[i]), model.forward_head(features, pre_logits=True)[0],
                rtol=1e-4, atol=1e-4)
            assert CLASSES[got.labels[i]] == path.parent.name
    assert got.probabilities.sum(axis=1) == pytest.approx(1) and not got.broken


def test_classes_go_by_their_names_and_not_by_their_places(tmp_path):
    source = make_source(tmp_path, names=('class2', 'class0', 'class1'))
    data = make_data(tmp_path / 'data', validation=1)
    subject = open_subject(str(source), device='cpu')
    labels = {name.split('/')[0]: label for name, label in zip(
        *(lambda got: (got.names, got.labels))(Outputs.gather(answers(subject, open_labelled(subject, data)))))}
    assert labels == {'class2': 0, 'class0': 1, 'class1': 2}
    for path in (data / 'validation' / 'class0').iterdir():  # some of the classes will do
        path.unlink()
    (data / 'validation' / 'class0').rmdir()
    assert set(Outputs.gather(answers(subject, open_labelled(subject, data))).labels) == {0, 2}
    (data / 'validation' / 'class1').rename(data / 'validation' / 'zebra')
    with pytest.raises(PSTError, match="knows no class 'zebra'"):
        open_labelled(subject, data)


def test_places_of_classes_without_names_are_not_guessed(tmp_path):
    subject = open_subject(str(make_source(tmp_path, names=None)), device='cpu')
    data = make_data(tmp_path / 'data', validation=1)
    assert not subject.knows_names and len(open_labelled(subject, data)) == 3
    for path in (data / 'validation' / 'class0').iterdir():  # with which the others would move up
        path.unlink()
    (data / 'validation' / 'class0').rmdir()
    with pytest.raises(PSTError, match=r'has 2 classes, and .* has 3 without names'):
        open_labelled(subject, data)


def test_broken_images_are_named_and_left_out(place, tmp_path, caplog):
    source, data = place
    good = sorted((data / 'validation').rglob('*.*'))[:3]
    images = [tmp_path / 'a.jpg', *good, tmp_path / 'b.png']
    (tmp_path / 'a.jpg').write_bytes(b'no image')
    (tmp_path / 'b.png').write_bytes(b'\x89PNG')
    subject = open_subject(str(source), device='cpu')
    good = [path for path in images[1:-1] if path.is_file()]
    parts = list(answers(subject, open_loose(subject, [images[0], *good, images[-1]]), batch_size=1))
    got = Outputs.gather(iter(parts))
    assert got.names == [str(path) for path in good] and (got.labels == -1).all()
    assert got.broken == [str(tmp_path / 'a.jpg'), str(tmp_path / 'b.png')]
    assert 'Skipped 1 image(s) that cannot be read' in caplog.text
    with pytest.raises(PSTError, match='Not one of the 1 images'):
        Outputs.gather(answers(subject, open_loose(subject, images[:1])))


def test_how_an_image_looks():
    half = np.zeros((8, 6), np.uint8)
    half[:, 3:] = 255
    look = look_of(Image.fromarray(half))
    # one step of 1 in each row of 5 differences, none down the columns
    assert look == pytest.approx((0.5, 0.5, (1 / 5 + 0) / 2, 0, 6, 8))
    assert look_of(Image.new('RGB', (1, 1), 'white')) == pytest.approx((1, 0, 0, 0, 1, 1))
    dot = np.zeros((5, 5), np.uint8)
    dot[2, 2] = 255
    # nine values of 1, 2 or 4; four steps of 1 among 20, along either axis two
    assert look_of(Image.fromarray(dot))[2:4] == pytest.approx((2 / 20, 16 / 9 / (2 / 20)))


def test_a_model_that_cannot_answer_is_refused(tmp_path):
    with pytest.raises(PSTError, match='weights'):
        open_subject('resnet34_pst', device='cpu')
    with pytest.raises(PSTError, match='no fine attention'):
        open_subject(str(plain_source(tmp_path)), topk=4, device='cpu')


def plain_source(folder):
    import timm

    from tests.checkpoints.helpers import run_args, save_checkpoint

    model = timm.create_model('resnet10t', num_classes=3)
    return save_checkpoint(folder / 'plain.pth.tar', model, arch='resnet10t', args=run_args(model='resnet10t'))
