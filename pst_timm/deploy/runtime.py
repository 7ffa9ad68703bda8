"""Exported files as models: opened once, called on a batch of images, known to whatever takes a timm model."""
import os
from pathlib import Path
from typing import Any, Callable, Dict

import torch
import torch.nn as nn

from pst_timm.checkpoints import load_model
from pst_timm.utils.errors import PSTError

from .loading import check_info, load_exported

__all__ = ['Deployed', 'is_exported', 'open_source']

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

        Raises:
            PSTError: See `check_info`.
        """
        super().__init__()
        info = check_info(info)
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

    def inference_settings(self) -> Dict[str, Any]:
        """The attention as it was when the model was exported, empty for a model without."""
        return {key: self.info[key] for key in ('topk', 'fine_fusion')} if self.info.get('fine_fusion') else {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        images = x.detach().cpu().to(self.dtype).contiguous(memory_format=self.memory_format)
        size = self.info.get('batch_size', 1)
        if size is None:  # any number
            return self.run(images).float().to(x.device)
        # a model of a fixed batch takes it in portions, the last of them filled up
        filled = torch.cat([images, images.new_zeros(-len(images) % size, *images.shape[1:])])
        parts = [part.contiguous(memory_format=self.memory_format) for part in filled.split(size)]
        return torch.cat([self.run(part) for part in parts])[:len(x)].float().to(x.device)


def is_exported(source: os.PathLike) -> bool:
    """Whether a source is an exported file, by its ending."""
    return Path(source).suffix in SUFFIXES and os.path.lexists(source)


def open_source(source: os.PathLike, **kwargs: Any) -> nn.Module:
    """A model from whatever runs: an exported file, a cascade, or what `pst_timm.load_model` takes.

    Args:
        source: Where it is.
        kwargs: For `load_model`. An exported model or a cascade is as it is: it takes none that would change it.

    Raises:
        PSTError: If it cannot be opened, or not be had as asked for.
    """
    if is_exported(source):
        kind, make = 'an exported model', 'export'
        model = Deployed(*load_exported(source, SUFFIXES[Path(source).suffix]))
    elif Path(source).suffix == '.json' and os.path.lexists(source):
        from .cascade import Cascade, CascadeClassifier  # whose stages are opened here

        kind, make = 'a cascade', 'fit'
        model = CascadeClassifier(Cascade.from_file(source))
    else:
        return load_model(source, **kwargs)
    same = {'arch': model.pretrained_cfg['architecture'], 'num_classes': model.num_classes, 'pretrained': True}
    for key, value in kwargs.items():
        if value not in (None, False, same.get(key)):
            raise PSTError(
                f'{source} is {kind}, which stays as it is: leave out {key}={value!r}, or {make} it so.')
    return model.eval()
