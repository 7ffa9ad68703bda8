"""COCO's JSON files: boxes XYWH, areas of masks, crowds, identifiers with holes."""
import json
import os
import posixpath
from collections import defaultdict
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from pst_timm.data.images import listed
from pst_timm.utils.errors import PSTError
from pst_timm.utils.markdown import plain

from .boxes import MOST, Annotations, BoxCollector, check_class_list, map_classes
from .splits import choose_split

__all__ = ['find_coco', 'read_coco']

LARGEST = 4 * 2 ** 30  # bytes; the training split of COCO has 0.45 GB
LONGEST = 255  # bytes of the name of a file or folder
BESIDE = '_annotations.coco.json'  # as Roboflow calls the file that lies among the images


class CocoSplit(NamedTuple):
    """Where a split is."""
    file: Path
    images: Tuple[Path, ...]
    """Folders that may hold the images, the likeliest first."""


def find_coco(root: Path) -> Dict[str, CocoSplit]:
    """The splits that a folder has, by name; none where it is no folder of COCO's.

    Known are `annotations/instances_NAME.json` or `annotations/NAME.json` with images in `NAME/`, `images/NAME/` or
    `images/`, and `NAME/_annotations.coco.json` beside its images.
    """
    found = {}
    for path in sorted((root / 'annotations').glob('*.json')):
        name = path.stem.removeprefix('instances_')
        if path.stem.startswith(('captions_', 'person_keypoints_', 'stuff_', 'panoptic_', 'image_info_')):
            continue
        if name not in found or path.stem.startswith('instances_'):
            found[name] = CocoSplit(path, (root / name, root / 'images' / name, root / 'images', root))
    for path in sorted(root.glob(f'*/{BESIDE}')):
        found.setdefault(path.parent.name, CocoSplit(path, (path.parent, path.parent / 'images')))
    return found


def read_coco(
        root: Path,
        splits: Dict[str, CocoSplit],
        split: str,
        class_names: Optional[Sequence[str]] = None,
        show: bool = True,
) -> Tuple[Annotations, Path]:
    """Read a split.

    Args:
        root: The folder of the data.
        splits: From `find_coco`.
        split: Name of the split.
        class_names: Classes in the order of the labels; the categories of the file, by identifier, if None.
        show: Whether this process has anything to say.

    Returns:
        The annotations, and the folder of the images.

    Raises:
        PSTError: If something is missing or broken; names the file and the entry.
    """
    path, folders = splits[choose_split(split, splits, str(root))]
    content = _read(path)
    categories = _categories(content, path)
    images = _images(content, path)
    folder = _folder(path, images, folders)
    collector = BoxCollector(str(path), folder)
    boxes = _boxes(content, images, categories, collector)
    used = {categories[entry['category_id']] for entries in boxes.values() for _, entry in entries}
    if class_names is None:
        named, ids = list(categories.values()), list(categories)
    else:
        named = list(class_names)
        by_name = {name: i for i, name in categories.items()}
        # what the file has no number for gets one that it has not
        new = iter(range(max(categories) + 1, max(categories) + 1 + len(named)))
        ids = [by_name[name] if name in by_name else next(new) for name in named]
    check_class_list(named, str(path))
    places = map_classes(sorted(used), named, str(path))
    for image_id, (file, width, height) in images.items():
        collector.image(image_id, file, width, height)
        for i, entry in boxes.get(image_id, ()):
            where = _where(i, entry)
            x, y, w, h = collector.numbers(entry.get('bbox'), where)
            collector.box(
                (x, y, x + w, y + h), places[categories[entry['category_id']]], where, _area(entry, where, path),
                crowd=_flag(entry.get('iscrowd', 0), f'{path}, {where}: iscrowd'))
    return collector.finish(named, ids, show), folder


def _folder(path: Path, images: Dict[int, Tuple[str, int, int]], folders: Sequence[Path]) -> Path:
    """The folder that has the images."""
    if not images:
        raise PSTError(f'{path} has no images.')
    first = [file for file, _, _ in images.values()][:10]
    for folder in folders:
        if any((folder / file).is_file() for file in first):
            return folder
    for folder in folders[:-1]:  # which images are missing is told later
        if folder.is_dir():
            return folder
    raise PSTError(
        f'The images of {path} are not there: expected {plain(first[0])} in one of '
        f'{listed([str(folder) for folder in folders], 5)}.')


def _read(path: Path) -> Dict[str, Any]:
    def without_masks(entry: Dict[str, Any]) -> Dict[str, Any]:
        entry.pop('segmentation', None)  # most of the file, and of the memory
        return entry

    try:
        if not path.is_file():
            raise PSTError(f'{path} is no file.')
        if path.stat().st_size > LARGEST:
            raise PSTError(f'{path} has more than {LARGEST >> 30} GiB, which no annotations need.')
        content = json.loads(path.read_text(encoding='utf-8-sig'), object_hook=without_masks)
    except OSError as e:
        raise PSTError(f'Cannot read {path}: {e.strerror}.') from e
    except (ValueError, RecursionError) as e:
        if isinstance(e, PSTError):
            raise
        reason = 'nested too deeply' if isinstance(e, RecursionError) else plain(e, 200)
        raise PSTError(f'{path} is not whole JSON ({reason}).') from e
    if not isinstance(content, dict):
        raise PSTError(f'{path} is no file of COCO: expected "images", "annotations" and "categories".')
    for key in ('images', 'annotations', 'categories'):
        entries = content.get(key)
        if not isinstance(entries, list):
            raise PSTError(f'{path} has no list of {key}: expected "images", "annotations" and "categories", as COCO '
                           f'has them.')
        for i, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise PSTError(f'{path}: entry {i} of {key} is {plain(entry, 40)}; expected an object.')
    return content


def _identifier(entry: Dict[str, Any], key: str, where: str) -> int:
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not -2 ** 62 < value < 2 ** 62:
        shown = plain(repr(value), 40) if key in entry else 'missing'
        raise PSTError(f'{where}: its {key} is {shown}; expected a whole number.')
    return value


def _categories(content: Dict[str, Any], path: Path) -> Dict[int, str]:
    """Names by identifier, in the order of the identifiers."""
    found: Dict[int, str] = {}
    for i, entry in enumerate(content['categories']):
        key = _identifier(entry, 'id', f'{path}, entry {i} of categories')
        if key in found:
            raise PSTError(f'{path}: two categories have the id {key}.')
        found[key] = entry.get('name')
    found = dict(sorted(found.items()))
    check_class_list(list(found.values()), str(path))
    return found


def _images(content: Dict[str, Any], path: Path) -> Dict[int, Tuple[str, int, int]]:
    """File, width and height by identifier, in the order of the file."""
    found: Dict[int, Tuple[str, int, int]] = {}
    for i, entry in enumerate(content['images']):
        where = f'{path}, entry {i} of images'
        key = _identifier(entry, 'id', where)
        if key in found:
            raise PSTError(f'{where}: its id {key} is that of {plain(found[key][0])!r} already.')
        file = entry.get('file_name')
        if not isinstance(file, str) or not file.strip() or '\0' in file:
            raise PSTError(f'{where}: its file_name is {plain(repr(file), 80)}; expected the name of a file.')
        normal = posixpath.normpath(file)
        if any(len(part.encode('utf-8', 'surrogatepass')) > LONGEST for part in normal.split('/')):
            raise PSTError(f'{where}: {plain(file, 80)!r} is longer than the name of a file can be.')
        if os.path.isabs(normal) or normal.split('/')[0] == '..':
            raise PSTError(f'{where}: {plain(file)!r} is not below the folder of the images: name it relative to it.')
        found[key] = (normal, *(_pixels(entry, axis, where) for axis in ('width', 'height')))
    return found


def _pixels(entry: Dict[str, Any], axis: str, where: str) -> int:
    value = entry.get(axis)
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < MOST or value != int(value):
        raise PSTError(f'{where}: its {axis} is {plain(repr(value), 40)}; expected a whole number of pixels.')
    return int(value)


def _boxes(
        content: Dict[str, Any],
        images: Dict[int, Tuple[str, int, int]],
        categories: Dict[int, str],
        collector: BoxCollector,
) -> Dict[int, List[Tuple[int, Dict[str, Any]]]]:
    """The annotations of each image with their places in the file."""
    found = defaultdict(list)
    for i, entry in enumerate(content['annotations']):
        where = f'{collector.source}, {_where(i, entry)}'
        image_id = _identifier(entry, 'image_id', where)
        category = _identifier(entry, 'category_id', where)
        if category not in categories:
            raise PSTError(
                f'{where}: no category has its category_id {category}; there are {listed(list(categories), 10)}.')
        if image_id not in images:
            collector.note('boxes of images that the file does not have were dropped', _where(i, entry))
        else:
            found[image_id].append((i, entry))
    return found


def _where(index: int, entry: Dict[str, Any]) -> str:
    return f'annotation {plain(entry["id"], 40)}' if 'id' in entry else f'entry {index} of annotations'


def _area(entry: Dict[str, Any], where: str, path: Path) -> Optional[float]:
    area = entry.get('area')
    if area is not None and (isinstance(area, bool) or not isinstance(area, (int, float))):
        raise PSTError(f'{path}, {where}: its area is {plain(repr(area), 40)}; expected a number.')
    return area


def _flag(value: Any, where: str) -> bool:
    if value not in (0, 1) or isinstance(value, float):
        raise PSTError(f'{where} is {plain(repr(value), 40)}; expected 0 or 1.')
    return bool(value)
