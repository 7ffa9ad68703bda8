"""ranks.py whose ranks note the images they read: torchrun drawn.py FOLDER...

In each FOLDER, rank N leaves drawnN.txt: a line for each epoch, with the size of the split, the index and
a checksum of each image in its order.
"""
import os
import sys
import zlib
from pathlib import Path
from typing import List, Tuple

from pst_timm.data.datasets import CheckedImageDataset
from pst_timm.engine import training

if __name__ == '__main__':
    from ranks import main


def notes_of(path: Path, count: int) -> List[List[Tuple[int, int]]]:
    """Pairs of index and checksum by epoch, of a run on so many images."""
    pairs = [
        [tuple(map(int, word.split(':'))) for word in line.split()] for line in path.read_text().splitlines() if line]
    # validation reads through the same class, and from folders of other sizes
    return [[(i, checksum) for size, i, checksum in line if size == count] for line in pairs]


def note_images() -> None:
    """Note what is read from now on in drawnN.txt of the folder in the environment."""
    read, start = CheckedImageDataset.__getitem__, training.start_epoch

    def note(text):
        with open(Path(os.environ['NOTES']) / f'drawn{os.environ["RANK"]}.txt', 'a') as f:
            f.write(text)

    def noting_read(dataset, index):
        image, label = read(dataset, index)
        note(f'{len(dataset)}:{index}:{zlib.crc32(image.numpy().tobytes())} ')
        return image, label

    def noting_start(run, epoch):
        note('\n')
        start(run, epoch)

    CheckedImageDataset.__getitem__, training.start_epoch = noting_read, noting_start


def note_into(folder: str) -> None:
    os.environ['NOTES'] = folder


if __name__ == '__main__':
    note_images()
    sys.exit(main(before=note_into))
