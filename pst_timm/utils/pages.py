"""Markdown pages with blocks that are made from data.

A page says what it wants by a mark, alone in its line: `<!-- KIND WORDS -->`. What follows, up to the line
`<!-- end -->`, is made anew. Marks within fenced code are left alone.
"""
import re
from typing import Callable, Iterator, List, Mapping, Sequence

__all__ = ['fill_text']

END = '<!-- end -->'
FENCE = re.compile(r'\s*(`{3,}|~{3,})(.*)')


def fill_text(text: str, makers: Mapping[str, Callable[[List[str]], str]]) -> str:
    """Markdown with its blocks made anew.

    Args:
        text: Markdown.
        makers: By the kind in a mark, what makes the Markdown of its block from the words after it; called in the
            order of the page.
    """
    mark = re.compile(rf'<!-- *({"|".join(makers)})\b(.*?)-->\s*')
    lines = text.split('\n')
    open_lines = [i for i, fenced in enumerate(_fenced(lines)) if not fenced]
    marks = [i for i in open_lines if mark.fullmatch(lines[i])]
    blocks = [makers[kind](words.split()) for kind, words in (mark.fullmatch(lines[i]).groups() for i in marks)]
    # from the last to the first, so that the numbers of the lines before stay right
    for start, following, block in reversed(list(zip(marks, [*marks[1:], len(lines)], blocks))):
        ends = [i for i in open_lines if start < i < following and lines[i].rstrip() == END]
        # without an end, what follows is not ours
        stop = ends[0] + 1 if ends else start + 1
        lines[start + 1:stop] = ['', *block.split('\n'), '', END] if block else ['', END]
    return '\n'.join(lines)


def _fenced(lines: Sequence[str]) -> Iterator[bool]:
    """Whether each line is within fenced code; the line that opens it is not."""
    fence = ''
    for line in lines:
        match = FENCE.match(line)
        yield bool(fence)
        if match and not fence:
            fence = match[1]
        elif match and match[1].startswith(fence) and not match[2].strip():
            fence = ''
