"""Blocks of a page; tests/study/test_report.py has the pages of a checkout."""
from pst_timm.utils.pages import fill_text

PAGE = '# Title\n\n<!-- sum 1 2 -->\n\nold\n\n<!-- end -->\n\n```\n<!-- sum 5 -->\n```\n<!-- other -->\n'


def test_a_block_is_made_from_the_words_of_its_mark():
    def add(words):
        return f'**{sum(map(int, words))}**'

    assert fill_text(PAGE, {'sum': add}) == PAGE.replace('old', '**3**')
    assert fill_text(PAGE, {'product': add}) == PAGE
