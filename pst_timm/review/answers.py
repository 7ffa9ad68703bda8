"""A model's answers to images: logits, embeddings, labels, and how the images look. What all reviews start from."""
import logging
from pathlib import Path
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Sequence

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader

from pst_timm.checkpoints import label_names, load_model, preprocessing, set_attention
from pst_timm.data.datasets import create_eval_dataset
from pst_timm.data.images import listed
from pst_timm.data.loaders import plain_worker_errors
from pst_timm.data.samples import LOOKS, Samples, collate_samples
from pst_timm.engine.args import validate_args
from pst_timm.utils.cost import check_image_memory
from pst_timm.utils.devices import check_device, choose_threads
from pst_timm.utils.errors import PSTError
from pst_timm.utils.markdown import plain
from pst_timm.utils.progress import progress_bar

__all__ = ['Outputs', 'Subject', 'answers', 'open_labelled', 'open_loose', 'open_subject']

_logger = logging.getLogger(__name__)


class Subject(NamedTuple):
    """A model that is to answer, on its device in eval mode, and how it takes images."""
    model: nn.Module
    name: str
    """Architecture."""
    source: str
    """What it was read from."""
    class_names: List[str]
    """Names in the order of its outputs; 'class 0' and so on where it knows none."""
    knows_names: bool
    """Whether the names are its own."""
    mode: str
    """Mode of the images, 'RGB' or 'L'."""
    input_size: Sequence[int]
    """(C, H, W)."""
    transform: Callable[[Image.Image], torch.Tensor]
    device: torch.device


class Outputs(NamedTuple):
    """What a model gave for N images, in their order; those that could not be read are left out."""
    names: List[str]
    logits: np.ndarray
    """float32 (N, classes)."""
    embeddings: np.ndarray
    """float32 (N, features): what the classifier reads, pooled."""
    labels: np.ndarray
    """int64 (N,), -1 where there is none."""
    looks: np.ndarray
    """float64 (N, looks): a `Look` each, before preprocessing."""
    broken: List[str]
    """Names of the images that could not be read."""
    reasons: Sequence[str] = ()
    """Why not, one for each of these."""

    @property
    def probabilities(self) -> np.ndarray:
        """float64 (N, classes)."""
        return torch.from_numpy(self.logits).double().softmax(dim=1).numpy()

    @classmethod
    def gather(cls, parts: Iterator['Outputs']) -> 'Outputs':
        """Several as one.

        Raises:
            PSTError: If not one image could be read.
        """
        parts = list(parts)
        broken = [name for part in parts for name in part.broken]
        reasons = [reason for part in parts for reason in part.reasons]
        kept = [part for part in parts if part.names]
        if not kept:
            raise PSTError(f'Not one of the {len(broken)} images could be read, such as {listed(broken, 1)}.')
        arrays = (np.concatenate([getattr(part, key) for part in kept]) for key in cls._fields[1:5])
        return cls([name for part in kept for name in part.names], *arrays, broken, reasons)


def open_subject(
        source: str,
        *,
        use_ema: Optional[bool] = None,
        topk: Optional[int] = None,
        fine_fusion: Optional[str] = None,
        img_size: Optional[int] = None,
        device: str = '',
) -> Subject:
    """Open a classifier that is to answer.

    Args:
        source: What `load_model` takes.
        use_ema: Whether to take the moving average of a training checkpoint; None takes it where there is one.
        topk: Coarse tokens that fine attention selects per head; None for the model's own.
        fine_fusion: 'gate' or 'joint', likewise.
        img_size: Height and width of the input, the model's own if None.
        device: 'cpu', 'cuda', ...; the best there is if empty.

    Raises:
        PSTError: If the source holds no such model with weights, or cannot be set as asked.
    """
    place = check_device(device)
    if place.type == 'cpu':
        choose_threads()
    if img_size:
        check_image_memory(img_size)
    model = load_model(source, use_ema=use_ema, pretrained=True)
    if model.num_classes == 0:
        raise PSTError(f'{source} has no classifier: name one that has.')
    set_attention(model, topk, fine_fusion, source)
    config = preprocessing(model, source, {'img_size': img_size})
    channels = config['input_size'][0]
    if channels not in (1, 3):
        raise PSTError(f'{source} takes images of {channels} channels; images from files have 3, or 1 if grey.')
    names = label_names(model)
    return Subject(
        model.to(place).eval(),
        model.pretrained_cfg.get('architecture') or type(model).__name__,
        str(source),
        names or [f'class {i}' for i in range(model.num_classes)],
        bool(names),
        'L' if channels == 1 else 'RGB',
        config['input_size'],
        create_transform(**config),
        place,
    )


def open_labelled(subject: Subject, data_dir: str, split: str = 'validation', **flags: Any) -> Samples:
    """The images of a folder of class folders, or of a .tar file of them, with their labels.

    Args:
        subject: The model, by whose class names the folders go where it knows any.
        data_dir: The data.
        split: Split, or folder below the data; the data itself where it has no splits.
        flags: Further ones of `pst-timm validate` about data.

    Raises:
        PSTError: If there are no such data, or they have a class that the model does not know; or other numbers of
            classes, where the model knows no names: which folder is which output could only be guessed.
    """
    channels = len(subject.mode)
    args = validate_args(data_dir=str(data_dir), split=split, in_chans=channels, **flags)
    samples = Samples.labelled(
        create_eval_dataset(args, split, None), subject.transform, subject.class_names if subject.knows_names else ())
    outputs = len(subject.class_names)
    if len(samples.class_names) != outputs:
        raise PSTError(
            f'{data_dir} has {len(samples.class_names)} classes, and {subject.source} has {outputs} without names: '
            f'which is which is not known. Name a model of these classes.')
    return samples


def open_loose(subject: Subject, paths: Sequence[Path]) -> Samples:
    """Image files and those in folders, without labels; errors as in `Samples.loose`."""
    return Samples.loose(paths, subject.transform, subject.mode)


def answers(
        subject: Subject,
        samples: Samples,
        batch_size: int = 64,
        workers: int = 0,
        title: str = 'Answers',
        show: bool = True,
        embeddings: bool = True,
) -> Iterator[Outputs]:
    """What a model gives for images, batch by batch in their order, each batch with what was left out of it.

    Args:
        subject: The model.
        samples: The images.
        batch_size: Images at a time.
        workers: Processes that read images, 0 for this one.
        title: Name in the bar.
        show: Whether there is a bar, where standard error is a terminal.
        embeddings: Whether to give embeddings, which take a second pass through the head, and the most room of all;
            without, they are (N, 0).

    Raises:
        PSTError: If the model gives NaN or infinite logits.
    """
    loader = DataLoader(samples, batch_size, num_workers=workers, collate_fn=collate_samples)
    with plain_worker_errors():
        for batch, unread in progress_bar(loader, len(loader), title, show):
            broken = [samples.names[image.index] for image in unread]
            reasons = [image.reason for image in unread]
            if broken:
                told = [f'{plain(name, 300)} ({plain(reason, 300)})' for name, reason in zip(broken, reasons)]
                _logger.warning(f'Skipped {len(broken)} image(s) that cannot be read: {listed(told)}.')
            yield _answer(subject, samples, batch, broken, embeddings)._replace(reasons=reasons)


@torch.inference_mode()
def _answer(subject: Subject, samples: Samples, batch: Any, broken: List[str], embeddings: bool) -> Outputs:
    model = subject.model
    if batch is None:
        return Outputs([], *(np.zeros((0, 0)),) * 2, np.zeros(0, np.int64), np.zeros((0, len(LOOKS))), broken)
    features = model.forward_features(batch.image.to(subject.device))
    logits = model.forward_head(features)
    pooled = model.forward_head(features, pre_logits=True).flatten(1) if embeddings else logits[:, :0]
    if not torch.isfinite(logits).all():
        raise PSTError(f'{subject.source} gives NaN or infinite logits: use other weights.')
    return Outputs(
        [samples.names[k] for k in batch.index.tolist()],
        logits.float().cpu().numpy(),
        pooled.float().cpu().numpy(),
        batch.label.numpy(),
        torch.stack(batch.look, dim=1).numpy(),
        broken,
    )
