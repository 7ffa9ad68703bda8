"""Smaller numbers for the same weights: bfloat16, or int8 calibrated by images, written as files that run anywhere.

What is quantised is the folded model, with the attention as it is set, for any number of images at a time.
"""
import json
import logging
import os
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from timm.data import resolve_data_config

from pst_timm.checkpoints import load_model
from pst_timm.data.samples import NO_LABEL
from pst_timm.models import reparameterize
from pst_timm.utils.cost import weight_bytes
from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import check_output, write_json, write_whole
from pst_timm.utils.onnx_file import onnx_session, pack_onnx
from pst_timm.utils.progress import progress_bar

from . import openvino as ir
from . import qdq
from .export import metadata, serialized
from .latency import Latency, compare_latency
from .runtime import open_source

__all__ = [
    'BACKENDS', 'LEVELS', 'SUFFIXES', 'Agreement', 'Int8Job', 'QuantizeResult', 'Reference', 'default_output',
    'quantize', 'report_of', 'slowness']

_logger = logging.getLogger(__name__)

LEVELS = ('int8', 'bfloat16')
BACKENDS = ('onnxruntime', 'openvino')
SUFFIXES = {'onnxruntime': '.int8.onnx', 'openvino': '.int8.xml', 'bfloat16': '.bfloat16.pt2'}
RANKED_BY = 32  # images, most, that the layers are ranked by
ROUNDS = 20

Call = Callable[[torch.Tensor], torch.Tensor]
Batches = Iterable[Tuple[torch.Tensor, torch.Tensor]]


class Agreement(NamedTuple):
    """Answers of the quantised model beside those of the float model, in percent."""
    images: int
    agreement: float
    """Images with the same class first."""
    top1_float: Optional[float]
    """Accuracy of the float model, None without labels."""
    top1: Optional[float]
    """Accuracy of the quantised one."""

    @property
    def drop(self) -> float:
        """Points of accuracy that were lost; without labels, the share of answers that changed."""
        return 100. - self.agreement if self.top1 is None else self.top1_float - self.top1


class QuantizeResult(NamedTuple):
    """What `quantize` wrote, and what it is worth."""
    path: Path
    bytes: int
    """Of all files that the model needs."""
    float_bytes: int
    """Of the folded model's weights in float32."""
    float_layers: List[str]
    """Layers that stayed as they were."""
    held_out: Optional[Agreement]
    """On images of the training split that were not calibrated by."""
    validation: Optional[Agreement]
    latency: Dict[str, Latency]
    """Of one image, by form; ratios to the model as it was, eager in float32."""
    warnings: List[str]


class Reference:
    """Batches, and the float model's answers to them, which are computed once."""

    def __init__(self, model: nn.Module, batches: Batches):
        self.model, self.batches = model, batches
        self.answers: List[torch.Tensor] = []

    @torch.inference_mode()
    def compare(self, call: Call) -> Agreement:
        first = not self.answers
        same = right = right_float = labelled = count = 0
        for i, (x, labels) in enumerate(self.batches):
            if first:
                self.answers.append(self.model(x).argmax(dim=1))
            expected, got, known = self.answers[i], call(x).float().argmax(dim=1), labels != NO_LABEL
            same += int((got == expected).sum())
            right += int((got == labels)[known].sum())
            right_float += int((expected == labels)[known].sum())
            labelled += int(known.sum())
            count += len(x)
        if not count:
            raise PSTError('There are no images to compare the answers by.')
        return Agreement(
            count, 100 * same / count, *(100 * n / labelled if labelled else None for n in (right_float, right)))


def default_output(source: str, level: str = 'int8', backend: str = 'onnxruntime') -> Path:
    """What the file is called if no name is given: as the source, here."""
    suffix = SUFFIXES['bfloat16' if level == 'bfloat16' else backend]
    return Path(Path(source.split(':')[-1]).name.split('.')[0] + suffix)


def report_of(path: os.PathLike) -> Path:
    """The JSON file beside an artefact that says what was measured."""
    return Path(f'{path}.json')  # two runtimes may have files of one name


def quantize(
        source: Union[str, os.PathLike, nn.Module],
        output: os.PathLike,
        images: Union[torch.Tensor, Sequence[torch.Tensor]] = (),
        level: str = 'int8',
        backend: str = 'onnxruntime',
        *,
        method: str = 'minmax',
        float_layers: Sequence[str] = (),
        max_drop: Optional[float] = None,
        held_out: Optional[Batches] = None,
        validation: Optional[Batches] = None,
        img_size: Optional[int] = None,
        class_names: Optional[Sequence[str]] = None,
        timing: bool = True,
        overwrite: bool = False,
        facts: Optional[Dict[str, Any]] = None,
        show: bool = True,
) -> QuantizeResult:
    """Write a model in smaller numbers, measure it beside the float model, and write that down beside it.

    Args:
        source: A classifier, with its attention set, or what `load_model` takes.
        output: File to write; of OpenVINO the one that ends with '.xml', beside which the weights go to '.bin'.
        images: Batches of prepared images (B, C, H, W) to calibrate by, from the training split; int8 needs them.
        level: 'int8' or 'bfloat16'.
        backend: 'onnxruntime' or 'openvino', which runs int8; bfloat16 runs in torch, as an exported program.
        method: How ranges are calibrated for ONNX Runtime: 'minmax', 'percentile' or 'entropy'.
        float_layers: Names of layers, or of modules around them, that stay as they are; `*` stands for anything.
        max_drop: Points of accuracy that may be lost on `held_out`: as many layers stay in float as that takes, the
            most sensitive first. Without labels, the share of answers that may change.
        held_out: Batches of other images of the training split, with labels (-1 for none): (B, C, H, W) and (B,).
        validation: Batches of images that nothing is decided by, to report what came of it.
        img_size: Height and width, the model's own if None; files hold no other.
        class_names: Names of the classes, in order; the model's own if None.
        timing: Whether to time the forms in turn.
        overwrite: Whether files that are there may be replaced.
        facts: What else the report is to say, such as where the images are from; plain values.
        show: Whether to show progress in a terminal.

    Raises:
        PSTError: If the files cannot be written, or must not be, what does it is not installed, the model cannot be
            folded or traced, or `max_drop` cannot be kept.
        ValueError: If an argument is unknown, or does not fit the others.
    """
    output = Path(output)
    _check(level, backend, method, output, images, float_layers, max_drop, held_out)
    if level == 'int8':
        _check_installed(backend)
    files = [output, report_of(output), *([output.with_suffix('.bin')] if backend == 'openvino' else [])]
    for path in files:
        check_output(path, overwrite)
    model = source if isinstance(source, nn.Module) else load_model(source)
    model = model.eval()
    try:
        folded = reparameterize(model)
    except ValueError as e:
        raise PSTError(f'The model cannot be folded for quantisation: {e}') from e
    size = resolve_data_config({'img_size': img_size} if img_size else {}, model=model)['input_size']
    job = Int8Job(
        folded, size, backend, method, [images] if isinstance(images, torch.Tensor) else list(images), output, show)
    info = metadata(model, class_names, img_size, torch.bfloat16 if level == 'bfloat16' else torch.float32)
    info['quantization'] = {'level': level, 'backend': backend if level == 'int8' else 'torch'}
    reference = Reference(folded, held_out) if held_out is not None else None
    kept: List[str] = []
    if level == 'bfloat16':
        info['memory_format'] = 'channels_last'
        data = _bfloat16(folded, size, info)
        write_whole(output, lambda name: Path(name).write_bytes(data))
    else:
        job.prepare()
        kept = job.layers_like(float_layers)
        if max_drop is not None:
            kept = job.search(kept, max_drop, reference)
        info['quantization'].update(
            method=method, images=sum(map(len, job.images)), float_layers=kept)
        job.write(kept, info)
    deployed = open_source(output)
    latency = job.time(model, deployed, level) if timing else {}
    float_bytes = weight_bytes(folded)
    found = QuantizeResult(
        output, sum(path.stat().st_size for path in files if path != report_of(output)), float_bytes, kept,
        reference.compare(deployed) if reference is not None else None,
        Reference(folded, validation).compare(deployed) if validation is not None else None,
        latency, slowness(latency, level))
    write_json(report_of(output), _report(found, info, facts or {}))
    return found


def _check(
        level: str,
        backend: str,
        method: str,
        output: Path,
        images: Any,
        float_layers: Sequence[str],
        max_drop: Optional[float],
        held_out: Optional[Batches],
) -> None:
    for name, value, known in (
            ('level', level, LEVELS), ('backend', backend, BACKENDS), ('method', method, qdq.METHODS)):
        if value not in known:
            raise ValueError(f'{name} must be one of {known}, got {value!r}.')
    suffix = Path(SUFFIXES['bfloat16' if level == 'bfloat16' else backend]).suffix
    if output.suffix != suffix:
        raise PSTError(f'{output} must end with {suffix}, by which it is told what it is.')
    if level == 'bfloat16':
        if backend != 'onnxruntime' or float_layers or max_drop is not None:
            raise PSTError('bfloat16 takes the whole model, in torch: backend, float layers and a drop are for int8.')
    elif not len(images):
        raise PSTError('int8 is calibrated by images of the training data, and there are none: name --data-dir.')
    if backend == 'openvino' and method != 'minmax':
        raise PSTError(f'OpenVINO calibrates in its own way: leave out the method {method!r}.')
    if max_drop is not None and held_out is None:
        raise PSTError('A largest drop is found out on images held out of the training split, and there are none.')


def _check_installed(backend: str) -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as e:
        raise PSTError(f"int8 goes through ONNX Runtime ({e}): pip install 'pst_timm[export]'.") from None
    if backend == 'openvino':
        ir.check_installed()


def _bfloat16(folded: nn.Module, size: Sequence[int], info: Dict[str, Any]) -> bytes:
    """The content of an exported program, whose convolutions take images by pixel: faster, and alike in any batch."""
    model = deepcopy(folded).to(dtype=torch.bfloat16, memory_format=torch.channels_last)
    x, shapes = qdq.any_batch(model, size)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'No complete tensor found')  # of weights by pixel; it is about other devices
        return serialized(
            model, x.to(memory_format=torch.channels_last), 'exported-program', shapes, json.dumps(info))


class Int8Job:
    """One model on its way to int8."""

    def __init__(
            self,
            folded: nn.Module,
            size: Sequence[int],
            backend: str,
            method: str,
            images: List[torch.Tensor],
            output: Path,
            show: bool,
    ):
        self.folded, self.size, self.backend, self.method = folded, tuple(size), backend, method
        self.images, self.output, self.show = images, output, show

    def prepare(self) -> None:
        """Trace and calibrate."""
        wrong = next((tuple(x.shape[1:]) for x in self.images if tuple(x.shape[1:]) != self.size), None)
        if wrong:
            raise ValueError(f'The model takes images of {self.size}, and is to be calibrated by some of {wrong}.')
        self.graph = qdq.trace(self.folded, self.size)
        if self.backend == 'onnxruntime':
            self.ranges = qdq.calibrate(self.graph, self.images, self.method)

    def layers_like(self, patterns: Sequence[str]) -> List[str]:
        return qdq.layers_like(self.graph, patterns)

    def call(self, kept: Sequence[str]) -> Call:
        """The model in int8 with some layers in float, in memory."""
        if self.backend == 'openvino':
            return ir.compiled(ir.quantized_ir(self.graph, self.images, kept))
        return onnx_session(pack_onnx(qdq.quantized_graph(self.graph, self.ranges, kept), ''))[0]

    def write(self, kept: Sequence[str], info: Dict[str, Any]) -> None:
        if self.backend == 'openvino':
            ir.write_ir(ir.quantized_ir(self.graph, self.images, kept), self.output, json.dumps(info))
            return
        data = pack_onnx(qdq.quantized_graph(self.graph, self.ranges, kept), json.dumps(info))
        write_whole(self.output, lambda name: Path(name).write_bytes(data))

    @torch.inference_mode()
    def search(self, kept: Sequence[str], max_drop: float, reference: Reference) -> List[str]:
        """The fewest layers, in the order of their sensitivity, that have to stay in float for a largest drop.

        Args:
            kept: Layers that do so anyway.
            max_drop: See `quantize`.
            reference: The images held out.

        Raises:
            PSTError: If not even float layers alone keep it.
        """
        kept = list(kept)
        if reference.compare(self.call(kept)).drop <= max_drop:
            return kept
        x = torch.cat(self.images)[:RANKED_BY]
        expected = self.folded(x)
        others = [layer for layer in self.graph.layers if layer not in kept]
        errors = {}
        for layer in progress_bar(others, len(others), 'Sensitivity', self.show):
            errors[layer] = (self.call([*kept, layer])(x) - expected).square().mean().item()
        ranked = sorted(others, key=errors.get)  # what helps most first
        low, high = 0, 1
        while reference.compare(self.call([*kept, *ranked[:high]])).drop > max_drop:
            if high == len(ranked):
                raise PSTError(
                    f'A drop of at most {max_drop:g} points cannot be kept, not even with all layers in float: allow '
                    f'more, or check the images.')
            low, high = high, min(2 * high, len(ranked))
        while high - low > 1:
            middle = (low + high) // 2
            fits = reference.compare(self.call([*kept, *ranked[:middle]])).drop <= max_drop
            low, high = (low, middle) if fits else (middle, high)
        return [layer for layer in self.graph.layers if layer in {*kept, *ranked[:high]}]

    def time(self, model: nn.Module, deployed: nn.Module, level: str) -> Dict[str, Latency]:
        """One image through the forms in turn."""
        forms: Dict[str, Call] = {'eager float32': model}
        if level == 'bfloat16':
            forms['folded float32'] = self.folded
        elif self.backend == 'openvino':
            forms['openvino float32'] = ir.compiled(ir.float_ir(self.graph))
        else:
            forms['onnxruntime float32'] = onnx_session(self.graph.proto.SerializeToString())[0]
        forms[level] = deployed
        return compare_latency(forms, self.size, rounds=ROUNDS)


def slowness(latency: Mapping[str, Latency], level: str) -> List[str]:
    """A warning where a level is no faster than float32 in the same runtime.

    Args:
        latency: Of eager float32, of float32 in the runtime, and of the level, in this order; empty if not timed.
        level: The level.
    """
    if not latency:
        return []
    (runtime, slow), (_, fast) = list(latency.items())[1:]
    ratio = slow.seconds / fast.seconds
    if ratio > 1:
        return []
    why = {'int8': 'int8 dot products (VNNI, AMX, or dotprod on Arm)',
           'bfloat16': 'bfloat16 (AVX512-BF16, AMX, or BF16 on Arm)'}[level]
    return [
        f'{level} is no faster here: {ratio:.2f} times as fast as {runtime}. The processor may lack {why}, or the '
        f'model is too small to tell; the file is smaller all the same.']


def _report(found: QuantizeResult, info: Dict[str, Any], facts: Dict[str, Any]) -> Dict[str, Any]:
    def scores(agreement: Optional[Agreement]) -> Optional[Dict[str, Any]]:
        return None if agreement is None else {**agreement._asdict(), 'drop': agreement.drop}

    return {
        'file': found.path.name,
        'architecture': info['architecture'],
        'input_size': list(info['input_size']),
        'topk': info['topk'],
        'fine_fusion': info['fine_fusion'],
        **info['quantization'],
        **facts,
        'bytes': found.bytes,
        'float_bytes': found.float_bytes,
        'held_out': scores(found.held_out),
        'validation': scores(found.validation),
        'latency': {name: latency._asdict() for name, latency in found.latency.items()},
        'threads': torch.get_num_threads(),
        'warnings': found.warnings,
    }
