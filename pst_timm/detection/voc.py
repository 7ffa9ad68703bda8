"""Pascal VOC folders: `Annotations/*.xml`, `JPEGImages/`, `ImageSets/Main/{split}.txt`.

The numbers of VOC are pixels counted from 1, the last one included: a box from xmin=1 to xmax=640 covers an image 640
pixels wide. Here that is 0 to 640: 1 is taken from xmin and ymin. A 0, which tools that count from 0 write, is the edge
of the image too. `difficult` objects are trained on, and need not be found in evaluation.
"""
import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

from pst_timm.data.images import EXTENSIONS, listed
from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import read_text
from pst_timm.utils.markdown import plain

from .boxes import Annotations, BoxCollector, check_class_list, map_classes
from .splits import choose_split

__all__ = ['find_voc', 'read_voc']

LARGEST = 16 * 2 ** 20  # bytes of one annotation
IMAGES = 'JPEGImages'
NEEDED = ('Annotations', 'ImageSets', IMAGES)


class VOCObject(NamedTuple):
    """An `object` of an annotation, as the file has it."""
    name: str
    corners: Tuple[float, float, float, float]
    difficult: bool


class VOCImage(NamedTuple):
    """An annotation, as the file has it."""
    filename: str
    width: int
    height: int
    objects: List[VOCObject]


def find_voc(root: Path) -> Optional[Path]:
    """The folder that has VOC's folders: this one, or the only one that is one or two levels below; None without.

    Raises:
        PSTError: If there are several.
    """
    found = [root] if _is_voc(root) else []
    level = [root]
    for _ in range(2):
        if not found:
            level = [path for folder in level for path in _folders(folder)]
            found = [path for path in level if _is_voc(path)]
    if len(found) > 1:
        raise PSTError(
            f'{root} has several folders of Pascal VOC ({listed([p.relative_to(root) for p in found], 10)}): name one '
            f'of them.')
    return found[0] if found else None


def _is_voc(folder: Path) -> bool:
    return (folder / 'Annotations').is_dir() and ((folder / 'ImageSets').is_dir() or (folder / IMAGES).is_dir())


def _folders(folder: Path) -> List[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError as e:
        raise PSTError(f'Cannot open the folder {folder}: {e.strerror}.') from e


def read_voc(
        folder: Path,
        split: str,
        class_names: Optional[Sequence[str]] = None,
        show: bool = True,
) -> Tuple[Annotations, Path]:
    """Read a split.

    Args:
        folder: The folder that `find_voc` found.
        split: Name of the split.
        class_names: Classes in the order of the labels; those of the training split, by name, if None.
        show: Whether this process has anything to say.

    Returns:
        The annotations, and the folder of the images.

    Raises:
        PSTError: If something is missing or broken; names the file.
    """
    missing = [name for name in NEEDED if not (folder / name).is_dir()]
    if missing:
        raise PSTError(f'{folder} lacks {listed(missing)}: Pascal VOC has the folders {", ".join(NEEDED)}.')
    lists = _lists(folder)
    if not lists:
        raise PSTError(
            f'{folder / "ImageSets" / "Main"} has no lists of images: expected train.txt and the like, with one name '
            f'a line.')
    path = lists[choose_split(split, lists, str(folder))]
    records = _records(folder, path)
    named = list(class_names) if class_names is not None else _training_classes(folder, lists, path, records)
    check_class_list(named, str(path))
    found = {item.name for _, record, _ in records for item in record.objects}
    places = map_classes(sorted(found), named, str(path))
    collector = BoxCollector(str(path), folder / IMAGES)
    files = _image_files(folder / IMAGES)
    for i, (name, record, source) in enumerate(records):
        # the name of the file counts: what stands in the XML is often that of another tool's folder
        file = files.get(name) or record.filename
        collector.image(i + 1, file or f'{name}.jpg', record.width, record.height)
        for k, item in enumerate(record.objects):
            x1, y1, x2, y2 = item.corners
            corners = (max(x1 - 1, min(x1, 0.)), max(y1 - 1, min(y1, 0.)), x2, y2)
            collector.box(
                corners, places[item.name], f'object {k + 1} ({plain(item.name)}) in {source.name}',
                difficult=item.difficult)
    return collector.finish(named, range(1, len(named) + 1), show), folder / IMAGES


def _lists(folder: Path) -> Dict[str, Path]:
    main = folder / 'ImageSets' / 'Main'
    if not main.is_dir():
        return {}
    # the lists of single classes, such as cat_train.txt, are for classification
    names = {path.stem: path for path in sorted(main.glob('*.txt'))}
    return {name: path for name, path in names.items() if name.rpartition('_')[2] not in names or '_' not in name}


def _records(folder: Path, path: Path) -> List[Tuple[str, VOCImage, Path]]:
    """Name, content and file of every annotation of a list."""
    try:
        names = [line.strip() for line in read_text(path).split('\n')]
    except (OSError, ValueError) as e:
        raise PSTError(f'Cannot read the list of images {path}: {e}.') from e
    names = [name for name in names if name]
    if not names:
        raise PSTError(f'The list of images {path} is empty.')
    seen = set()
    for name in names:
        if name in seen:
            raise PSTError(f'{path} names {plain(name)!r} twice: each image counts once.')
        if name != os.path.basename(name) or name in ('.', '..') or '\0' in name:
            raise PSTError(f'{path} has the line {plain(name)!r}: expected the name of an image without its ending.')
        seen.add(name)
    records = []
    for name in names:
        source = folder / 'Annotations' / f'{name}.xml'
        records.append((name, read_annotation(source), source))
    return records


def _training_classes(
        folder: Path,
        lists: Dict[str, Path],
        path: Path,
        records: List[Tuple[str, VOCImage, Path]],
) -> List[str]:
    """Names of the classes of the training split, of this one where there is none, by name."""
    training = next((lists[name] for name in ('train', 'trainval') if name in lists), path)
    if training != path:
        records = _records(folder, training)
    return sorted({item.name for _, record, _ in records for item in record.objects})


def _image_files(folder: Path) -> Dict[str, str]:
    """Names of the image files by their stems."""
    try:
        names = sorted(os.listdir(folder), reverse=True)  # of two with one stem, the first by name
    except OSError as e:
        raise PSTError(f'Cannot open the folder {folder}: {e.strerror}.') from e
    return {os.path.splitext(name)[0]: name for name in names if os.path.splitext(name)[1].lower() in EXTENSIONS}


def read_annotation(path: Path) -> VOCImage:
    """Read an XML file of VOC.

    Raises:
        PSTError: If it is missing, broken, or says something impossible.
    """
    root = _parse(path)
    if root.tag != 'annotation':
        raise PSTError(f'{path} is no annotation of Pascal VOC: its first element is <{plain(root.tag, 40)}>.')
    width, height = (_size(root, axis, path) for axis in ('width', 'height'))
    filename = (root.findtext('filename') or '').strip()
    if filename and filename != os.path.basename(filename.replace('\\', '/')):
        filename = ''
    objects = [_object(node, i, path) for i, node in enumerate(root.findall('object'))]
    return VOCImage(filename, width, height, objects)


def _parse(path: Path) -> ElementTree.Element:
    try:
        if not path.is_file():
            raise PSTError(f'{path} is missing, or no file: each image of a split needs its annotation.')
        if path.stat().st_size > LARGEST:
            raise PSTError(f'{path} has more than {LARGEST >> 20} MiB, which no annotation needs.')
        content = path.read_bytes()
    except OSError as e:
        raise PSTError(f'Cannot read {path}: {e.strerror}.') from e
    # an entity may stand for more text than memory holds, or for another file; without a DTD there is none, and in
    # encodings of more than one byte a letter the check would not see it
    if b'\0' in content:
        raise PSTError(f'{path} is not XML in UTF-8.')
    if b'<!DOCTYPE' in content.upper() or b'<!ENTITY' in content.upper():
        raise PSTError(f'{path} declares a DOCTYPE or an ENTITY, which annotations do not need: take it out.')
    try:
        return ElementTree.fromstring(content)
    except (ElementTree.ParseError, LookupError, ValueError) as e:
        raise PSTError(f'{path} is not whole XML ({e}).') from e


def _size(root: ElementTree.Element, axis: str, path: Path) -> int:
    """Width or height, 0 where there is none or, as some tools write, 0."""
    text = (root.findtext(f'size/{axis}') or '0').strip()
    value = _number(text)
    if value is None or value < 0 or value != int(value) or value > 2 ** 24:
        raise PSTError(f'{path}: the {axis} of the image is {plain(text, 40)!r}; expected a whole number of pixels.')
    return int(value)


def _object(node: ElementTree.Element, index: int, path: Path) -> VOCObject:
    where = f'{path}, object {index + 1}'
    name = (node.findtext('name') or '').strip()
    if not name:
        raise PSTError(f'{where} has no name of a class.')
    corners = []
    for key in ('xmin', 'ymin', 'xmax', 'ymax'):
        text = node.findtext(f'bndbox/{key}')
        value = _number(text)
        if value is None:
            raise PSTError(
                f'{where} ({plain(name)}): its {key} is {plain("missing" if text is None else repr(text), 40)}; '
                f'expected a finite number of pixels.')
        corners.append(value)
    difficult = (node.findtext('difficult') or '0').strip()
    if difficult not in ('0', '1'):
        raise PSTError(f'{where} ({plain(name)}): difficult is {plain(difficult, 40)!r}; expected 0 or 1.')
    return VOCObject(name, tuple(corners), difficult == '1')


def _number(text: Optional[str]) -> Optional[float]:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if abs(value) < 2 ** 31 else None
