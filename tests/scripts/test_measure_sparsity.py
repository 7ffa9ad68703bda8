"""The table of sparsity training says what the runs gave, and has every weight."""
from scripts.measure_sparsity import CUTS, SEEDS, TUNED, WEIGHTS, summary


def test_the_table_has_means_and_the_range_over_the_seeds():
    rows = [
        dict(weight=weight, seed=seed, left=0.3, whole=70. + seed, tuned=60. + weight * 100 - seed,
             cut={name: 50. - 10 * i + 2 * seed for i, name in enumerate(CUTS)})
        for seed in SEEDS for weight in WEIGHTS]
    table = summary(rows)
    assert [row['sparsity weight'] for row in table] == [f'{weight:g}' for weight in WEIGHTS]
    last = table[-1]
    assert last['multiply-adds removed'] == '70%' and last['before'] == '70.5 (70.0 to 71.0)'
    assert last['l2, global'] == '41.0 (40.0 to 42.0)'
    assert last[f'l2, uniform, then {TUNED} epochs'] == '60.5 (60.0 to 61.0)'
