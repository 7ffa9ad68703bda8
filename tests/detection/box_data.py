"""Small folders of images with boxes, as COCO and Pascal VOC have them."""
import json
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ('cat', 'dog')
COLORS = np.array([[230, 20, 20], [20, 230, 20], [20, 20, 230], [230, 230, 20], [230, 20, 230]], np.uint8)


def picture(width, height, boxes=()):
    """A grey image with a rectangle of its own colour in each box (XYXY, whole pixels)."""
    pixels = np.full((height, width, 3), 90, np.uint8)
    for color, (x1, y1, x2, y2) in zip(COLORS, boxes):
        pixels[y1:y2, x1:x2] = color
    return Image.fromarray(pixels)


def annotation(i, image_id=1, category_id=1, bbox=(2, 3, 10, 8), **more):
    return dict(dict(id=i, image_id=image_id, category_id=category_id, bbox=list(bbox), area=bbox[2] * bbox[3],
                     iscrowd=0), **more)


def coco(images=2, size=(40, 30), annotations=None, categories=None, **more):
    """The content of a file of COCO's; by default one box in each image."""
    width, height = size
    if annotations is None:
        annotations = [annotation(i + 1, i + 1, 1 + i % 2) for i in range(images)]
    return dict(dict(
        images=[dict(id=i + 1, file_name=f'{i}.png', width=width, height=height) for i in range(images)],
        annotations=annotations,
        categories=[dict(id=k + 1, name=name) for k, name in enumerate(CLASSES)] if categories is None else categories,
    ), **more)


def write_coco(root, content=None, split='train', file=None, folder=None, size=(40, 30), files=True):
    """A folder of COCO's; returns it."""
    content = coco(size=size) if content is None else content
    path = Path(file or root / 'annotations' / f'instances_{split}.json')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    folder = Path(folder or root / split)
    folder.mkdir(parents=True, exist_ok=True)
    if files:
        for i in range(4):
            picture(*size, [(2, 3, 12, 11)]).save(folder / f'{i}.png')
    return root


def voc_object(name='cat', corners=(3, 4, 12, 11), difficult=0):
    box = ''.join(f'<{k}>{v}</{k}>' for k, v in zip(('xmin', 'ymin', 'xmax', 'ymax'), corners))
    return f'<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{box}</bndbox></object>'


def voc_xml(objects=None, width=40, height=30, name='0.png'):
    objects = [voc_object()] if objects is None else objects
    return (f'<annotation><filename>{name}</filename><size><width>{width}</width><height>{height}</height>'
            f'<depth>3</depth></size>{"".join(objects)}</annotation>')


def write_voc(root, splits=None, xml=None, size=(40, 30)):
    """A folder of Pascal VOC; returns it."""
    splits = {'train': ['a', 'b'], 'val': ['c']} if splits is None else splits
    for name in ('Annotations', 'ImageSets/Main', 'JPEGImages'):
        (root / name).mkdir(parents=True, exist_ok=True)
    for split, names in splits.items():
        (root / 'ImageSets/Main' / f'{split}.txt').write_text(''.join(f'{name}\n' for name in names))
        for name in names:
            (root / 'Annotations' / f'{name}.xml').write_text((xml or {}).get(name, voc_xml()))
            picture(*size, [(2, 3, 12, 11)]).save(root / 'JPEGImages' / f'{name}.jpg', quality=100, subsampling=0)
    return root
