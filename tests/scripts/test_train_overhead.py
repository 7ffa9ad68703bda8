"""The comparison of the engine with the bare step runs, and compares what it says it does."""
import pytest

from scripts.train_overhead import main, measure_overhead


def test_overhead_is_a_ratio_of_two_measured_speeds():
    result = measure_overhead('test_resnet_pst', img_size=32, batch_size=4, steps=2, rounds=2, device='cpu')
    assert set(result) == {'bare', 'engine', 'ratio'}
    assert result['bare'] > 0 and result['ratio'] == pytest.approx(result['engine'] / result['bare'])


def test_overhead_command_prints_a_table(capsys):
    words = '--model test_resnet_pst --img-size 32 --batch-size 4 --steps 1 --rounds 1 --device cpu'
    assert main(words.split()) == 0
    assert 'engine / bare' in capsys.readouterr().out
