"""A model with the temperature of the smallest loss in its classifier, so that its probabilities can be believed."""
import os
from pathlib import Path
from typing import List, NamedTuple, Optional

import torch
import torch.nn as nn

from pst_timm.checkpoints import temperature_of
from pst_timm.checkpoints.folder import check_target, save_folder
from pst_timm.checkpoints.reading import PICKLES, SAFETENSORS, is_file
from pst_timm.metrics.agreement import compare_logits
from pst_timm.metrics.calibration import Refit, refit_temperature
from pst_timm.utils.errors import PSTError

from .answers import Outputs, Subject, answers, open_labelled

__all__ = ['Recalibration', 'bake_temperature', 'classifier_of', 'default_folder', 'recalibrate']

FEWEST = 50  # images; below that a temperature is a guess
LOWEST, HIGHEST = 0.05, 20.  # temperatures beyond these are those of images that are all right, or none
TOLERANCE = 1e-4  # of the largest logit, between logits over T and those of the new classifier


class Recalibration(NamedTuple):
    """What `recalibrate` did."""
    folder: Path
    """Where the model is."""
    fit: Refit
    """The new temperature, and what it is worth."""
    temperature: float
    """What the logits are divided by in all, with what the model was calibrated by before."""
    images: int
    broken: List[str]
    """Names of the images that could not be read."""


def default_folder(source: str) -> Path:
    """Where a calibrated model is written if no folder is named: next to what it is made of, or here for a name.

    Args:
        source: What `load_model` takes.
    """
    if not source.startswith('local-dir:') and not is_file(source):
        return Path(f'{source.split("@")[0].rsplit("/", 1)[-1].rsplit(":", 1)[-1]}-calibrated')
    path = Path(source.removeprefix('local-dir:'))
    if path.name in ('', '..'):
        path = Path(os.path.abspath(path))
    name = path.name
    while not path.is_dir() and Path(name).suffix in (SAFETENSORS, *PICKLES):
        name = Path(name).stem
    return path.with_name(f'{name}-calibrated')


def recalibrate(
        subject: Subject,
        data_dir: str,
        folder: Optional[os.PathLike] = None,
        split: str = 'validation',
        force: bool = False,
        overwrite: bool = False,
        batch_size: int = 64,
        workers: int = 0,
) -> Recalibration:
    """Refit the temperature of a model, and write it with that in its classifier as a folder that timm reads.

    Args:
        subject: The model; its weights become the calibrated ones.
        data_dir: Labelled images that the model was not trained on.
        folder: Folder to write, None for `default_folder`.
        split: Split of the data.
        force: Whether to write a model that is not better calibrated on images held out.
        overwrite: Whether the files of an earlier model in the folder may be replaced; never the source.
        batch_size: Images at a time.
        workers: Processes that read images, 0 for this one.

    Raises:
        PSTError: If the images do not tell a temperature, it does not help, the classifier cannot take it, or the
            folder cannot be written. Then nothing is written.
    """
    folder = default_folder(subject.source) if folder is None else Path(folder)
    check_target(folder, Path(subject.source.removeprefix('local-dir:')), overwrite)
    classifier_of(subject.model, subject.source)
    outputs = Outputs.gather(answers(
        subject, open_labelled(subject, data_dir, split), batch_size, workers, 'Recalibrate', embeddings=False))
    count = len(outputs.names)
    if count < FEWEST:
        raise PSTError(f'{count} images are too few to tell a temperature: {FEWEST} at least, better a thousand.')
    fit = refit_temperature(torch.from_numpy(outputs.logits), torch.from_numpy(outputs.labels))
    if not LOWEST <= fit.temperature <= HIGHEST:
        right = (outputs.logits.argmax(axis=1) == outputs.labels).mean()
        raise PSTError(
            f'{data_dir} does not tell a temperature: the best is {fit.temperature:.3g}, as {right:.1%} of the {count} '
            f'images are classified right. Take images that the model was not trained on, of its own classes.')
    if not fit.helps and not force:
        raise PSTError(
            f'A temperature of {fit.temperature:.4g} makes {subject.source} no better calibrated on images held out: '
            f'loss {fit.loss:.4f} before and {fit.loss_refitted:.4f} after, calibration error {fit.ece:.2%} and '
            f'{fit.ece_refitted:.2%}. Nothing was written; keep the model as it is, or write it with --force.')
    total = (temperature_of(subject.model) or 1.) * fit.temperature
    bake_temperature(subject, fit.temperature)
    config = subject.model.pretrained_cfg
    config['temperature'] = total
    config['input_size'] = tuple(subject.input_size)  # that of --img-size, if there is one
    save_folder(subject.model.cpu(), folder)
    return Recalibration(folder, fit, total, count, outputs.broken)


def classifier_of(model: nn.Module, source: str) -> List[nn.Module]:
    """The last layers of a classifier, one or, in models that were distilled, two.

    Raises:
        PSTError: If they are other layers than linear ones and convolutions.
    """
    found = model.get_classifier() if hasattr(model, 'get_classifier') else None
    layers = list(found) if isinstance(found, (tuple, list, nn.ModuleList)) else [found]
    other = next((layer for layer in layers if not isinstance(layer, (nn.Linear, nn.Conv2d))), None)
    if other is not None or not layers or found is None:
        raise PSTError(
            f'{source} cannot take a temperature: its classifier is a {type(other).__name__}, where a linear layer or '
            f'a convolution was expected. Divide its logits where they are used (predict has --temperature).')
    return layers


@torch.inference_mode()
def bake_temperature(subject: Subject, temperature: float) -> None:
    """Divide the weights of a classifier, so that its logits are what they were over the temperature.

    Raises:
        PSTError: If the classifier cannot take it; the model is then of no use.
    """
    model, layers = subject.model, classifier_of(subject.model, subject.source)
    device = next(model.parameters()).device
    x = torch.randn(2, *subject.input_size, generator=torch.Generator().manual_seed(0)).to(device)
    expected = model(x) / temperature
    seen = set()
    for layer in layers:
        for value in (layer.weight, layer.bias):
            if value is not None and id(value) not in seen:  # two classifiers may share one
                seen.add(id(value))
                value.div_(temperature)
    difference = compare_logits(model(x), expected).difference
    if not difference <= TOLERANCE:
        raise PSTError(
            f'{subject.source} cannot take a temperature: what its classifier gives does not shrink with its weights. '
            f'Divide its logits where they are used (predict has --temperature).')
