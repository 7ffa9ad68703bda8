"""Tables are aligned, with even decimals."""
import pytest

from pst_timm.utils.tables import differing_columns, format_table, markdown_table


def test_numbers_are_flush_right_with_even_decimals():
    rows = [
        {'model': 'resnet18_pst', 'topk': 0, 'top1': 97.5, 'loss': 0.1234567, 'parameters': '14,471,368'},
        {'model': 'b', 'topk': 16, 'top1': 100., 'loss': None, 'parameters': '5', 'note': 'all 9'},
    ]
    assert format_table(rows).split('\n') == [
        'model         topk   top1    loss  parameters  note',
        '------------  ----  -----  ------  ----------  -----',
        'resnet18_pst     0   97.5  0.1235  14,471,368',
        'b               16  100.0       -           5  all 9',
    ]
    assert '0.123 ' in format_table(rows, decimals=3)


@pytest.mark.parametrize('values, shown', [
    ([1., 2.], ['1.0', '2.0']),
    ([0.25, 3, None], ['0.25', '   3', '   -']),
    ([5e-4, 1e-3], ['0.0005', '0.0010']),
    ([2e-6, 1e-5], ['2.00e-06', '1.00e-05']),
    ([0., 0.5], ['0.0', '0.5']),
    ([0.5, 1e-9], ['0.5000', '0.0000']),
    ([float('nan'), -1.5], [' nan', '-1.5']),
    ([True, False], ['True', 'False']),
    ([1e6, 123.456], ['1000000.000', '    123.456']),
    (['eight', 'all'], ['eight', 'all']),
])
def test_cells_of_a_column(values, shown):
    assert format_table([{'x': value} for value in values]).split('\n')[2:] == shown


def test_constant_columns_go_and_the_setting_comes_first():
    rows = [dict(model='a', top1=97., topk=k, loss=0.1, fine_fusion=f) for k, f in ((0, None), (8, 'gate'))]
    assert differing_columns(rows, first=('topk', 'fine_fusion', 'absent')) == [
        {'topk': 0, 'fine_fusion': None}, {'topk': 8, 'fine_fusion': 'gate'}]
    rows[1]['top1'] = 98.
    found = differing_columns(rows, first=('topk', 'fine_fusion'))
    assert list(found[0]) == ['topk', 'fine_fusion', 'top1'] and [*differing_columns(rows)[0]][:1] == ['top1']


def test_no_rows_are_no_table():
    assert format_table([]) == '' and differing_columns([]) == []


def test_markdown():
    assert markdown_table([{'a': '1', 'b': 'x'}, {'a': '2', 'b': 'y'}]) == (
        '| a | b |\n| --- | --- |\n| 1 | x |\n| 2 | y |')
