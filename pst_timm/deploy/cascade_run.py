"""A cascade over images from files: class, probability, and the stage that told them."""
import logging
import os
from typing import Any, Dict, List, Sequence, Tuple

import torch
from timm.data import create_transform
from torch.utils.data import DataLoader

from pst_timm.data.images import listed
from pst_timm.data.loaders import plain_worker_errors
from pst_timm.data.samples import Samples, collate_samples
from pst_timm.utils.devices import check_device, choose_threads
from pst_timm.utils.errors import PSTError
from pst_timm.utils.progress import progress_bar

from .cascade import Cascade, Watch

__all__ = ['COLUMNS', 'run_cascade']

_logger = logging.getLogger(__name__)

COLUMNS = ('image', 'class', 'probability', 'stage', 'cost')


@torch.inference_mode()
def run_cascade(
        cascade: Cascade,
        paths: Sequence[os.PathLike],
        device: str = '',
        batch_size: int = 64,
        workers: int = 0,
) -> Tuple[List[Dict[str, Any]], str]:
    """Classify images; warns if far more are passed on than when the cascade was fitted.

    Args:
        cascade: The cascade.
        paths: Image files, and folders with images.
        device: 'cpu', 'cuda', ...; the best there is if empty.
        batch_size: Images at a time.
        workers: Processes that read images, 0 for this one.

    Returns:
        A row of `COLUMNS` for each image that can be read, and what came of all of them in a sentence.

    Raises:
        PSTError: If there is no image, or none can be read.
    """
    place = check_device(device)
    if place.type == 'cpu':
        choose_threads()
    samples = Samples.loose(paths, create_transform(**cascade.config), 'L' if cascade.input_size[0] == 1 else 'RGB')
    names = cascade.class_names or [f'class {i}' for i in range(cascade.num_classes)]
    loader = DataLoader(samples, batch_size, num_workers=workers, collate_fn=collate_samples)
    watch = Watch(list(cascade.stages))  # files come in order of their names, so that a look halfway tells little
    cascade.to(place)
    rows: List[Dict[str, Any]] = []
    broken: List[str] = []
    with plain_worker_errors():
        for batch, unread in progress_bar(loader, len(loader), 'Cascade', True):
            broken += [samples.names[image.index] for image in unread]
            if batch is None:
                continue
            output, counts = cascade.route(batch.image.to(place))
            watch.add(counts)
            best = output.logits.cpu().double().softmax(dim=-1).max(dim=-1)
            for index, label, probability, stage, cost in zip(
                    batch.index.tolist(), best.indices.tolist(), best.values.tolist(), output.stage.tolist(),
                    output.cost.tolist()):
                rows.append(dict(zip(COLUMNS, (
                    samples.names[index], names[label], round(probability, 6), stage + 1, round(cost, 6)))))
    if broken:
        _logger.warning(f'Skipped {len(broken)} image(s) that cannot be read: {listed(broken)}.')
    if not rows:
        raise PSTError(f'Not one of the {len(broken)} images could be read.')
    watch.look(now=True)
    shares = [sum(row['stage'] == i + 1 for row in rows) / len(rows) for i in range(len(cascade.stages))]
    told = ', '.join(f'stage {i + 1} answered {share:.1%}' for i, share in enumerate(shares))
    mean = sum(row['cost'] for row in rows) / len(rows)
    return rows, f'{len(rows):,} images: {told}; mean cost {mean:.4g} {cascade.unit}, as measured when it was fitted.'
