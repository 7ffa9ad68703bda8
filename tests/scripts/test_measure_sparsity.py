"""The table of sparsity training says what the runs gave, and is made for every weight."""
from scripts.measure_sparsity import CUTS, RATIOS, SEEDS, TUNED, WEIGHTS, summary


def test_the_table_has_means_and_the_range_over_the_seeds():
    rows = [
        dict(weight=weight, seed=seed, ratio=ratio, left=1 - ratio, whole=70. + seed,
             cut={name: 50. - 10 * i + 2 * seed for i, name in enumerate(CUTS)}, tuned=60. + weight * 100 - seed)
        for seed in SEEDS for weight in WEIGHTS for ratio in RATIOS]
    for row in rows:
        if row['ratio'] != max(RATIOS):
            del row['tuned']
    table = summary(rows)
    assert len(table) == len(WEIGHTS) * len(RATIOS)
    last = table[-1]
    assert last['sparsity weight'] == '0.01' and last['multiply-adds removed'] == '70%'
    assert last['before'] == '70.5 (70.0 to 71.0)' and last['l2, global'] == '41.0 (40.0 to 42.0)'
    assert last[f'l2, uniform, then {TUNED} epochs'] == '60.5 (60.0 to 61.0)'
    assert table[0][f'l2, uniform, then {TUNED} epochs'] == 'not run'
