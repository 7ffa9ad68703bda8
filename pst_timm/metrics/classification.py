"""Precision, recall and F1 over the classes, and accuracy on reassessed labels."""
from typing import Any, Dict, List

import torch
from timm.data import RealLabelsImagenet

from pst_timm.utils.errors import PSTError

from .base import Metric

__all__ = ['ClassReport', 'RealLabels']


class ClassReport(Metric):
    """Precision, recall and F1 in percent, averaged over the classes."""

    def __init__(self, average: str):
        """
        Args:
            average: 'macro' for equal classes, 'weighted' for classes by their size, 'micro' for equal images.
        """
        self.average = average
        self.predictions: List[torch.Tensor] = []
        self.targets: List[torch.Tensor] = []

    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        self.predictions.append(output.argmax(dim=-1).cpu())
        self.targets.append(target.cpu())

    def results(self) -> Dict[str, Any]:
        prediction, target = torch.cat(self.predictions), torch.cat(self.targets)
        size = int(max(prediction.max(), target.max())) + 1
        hits = torch.bincount(target[prediction == target], minlength=size).double()
        predicted = torch.bincount(prediction, minlength=size).double()
        present = torch.bincount(target, minlength=size).double()
        if self.average == 'micro':
            hits, predicted, present = (x.sum().reshape(1) for x in (hits, predicted, present))
        precision = hits / predicted.clamp(min=1)
        recall = hits / present.clamp(min=1)
        f1 = 2 * hits / (predicted + present).clamp(min=1)
        # classes that neither are there nor were guessed do not count
        weight = present if self.average == 'weighted' else ((present + predicted) > 0).double()
        return {
            name: round(100 * ((value * weight).sum() / weight.sum()).item(), 4)
            for name, value in (('precision', precision), ('recall', recall), ('f1', f1))
        }


class RealLabels(Metric):
    """Accuracy on the reassessed labels of ImageNet (`Are we done with ImageNet?`, arXiv 2006.07159)."""

    def __init__(self, dataset: Any, path: str):
        """
        Args:
            dataset: ImageNet's 50,000 validation images.
            path: JSON file of the labels, or 'default' for the copy in timm.
        """
        try:
            self.real = RealLabelsImagenet(
                dataset.filenames(basename=True), real_json=None if path == 'default' else path)
        except (OSError, ValueError) as e:
            raise PSTError(f'--real-labels {path}: not a JSON file of labels ({e}).') from e
        except AssertionError:
            raise PSTError(
                "--real-labels needs ImageNet's 50,000 validation images, one label list for each; this split or "
                'file has another number.') from None

    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        self.real.add_result(output)

    def results(self) -> Dict[str, Any]:
        return dict(real_top1=round(self.real.get_accuracy(1), 4), real_top5=round(self.real.get_accuracy(5), 4))
