"""Text of others stays text: in a line, in a cell of a table, in a block of code."""
import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pst_timm.utils.markdown import fence, plain, prose

NASTY = st.text() | st.text(alphabet='`|<>&*_[]()!#~\\:/@w.\n\r\t\x1b\u202e\u2028$-a ', max_size=60)


@given(NASTY)
def test_prose_is_one_line_without_markup(text):
    shown = prose(text)
    assert not re.search('<[A-Za-z/!?]|[$@]', shown) and '://' not in shown and 'www.' not in shown.lower()
    assert len(shown.splitlines()) <= 1
    assert not re.search(r'(?<!\\)(?:\\\\)*[`*\[\]|~#!]', shown.replace('&#', '&'))
    assert not re.search(r'&(?!#\d+;)', shown)
    assert not any(unicodedata.category(c) in ('Cc', 'Cf', 'Cs') for c in shown)


@given(NASTY)
def test_prose_reads_as_the_plain_text(text):
    read = re.sub(r'&#(\d+);', lambda m: chr(int(m[1])), prose(text))
    assert re.sub(r'\\([\\`*\[\]|~#!_])', r'\1', read) == plain(text)


@given(NASTY)
def test_a_fence_is_ended_by_its_last_line_alone(text):
    first, *inside, last = fence(text, 'yaml').split('\n')
    assert first == f'{last}yaml' and re.fullmatch('`{3,}', last)
    assert not any(re.match(rf'\s*{last}', line) for line in inside)
    assert fence(text).splitlines() == fence(text).split('\n')


@pytest.mark.parametrize('text, shown', [
    ('test_resnet_pst', 'test_resnet_pst'), ('a|b', r'a\|b'), ('_a_', r'\_a\_'),
    ('[x](javascript:a)', r'\[x\](javascript:a)'),
    ('<img src=x>', '&#60;img src=x>'), ('https://a.b', 'https&#58;//a.b'), ('WWW.a', 'WWW&#46;a'),
    ('a\n\n---\nb', 'a --- b'), ('\x1b[31mred\u202e', r'\[31mred'), ('Ärmel 猫', 'Ärmel 猫'), (0.9, '0.9')])
def test_examples(text, shown):
    assert prose(text) == shown


def test_length_is_bounded():
    assert plain('a' * 10 ** 6) == 'a' * 99 + '…' and len(prose('<' * 10 ** 6)) < 600
