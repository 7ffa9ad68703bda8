"""What `validate` can measure beside accuracy, each fed batch by batch in the same pass over the data."""
from collections import OrderedDict
from contextlib import AbstractContextManager
from typing import Any, Callable, Dict, List, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import RealLabelsImagenet
from timm.task import ClassificationEvaluator

from .errors import EngineError

__all__ = [
    'AnswerMeasure', 'CalibrationMeasure', 'ClassMeasure', 'Measure', 'RealLabelsMeasure', 'SweepMeasure',
    'calibration_error', 'fit_temperature', 'pack_answers']


class Measure:
    """Takes in batches, gives out results."""

    def update(self, images: torch.Tensor, output: torch.Tensor, target: torch.Tensor) -> None:
        """Take in images (B, C, H, W), logits (B, classes) and labels (B,)."""
        raise NotImplementedError

    def results(self) -> Dict[str, Any]:
        """What was measured, by name."""
        raise NotImplementedError


def calibration_error(logits: torch.Tensor, target: torch.Tensor, bins: int = 15) -> float:
    """Expected calibration error: how far confidence and accuracy lie apart, from 0 to 1.

    Args:
        logits: Logits (N, classes).
        target: Labels (N,).
        bins: Bins of equal width over the confidence.
    """
    confidence, prediction = logits.softmax(dim=-1).max(dim=-1)
    correct = prediction.eq(target).to(confidence.dtype)
    index = (confidence * bins).long().clamp(max=bins - 1)
    # sum over bins of n_b / N * |accuracy - confidence| = |sum of (correct - confidence) in the bin| / N
    gaps = torch.zeros(bins, dtype=confidence.dtype, device=confidence.device)
    gaps.scatter_add_(0, index, correct - confidence)
    return (gaps.abs().sum() / len(target)).item()


def fit_temperature(logits: torch.Tensor, target: torch.Tensor) -> float:
    """The temperature by which to divide the logits for the smallest cross-entropy.

    Args:
        logits: Logits (N, classes).
        target: Labels (N,).
    """
    # inference_mode is left, as the fit needs gradients
    with torch.inference_mode(False), torch.enable_grad():
        logits, target = logits.clone(), target.clone()
        log_temperature = torch.zeros((), dtype=logits.dtype, device=logits.device, requires_grad=True)
        optimizer = torch.optim.LBFGS([log_temperature], max_iter=100, line_search_fn='strong_wolfe')

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(logits / log_temperature.exp(), target)
            loss.backward()
            return loss

        optimizer.step(closure)
        return log_temperature.exp().item()


class AnswerMeasure(Measure):
    """Which images are classified right, so that two models can be compared image by image."""

    def __init__(self):
        self.right: List[torch.Tensor] = []

    def update(self, images: torch.Tensor, output: torch.Tensor, target: torch.Tensor) -> None:
        self.right.append(output.argmax(dim=-1).eq(target).cpu())

    def results(self) -> Dict[str, Any]:
        """`answers`: hexadecimal digits for four images each in their order, first image in the highest bit."""
        return dict(answers=pack_answers(torch.cat(self.right).tolist()))


def pack_answers(right: Sequence[bool]) -> str:
    """Right and wrong answers as hexadecimal digits for four images each; zeros fill the last digit."""
    bits = ''.join('1' if r else '0' for r in right)
    bits += '0' * (-len(bits) % 4)
    return ''.join(f'{int(bits[i:i + 4], 2):x}' for i in range(0, len(bits), 4))


class CalibrationMeasure(Measure):
    """Calibration error as it is, and after the temperature that mends it (fitted on these same images)."""

    def __init__(self):
        self.logits: List[torch.Tensor] = []
        self.targets: List[torch.Tensor] = []

    def update(self, images: torch.Tensor, output: torch.Tensor, target: torch.Tensor) -> None:
        self.logits.append(output.double().cpu())
        self.targets.append(target.cpu())

    def results(self) -> Dict[str, Any]:
        logits, target = torch.cat(self.logits), torch.cat(self.targets)
        temperature = fit_temperature(logits, target)
        return dict(
            ece=round(calibration_error(logits, target), 5),
            temperature=round(temperature, 4),
            ece_calibrated=round(calibration_error(logits / temperature, target), 5),
        )


class ClassMeasure(Measure):
    """Precision, recall and F1 in percent, averaged over the classes."""

    def __init__(self, average: str):
        """
        Args:
            average: 'macro' for equal classes, 'weighted' for classes by their size, 'micro' for equal images.
        """
        self.average = average
        self.predictions: List[torch.Tensor] = []
        self.targets: List[torch.Tensor] = []

    def update(self, images: torch.Tensor, output: torch.Tensor, target: torch.Tensor) -> None:
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


class RealLabelsMeasure(Measure):
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
            raise EngineError(f'--real-labels {path}: not a JSON file of labels ({e}).') from e
        except AssertionError:
            raise EngineError(
                "--real-labels needs ImageNet's 50,000 validation images, one label list for each; this split or "
                'file has another number.') from None

    def update(self, images: torch.Tensor, output: torch.Tensor, target: torch.Tensor) -> None:
        self.real.add_result(output)

    def results(self) -> Dict[str, Any]:
        return dict(real_top1=round(self.real.get_accuracy(1), 4), real_top5=round(self.real.get_accuracy(5), 4))


class SweepMeasure(Measure):
    """Accuracy with coarse attention and with several amounts of fine attention, both fusions."""

    def __init__(
            self,
            model: nn.Module,
            runnable: nn.Module,
            topks: Sequence[int],
            autocast: Callable[[], AbstractContextManager],
            measures: Callable[[], List[Measure]] = list,
            fusions: Sequence[str] = ('gate', 'joint'),
    ):
        """
        Args:
            model: The model, which must have `set_topk(topk, fusion)`.
            runnable: The model or what it was compiled into.
            topks: Coarse tokens to select; 0 is coarse attention alone and needs no fusion.
            autocast: Context of the forward pass.
            measures: Makes the further measures of a setting.
            fusions: Fusions to try.
        """
        if not hasattr(model, 'set_topk'):
            raise EngineError('--topk-sweep needs a model with fine attention (set_topk), such as resnet50_pst.')
        self.model, self.runnable, self.autocast = model, runnable, autocast
        device = next(model.parameters()).device
        self.settings = OrderedDict(
            ((k, fusion), (ClassificationEvaluator(device), measures()))
            for k in dict.fromkeys(topks) for fusion in (fusions if k else fusions[:1]))

    def update(self, images: torch.Tensor, output: torch.Tensor, target: torch.Tensor) -> None:
        for (k, fusion), (evaluator, measures) in self.settings.items():
            self.model.set_topk(k, fusion)
            with self.autocast():
                output = self.runnable(images)
            evaluator.update(output, target)
            for measure in measures:
                measure.update(images, output, target)

    def results(self) -> Dict[str, Any]:
        return {}

    def rows(self) -> List[Dict[str, Any]]:
        """One row of results per setting."""
        rows = []
        for (k, fusion), (evaluator, measures) in self.settings.items():
            metrics = {n: round(v, 6 if n == 'loss' else 4) for n, v in evaluator.compute().items()}
            row = dict(
                topk=k, fine_fusion=fusion if k else 'coarse', **metrics,
                top1_err=round(100 - metrics['top1'], 4), top5_err=round(100 - metrics['top5'], 4))
            for measure in measures:
                row.update(measure.results())
            rows.append(row)
        return rows
