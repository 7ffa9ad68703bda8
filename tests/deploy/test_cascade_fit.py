"""Thresholds against every threshold there is, the guarantee against draws from a known world, the whole command."""
import itertools
import json
import logging
import statistics
import sys

import numpy as np
import pytest
import torch
from timm.data import resolve_data_config

from pst_timm.checkpoints import load_model
from pst_timm.cli import main
from pst_timm.deploy import cascade_fit
from pst_timm.deploy.cascade import Cascade, Stage, open_stage
from pst_timm.deploy.cascade_fit import (
    HIGHEST,
    answered_right,
    certify,
    choose,
    fit,
    frontier,
    measure_stages,
    stage_costs,
)
from pst_timm.deploy.export import export
from pst_timm.deploy.runtime import Deployed
from pst_timm.metrics.calibration import fit_temperature
from pst_timm.utils.cost import count_gmacs
from pst_timm.utils.errors import PSTError
from tests.deploy.helpers import save_pair
from tests.review.helpers import CLASSES

# thresholds

def drawn(stages, images, seed, values=None):
    """Confidences, some of them equal, and which images are answered right."""
    rng = np.random.default_rng(seed)
    confidence = rng.random((stages, images)) if values is None else rng.integers(1, values, (stages, images)) / values
    return confidence, rng.random((stages, images)) < np.linspace(0.5, 0.8, stages)[:, None]


def one_by_one(confidence, right, thresholds, costs):
    """Right answers and total cost of a cascade, image by image."""
    answers, total = 0, 0.
    for n in range(right.shape[1]):
        stage = next((i for i, t in enumerate(thresholds) if confidence[i][n] > t), len(thresholds))
        answers += right[stage][n]
        total += sum(costs[:stage + 1])
    return int(answers), total


@pytest.mark.parametrize('stages, images, values', [
    (2, 1, None), (2, 30, None), (2, 40, 6), (3, 12, None), (3, 14, 4), (3, 2, None)])
@pytest.mark.parametrize('seed', range(3))
def test_the_frontier_is_that_of_all_thresholds(stages, images, values, seed):
    confidence, right = drawn(stages, images, seed, values)
    costs = [1., 3., 10.][:stages]
    # whatever a threshold may be, it passes on what is not above one of these
    tried = [[0., *sorted(set(row))] for row in confidence[:-1].tolist()]
    all_of_them = [one_by_one(confidence, right, t, costs) for t in itertools.product(*tried)]
    best = {
        (r, c) for r, c in all_of_them if not any(
            (r2 >= r and c2 < c) or (r2 > r and c2 <= c) for r2, c2 in all_of_them)}
    found = frontier(confidence, right, costs)
    assert {(route.right, round(images * route.cost(costs))) for route in found} == best
    assert len(found) == len(best) and [r.cost(costs) for r in found] == sorted(r.cost(costs) for r in found)
    for route in found:
        assert one_by_one(confidence, right, route.thresholds, costs)[0] == route.right
        answer, reached = answered_right(confidence, right, route.thresholds)
        assert (int(answer.sum()), reached) == (route.right, route.reached)
        assert all(0 <= t <= 1 for t in route.thresholds)
    for budget in (0.5, 1., 2., 5.5, 20.):
        within = [r for r, c in all_of_them if c <= images * budget * (1 + 1e-12)]
        chosen = choose(found, costs, budget)
        assert (chosen.right if chosen else None) == (max(within) if within else None)


def test_many_images_are_cut_into_few_thresholds():
    confidence, right = drawn(2, 3000, 0)
    costs = (1., 4.)
    few, all_of_them = (frontier(confidence, right, costs, most) for most in (50, 4000))
    assert len(few) <= 50 < len(all_of_them)
    assert few[-1].right >= all_of_them[-1].right - 20


# the guarantee

COSTS = (1., 4.)


class World:
    """Images of which all is known: the surer the cheap stage, the more often it is right."""

    def __init__(self, base, slope, dear):
        self.base, self.slope, self.dear = base, slope, dear

    def draw(self, images, rng):
        sure = rng.random(images)
        cheap = rng.random(images) < self.base + self.slope * sure
        return np.stack([sure, np.ones(images)]), np.stack([cheap, rng.random(images) < self.dear])

    def true_drop(self, threshold):
        """Integral of dear - base - slope * s over the confidences s from the threshold to 1."""
        t = threshold
        return (self.dear - self.base) * (1 - t) - self.slope * (1 - t * t) / 2


WORLDS = [World(0.5, 0.4, 0.9), World(0.82, 0., 0.9), World(0.2, 0.75, 0.97)]


@pytest.mark.parametrize('world', WORLDS, ids=['sloped', 'flat', 'steep'])
def test_the_true_drop_is_beyond_the_bound_in_at_most_a_twentieth_of_all_draws(world):
    check_guarantee(world, images=300, draws=100, max_drop=0.05)


@pytest.mark.slow
@pytest.mark.parametrize('world', WORLDS, ids=['sloped', 'flat', 'steep'])
@pytest.mark.parametrize('images, max_drop', [(300, 0.04), (1500, 0.01)])
def test_so_it_is_over_many_draws(world, images, max_drop):
    check_guarantee(world, images, 1000, max_drop)


def check_guarantee(world, images, draws, max_drop):
    rng = np.random.default_rng(0)
    broken = naive = 0
    passed = []
    for _ in range(draws):
        chosen_on, tested_on = (world.draw(images, rng) for _ in range(2))
        routes = frontier(*chosen_on, COSTS)
        route = certify(routes, *tested_on, max_drop)
        if route is not None:
            broken += world.true_drop(route.thresholds[0]) > max_drop
            passed.append(route.reached[1] / images)
        # what the same images would promise that also chose
        last = chosen_on[1][1].sum()
        cheapest = next(r for r in routes if last - r.right <= max_drop * images)
        naive += world.true_drop(cheapest.thresholds[0]) > max_drop
    assert broken <= 0.05 * draws
    assert naive > 0.2 * draws, 'this world tempts nobody'
    assert len(passed) > 0.5 * draws and statistics.mean(passed) < 0.98  # and it is no empty promise


def test_the_search_ends_with_the_first_candidate_that_fails():
    """Even where a cheaper one would pass, or the chances of error would add up."""
    confidence = np.stack([np.linspace(0.01, 0.99, 1000), np.ones(1000)])
    right = np.ones((2, 1000), bool)
    right[0, 400:440] = False  # the cheap stage fails where it is half sure
    routes = frontier(confidence, right, COSTS)
    assert routes[0].reached[1] == 0 and routes[-1].right == 1000
    candidates = [r._replace(thresholds=(t,)) for t, r in zip((0.1, 0.2, 0.6), [routes[0]] * 3)]
    right_of_few = right.copy()
    right_of_few[1, 400:440] = False
    assert certify(candidates, confidence, right, 0.02).thresholds == (0.6,)
    assert certify(candidates, confidence, right_of_few, 0.02).thresholds == (0.1,)
    assert certify(candidates[:2], confidence, right, 0.02) is None


# the whole

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp('fit'))


def words(place, output, *more, stages=('small', 'large')):
    return ['cascade', 'fit', *(str(place / name) for name in stages), '--data-dir', str(place / 'data'), '--device',
            'cpu', '--cost', 'macs', '-o', str(output), *map(str, more)]


@pytest.fixture(scope='module')
def fitted(place):
    assert main(words(place, place / 'cascade.json', '--img-sizes', 48, 64, '--max-cost', '0.9x', '--part', 1)) == 0
    return json.loads((place / 'cascade.json').read_text())


def test_fit_writes_what_it_says(place, fitted):
    assert (place / 'cascade.png').read_bytes().startswith(b'\x89PNG')
    assert [stage['source'] for stage in fitted['stages']] == ['small', 'large']  # where they are
    model = load_model(place / 'large')
    for stage, size in zip(fitted['stages'], (48, 64)):
        assert stage['cost'] == pytest.approx(count_gmacs(model, (3, size, size)))
    first, last = fitted['stages']
    assert first['reached'] == 120 == fitted['fit']['images'] and last['reached'] == first['passed']
    cost = first['cost'] + first['passed'] / 120 * last['cost']
    assert fitted['fit']['cascade']['cost'] == pytest.approx(cost) and cost <= 0.9 * last['cost']
    assert fitted['fit']['goal'] == {'max_cost': pytest.approx(0.9 * last['cost'])}
    assert 'guaranteed' not in fitted['fit'] and str(place) not in json.dumps(fitted)


def test_what_was_fitted_is_what_runs(place, fitted):
    """The stages' answers again, by the file: temperatures, routing and accuracy."""
    cascade = Cascade.from_file(place / 'cascade.json')
    samples = cascade_fit.open_images(cascade, str(place / 'data'), 'train', 1., 0)
    images = torch.stack([sample.image for sample in samples])
    labels = torch.tensor([sample.label for sample in samples])
    output = cascade(images)
    told = fitted['fit']
    assert (output.stage > 0).sum() == fitted['stages'][0]['passed']
    right = (output.logits.argmax(dim=1) == labels).double().mean()
    assert told['cascade']['accuracy'] == pytest.approx(100 * right.item())
    assert told['cascade']['cost'] == pytest.approx(output.cost.mean().item(), rel=1e-5)
    data = measure_stages(Cascade([open_stage(place / n, (s, s)) for n, s in (('small', 48), ('large', 64))]), samples,
                          torch.device('cpu'), 16)
    for stage, logits, single in zip(cascade.stages, data.logits, told['stages']):
        assert stage.temperature == pytest.approx(min(fit_temperature(logits.double(), labels), HIGHEST), rel=1e-4)
        accuracy = (logits.argmax(dim=1) == labels).double().mean().item()
        assert single['accuracy'] == pytest.approx(100 * accuracy)
    costs = [cost for cost, _ in told['curve']]
    alone = [(stage['cost'], stage['accuracy']) for stage in told['stages']]
    assert costs == sorted(costs) and told['curve'][0] == pytest.approx(alone[0])
    assert told['curve'][-1] == pytest.approx((alone[0][0] + alone[1][0], alone[1][1]))
    assert [told['cascade'][key] for key in ('cost', 'accuracy')] in told['candidates']


@pytest.mark.parametrize('last', ['large', pytest.param('large.pt2', marks=pytest.mark.slow)])
def test_three_stages_and_copies_of_those_that_are_elsewhere(place, tmp_path, last, capsys):
    exported = last.endswith('.pt2')
    if exported:
        export(load_model(place / 'large'), place / last, 'exported-program', img_size=64, class_names=CLASSES)
    command = words(
        place, tmp_path / 'c.json', '--img-sizes', 32, 48, 64, '--max-cost', '3x', '--part', 1, '--cost', 'latency',
        '--rounds', 3, '--no-plot', '--reparam', '--topk', 0, 2, 0, stages=('small', 'large', last))
    assert main(command) == 0
    shown = capsys.readouterr().out
    for said in ('stage 3 alone', 'cost (ms)', 'report no accuracy on them', 'the last stage alone, on the 120 images'):
        assert said in shown
    value = json.loads((tmp_path / 'c.json').read_text())
    assert [s['source'] for s in value['stages']] == [
        'c/1-test_resnet_pst', 'c/2-test_resnet_pst', 'c/3-large.pt2' if exported else 'c/3-test_resnet_pst']
    assert [s.get('topk') for s in value['stages']] == [0, 2, None if exported else 0]
    assert [s.get('reparam', False) for s in value['stages']] == [True, True, not exported]
    assert not (tmp_path / 'c.png').exists()
    cascade = Cascade.from_file(tmp_path / 'c.json')
    assert len(cascade.stages) == 3 and cascade.stages[1].model.inference_settings()['topk'] == 2
    assert all((tmp_path / s['source']).resolve().is_relative_to(tmp_path) for s in value['stages'])
    # what is there is kept, unless it may be replaced
    assert main(command) == 1 and 'is there already' in capsys.readouterr().err
    assert main([*command, '--overwrite']) == 0


def test_a_floor_is_guaranteed_by_images_that_chose_nothing(place, tmp_path, capsys):
    assert main(words(place, tmp_path / 'c.json', '--max-drop', 15, '--part', 1, '--no-plot')) == 0
    value = json.loads((tmp_path / 'c.json').read_text())
    assert value['fit']['guaranteed'] == {
        'max_drop': 15., 'level': 0.95, 'below': 'the last stage alone', 'images': 60}
    assert value['fit']['measured_on'] == 60 and value['stages'][0]['reached'] == 120
    shown = capsys.readouterr().out
    assert 'Guaranteed at 95%' in shown and 'less than 15 points below' in shown


def test_a_floor_that_the_images_cannot_tell_is_refused(place, tmp_path, capsys):
    for drop, said in ((1, 'it takes 816 at least'), (0, 'no number could')):
        assert main(words(place, tmp_path / 'c.json', '--max-drop', drop, '--part', 1)) == 1
        assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_cascade_that_brings_nothing_is_said_to(place, tmp_path, capsys):
    """The same model twice."""
    assert main(words(place, tmp_path / 'c.json', '--max-cost', '2x', '--part', 1, '--no-plot',
                      stages=('large', 'large'))) == 0
    assert 'this cascade brings nothing' in capsys.readouterr().out


@pytest.mark.parametrize('split, said', [
    ('train', 'no stage may have been trained on them'), ('validation', 'on the same images flatters the cascade')])
def test_it_says_which_images_it_takes(place, tmp_path, split, said, caplog):
    with caplog.at_level(logging.WARNING), pytest.raises(PSTError, match='too few to fit'):
        fit([place / 'small', place / 'large'], tmp_path / 'c.json', str(place / 'data'), split, max_cost=1.,
            plot=False, cost='macs', device='cpu')
    assert any(said in message for message in caplog.messages)


def test_a_part_of_a_split_is_drawn_with_the_seed(place):
    cascade = Cascade([open_stage(place / 'small'), open_stage(place / 'large')])
    names = [cascade_fit.open_images(cascade, str(place / 'data'), 'train', None, seed).names for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2] and len(names[0]) == 24  # a fifth
    assert len(cascade_fit.open_images(cascade, str(place / 'data'), 'validation', None, 0)) == 36


@pytest.mark.parametrize('more, said, code', [
    (['--max-cost', '1', '--max-drop', '1'], 'not allowed with', 2),
    ([], 'one of the arguments --max-cost --max-drop is required', 2),
    (['--max-cost', '0x'], 'expected a number above 0', 2),
    (['--max-drop', '-1'], 'expected', 2),
    (['--max-cost', '1', '--part', '2'], 'expected a share', 2),
    (['--max-cost', '1', '--img-sizes', '32', '48', '64'], '--img-sizes has 3 values for 2 stages', 1),
    (['--max-cost', '0.0001x', '--part', '1'], 'the first stage alone costs', 1),
    (['--max-cost', '1', '--split', 'none'], "no 'none' split", 1),
])
def test_bad_words_end_in_one_sentence(place, tmp_path, more, said, code, capsys):
    try:
        found = main(words(place, tmp_path / 'c.json', *more))
    except SystemExit as e:
        found = e.code
    assert found == code
    error = capsys.readouterr().err
    assert said in error and 'Traceback' not in error
    assert list(tmp_path.iterdir()) == []


def test_names_of_outputs_and_stages_are_checked_first(place, tmp_path, capsys, monkeypatch):
    assert main(words(place, tmp_path / 'c.txt', '--max-cost', '1')) == 1
    assert 'must end with .json' in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    assert main(words(place, tmp_path / 'c.json', '--max-cost', '1')) == 1
    assert "pip install 'pst_timm[train]'" in capsys.readouterr().err
    (tmp_path / 'c').write_text('in the way')
    monkeypatch.undo()
    assert main(words(place, tmp_path / 'c.json', '--max-cost', '1', '--no-plot')) == 1
    assert 'is to be copied to a folder' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(words(place, tmp_path / 'c.json', '--max-cost', '1', stages=('small',)))
    assert 'two or three stages, got 1' in capsys.readouterr().err


def test_multiply_adds_of_an_exported_file_are_not_known(place):
    info = {'architecture': 'x', 'num_classes': 3, 'input_size': [3, 64, 64], 'mean': [0.] * 3, 'std': [1.] * 3,
            'interpolation': 'bilinear', 'crop_pct': 1., 'crop_mode': 'center'}
    model = Deployed(lambda x: torch.zeros(len(x), 3), info)
    cascade = Cascade([open_stage(place / 'small'), Stage(model, 'x.onnx', resolve_data_config({}, model=model))])
    with pytest.raises(PSTError, match=r'x\.onnx is an exported model, .* take --cost latency'):
        stage_costs(cascade, 'macs')


def test_latencies_are_those_of_an_image(place, monkeypatch):
    """By a clock that goes on by a second whenever it is read."""
    cascade = Cascade([open_stage(place / 'small', (48, 48)), open_stage(place / 'large')])
    seen = []
    for stage in cascade.stages:
        stage.register_forward_hook(lambda module, args, output: seen.append((module, len(args[0]))))
    ticks = itertools.count()
    monkeypatch.setattr('pst_timm.utils.timing._clock', lambda device: float(next(ticks)))
    assert stage_costs(cascade, 'latency', batch_size=4, rounds=2) == [250., 250.]
    assert seen == 5 * [(cascade.stages[0], 4), (cascade.stages[1], 4)]  # in turn, three rounds untimed
