"""Files written whole or not at all, with the modes of the user's umask; CSV and JSON."""
import csv
import io
import json
import os
import secrets
import stat
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence

from safetensors import SafetensorError

from .errors import PSTError

__all__ = [
    'check_output', 'columns_of', 'read_class_names', 'read_csv', 'read_text', 'staged', 'write_csv',
    'write_json', 'write_text', 'write_whole',
]

LONGEST = 64 * 2 ** 20  # bytes of a text that a person wrote


def check_output(path: os.PathLike, overwrite: bool = False, inputs: Iterable[os.PathLike] = ()) -> None:
    """Make sure, before the work, that a file can be written, and that nobody loses another one by it.

    Args:
        path: The file to be written.
        overwrite: Whether one that is there may be replaced.
        inputs: Files and folders that are read; never replaced.

    Raises:
        PSTError: If it cannot be written, or must not be.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise PSTError(f'Cannot write {path}: there is no folder {path.parent}. Make it first.')
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PSTError(f'Cannot write {path}: the folder {path.parent} is not yours to write to.')
    if not os.path.lexists(path):
        return
    if path.is_dir():
        raise PSTError(f'Cannot write {path}: it is a folder. Name a file in it.')
    if path.exists() and not path.is_file():
        raise PSTError(f'Cannot write {path}: it is not an ordinary file. Name another one.')
    if any(os.path.exists(source) and path.exists() and os.path.samefile(path, source) for source in inputs):
        raise PSTError(f'{path} is what is read: name another file to write.')
    if not overwrite:
        raise PSTError(f'{path} is there already: name another file, or add --overwrite to replace it.')


@contextmanager
def staged(path: os.PathLike) -> Iterator[str]:
    """A new file beside the one it replaces, by name; moved there at the end of the block, gone after an error in it.

    Args:
        path: The file.

    Raises:
        PSTError: If the file cannot be made or moved; what was there before is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.{secrets.token_hex(4)}{path.suffix}')
    try:
        # made here, so that it has the modes of the user's umask whatever the writer thinks of them
        handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except OSError as e:
        raise PSTError(f'Cannot write {path}: {e.strerror}.') from None
    try:
        modes = stat.S_IMODE(os.fstat(handle).st_mode)
        os.close(handle)
        yield str(temporary)
        try:
            os.chmod(temporary, modes)
            os.replace(temporary, path)
        except OSError as e:
            raise PSTError(f'Cannot write {path}: {e.strerror or e}.') from e
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: os.PathLike, write: Callable[[str], Any]) -> None:
    """Have a file written beside the one it replaces, and moved there when it is complete.

    Args:
        path: The file.
        write: Called with the name to write to.

    Raises:
        PSTError: If the file cannot be written; what was there before is untouched.
    """
    with staged(path) as temporary:
        try:
            write(temporary)
        except OSError as e:
            raise PSTError(f'Cannot write {path}: {e.strerror or e}.') from e
        except (RuntimeError, SafetensorError) as e:  # torch reports a full disk as a RuntimeError
            raise PSTError(f'Cannot write {path}: {e}.') from e


def write_text(path: os.PathLike, text: str) -> None:
    """Write a text file, see `write_whole`; names of files that are no text are written with the bytes they have."""
    write_whole(path, lambda temporary: Path(temporary).write_text(
        text, encoding='utf-8', errors='surrogateescape', newline='\n'))


def write_json(path: os.PathLike, value: Any) -> None:
    """Write a value as a JSON file, see `write_whole`."""
    write_text(path, json.dumps(value, indent=2) + '\n')


def columns_of(rows: Sequence[Mapping[str, Any]]) -> List[str]:
    """Names of the columns in the order in which they first appear."""
    return list(dict.fromkeys(key for row in rows for key in row))


def write_csv(path: os.PathLike, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> None:
    """Write rows as a CSV file with a header, see `write_whole`; a column that a row does not have is empty there.

    Args:
        path: The file.
        rows: The rows.
        columns: Those there are even where there are no rows; the others follow.
    """
    text = io.StringIO()
    # the writer does not quote what only readers take for the end of a line
    returns = any('\r' in str(value) for row in rows for value in row.values())
    writer = csv.DictWriter(
        text, list(dict.fromkeys([*columns, *columns_of(rows)])), lineterminator='\n',
        quoting=csv.QUOTE_ALL if returns else csv.QUOTE_MINIMAL)
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_csv(path: os.PathLike) -> List[Dict[str, str]]:
    """Rows of a CSV file with a header, all of them with all of its columns.

    Raises:
        PSTError: If the file cannot be read, has no header, or has a row of another length.
    """
    try:
        with open(path, newline='', encoding='utf-8-sig') as f:  # some spreadsheets begin with a mark
            reader = csv.DictReader(f)
            if not reader.fieldnames:
                raise PSTError(f'{path} is empty: its first line must name the columns.')
            rows = []
            for row in reader:
                if None in row or None in row.values():
                    raise PSTError(
                        f'{path}, line {reader.line_num} does not have as many fields as the header; was the file cut '
                        f'off?')
                rows.append(row)
            return rows
    except OSError as e:
        raise PSTError(f'{path} cannot be read ({e.strerror}).') from None
    except (UnicodeDecodeError, csv.Error) as e:
        raise PSTError(f'{path} is not a CSV file ({e}).') from None


def read_text(path: os.PathLike) -> str:
    """The text of a file, or of a pipe, that a person wrote.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no text in UTF-8, or has no end.
    """
    with open(path, 'rb') as file:
        content = file.read(LONGEST + 1)
    if len(content) > LONGEST:
        raise ValueError(f'it has more than {LONGEST >> 20} MiB')
    return io.TextIOWrapper(io.BytesIO(content), encoding='utf-8-sig').read()


def read_class_names(path: Optional[os.PathLike]) -> Optional[List[str]]:
    """The lines of a text file that are not empty, None for no file.

    Raises:
        PSTError: If it cannot be read as text.
    """
    if path is None:
        return None
    try:
        return [name for name in read_text(path).split('\n') if name]
    except (OSError, ValueError) as e:
        raise PSTError(f'Cannot read the class names {path}: {e}.') from None
