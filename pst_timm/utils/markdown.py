"""Text of others in Markdown, terminals and shells: shown as it is, without a say in what is around it."""
import re
import unicodedata

__all__ = ['fence', 'plain', 'prose']

MOST = 100  # characters of a name
HIDDEN = ('Cc', 'Cf', 'Cs', 'Co', 'Cn', 'Zl', 'Zp')  # controls, marks of direction, separators of lines
ENTITIES = {c: f'&#{ord(c)};' for c in '<&$@'}


def plain(text: object, most: int = MOST) -> str:
    """A text in one line, without control characters and marks of direction, cut where it is too long.

    Args:
        text: The text, or what has one.
        most: Most characters.
    """
    # of an endless text no more than could be shown
    words = ''.join(' ' if unicodedata.category(c) in HIDDEN else c for c in str(text)[:20 * most])
    words = ' '.join(words.split())
    return words if len(words) <= most else f'{words[:most - 1].rstrip()}…'


def prose(text: object, most: int = MOST) -> str:
    """A text within a line of Markdown (paragraph, heading or cell of a table) that is read as letters alone.

    Args:
        text: See `plain`.
        most: Most characters, before those that keep the others from being read as Markdown.
    """
    words = re.sub(r'([\\`*\[\]|~#!]|(?<!\w)_|_(?!\w))', r'\\\1', plain(text, most))
    words = re.sub(r'<(?=[A-Za-z/!?])|[&$@]', lambda match: ENTITIES[match[0]], words)
    # what readers turn into links by themselves
    return re.sub(r'(?i)\b(www)\.', r'\1&#46;', words.replace('://', '&#58;//'))


def fence(text: str, language: str = '') -> str:
    """Lines as a block of code in Markdown, which none of them ends.

    Args:
        text: The lines.
        language: What they are written in.
    """
    lines = [
        ''.join(c for c in line if c == '\t' or unicodedata.category(c) not in HIDDEN)
        for line in re.split(r'\r\n|[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]', text)]
    longest = max((len(run) for line in lines for run in re.findall('`+', line)), default=0)
    ticks = '`' * max(3, longest + 1)
    return '\n'.join([f'{ticks}{language}', *lines, ticks])
