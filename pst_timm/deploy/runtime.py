"""Exported files as models: opened once, called on a batch of images, known to whatever takes a timm model."""
import os
from pathlib import Path
from typing import Any, Callable, Dict

import torch
import torch.nn as nn

from pst_timm.checkpoints import load_model
from pst_timm.checkpoints.reading import has_weights_ending
from pst_timm.utils.errors import PSTError
from pst_timm.utils.markdown import plain

from .loading import load_exported

__all__ = ['Deployed', 'is_exported', 'is_model_file', 'open_source']

SUFFIXES = {'.onnx': 'onnx', '.pt2': 'exported-program', '.xml': 'openvino'}  # .pt is what checkpoints end with, too
CONFIG_KEYS = ('architecture', 'input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode', 'num_classes')


class Deployed(nn.Module):
    """An exported model: images (B, C, H, W) to logits (B, num_classes) in float32, wherever the images are.

    It has no parameters that torch knows. Preprocessing and class names are in `pretrained_cfg`, as in a timm model.
    """

    def __init__(self, run: Callable[[torch.Tensor], torch.Tensor], info: Dict[str, Any]):
        """
        Args:
            run: From `load_exported`.
            info: Its metadata.
        """
        super().__init__()
        self.run = run.__call__  # a module would be registered, and one of torch.export cannot be set to inference
        self.info = info
        self.dtype = getattr(torch, info.get('dtype', 'float32'))
        self.memory_format = getattr(torch, info.get('memory_format', 'contiguous_format'))
        self.num_classes = info['num_classes']
        self.in_chans = info['input_size'][0]
        self.pretrained_cfg = {key: info[key] for key in CONFIG_KEYS}
        if info.get('class_names'):
            self.pretrained_cfg['label_names'] = list(info['class_names'])
        self.default_cfg = self.pretrained_cfg
        self.checkpoint_cfg = {key: info[key] for key in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct')}

    def finished_as(self) -> str:
        """See `engine.protocols.Finished`."""
        return 'an exported model'

    def inference_settings(self) -> Dict[str, Any]:
        """The attention as it was when the model was exported, empty for a model without."""
        return {key: self.info[key] for key in ('topk', 'fine_fusion')} if self.info.get('fine_fusion') else {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        images = x.detach().cpu().to(self.dtype).contiguous(memory_format=self.memory_format)
        size = self.info['batch_size']
        if size is None:  # any number
            logits = self._run(images)
        else:
            # a model of a fixed batch takes it in portions, the last of them filled up
            filled = torch.cat([images, images.new_zeros(-len(images) % size, *images.shape[1:])])
            parts = [part.contiguous(memory_format=self.memory_format) for part in filled.split(size)]
            logits = torch.cat([self._run(part) for part in parts])[:len(x)]
        if logits.shape != (len(x), self.num_classes):
            raise PSTError(
                f'The exported model says that it knows {self.num_classes} classes, and gives '
                f'{tuple(logits.shape)} for {len(x)} image(s): export it again.')
        return logits.float().to(x.device)

    def _run(self, images: torch.Tensor) -> torch.Tensor:
        try:
            return self.run(images)
        except Exception as e:  # of whatever runtime there is
            size = 'x'.join(map(str, self.pretrained_cfg['input_size']))
            reason = plain((str(e).strip().splitlines() or [type(e).__name__])[0], 300).rstrip('.')
            raise PSTError(
                f'The exported model does not take images of {"x".join(map(str, images.shape[1:]))} ({reason}): it '
                f'says that it takes {size}, in {self.info.get("dtype", "float32")}.') from e


def is_exported(source: os.PathLike) -> bool:
    """Whether a source is an exported file, by its ending."""
    return Path(source).suffix in SUFFIXES and os.path.lexists(source)


def is_model_file(path: Path) -> bool:
    """Whether a file in a folder is one that `open_source` is to open: by its ending, no weights of OpenVINO."""
    return is_exported(path) or (has_weights_ending(path) and not path.with_suffix('.xml').exists())


def open_source(source: os.PathLike, **kwargs: Any) -> nn.Module:
    """A model from whatever runs: an exported file, a cascade, or what `pst_timm.load_model` takes.

    Args:
        source: Where it is.
        kwargs: For `load_model`. An exported model or a cascade is as it is: it takes none that would change it.

    Raises:
        PSTError: If it cannot be opened, or not be had as asked for.
    """
    if is_exported(source):
        make, model = 'export', Deployed(*load_exported(source, SUFFIXES[Path(source).suffix]))
    elif Path(source).suffix == '.json' and os.path.lexists(source):
        from .cascade import Cascade, CascadeClassifier  # whose stages are opened here

        make, model = 'fit', CascadeClassifier(Cascade.from_file(source))
    else:
        return load_model(source, **kwargs)
    same = {
        'arch': model.pretrained_cfg['architecture'], 'num_classes': model.num_classes, 'in_chans': model.in_chans,
        'pretrained': True}
    for key, value in kwargs.items():
        if value not in (None, False, same.get(key)):
            raise PSTError(
                f'{source} is {model.finished_as()}, which stays as it is: leave out {key}={value!r}, or {make} it so.')
    return model.eval()
