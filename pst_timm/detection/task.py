"""The training task of a detector, as timm's tasks are."""
from typing import Any, Dict, List, Optional

import torch
import torch.nn as nn
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch.nn.parallel import DistributedDataParallel

from pst_timm.utils.errors import PSTError

from .evaluation import CocoEvaluator
from .models import Detector

__all__ = ['DetectionTask']


class DetectionTask(TrainingTask):
    """Loss of a torchvision detector, and the evaluator of its boxes."""

    def __init__(
            self,
            model: Detector,
            dataset: Optional[Any] = None,
            max_dets: int = 100,
            device: Optional[torch.device] = None,
            dtype: Optional[torch.dtype] = None,
            verbose: bool = True,
    ):
        """
        Args:
            model: The detector, on its device.
            dataset: The box dataset that the evaluator knows the truth from, None for no evaluation.
            max_dets: Detections of an image that count.
            device: Device of the task.
            dtype: Precision of the weights.
            verbose: As in timm's tasks.
        """
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        self.trainable_module = model
        self.dataset = dataset
        self.max_dets = max_dets

    def prepare_distributed(self, device_ids: Optional[list] = None, **ddp_kwargs: Any) -> 'DetectionTask':
        """Wrap the detector in DistributedDataParallel."""
        self.trainable_module = DistributedDataParallel(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self

    def compile(self, backend: str = 'inductor', mode: Optional[str] = None, **compile_kwargs: Any) -> nn.Module:
        """Compile trunk and neck in place, which keeps the names of the weights; boxes have no fixed number."""
        self.trainable_module.backbone.compile(backend=backend, mode=mode, **compile_kwargs)
        return self.trainable_module

    def compile_ema(
            self,
            backend: str = 'inductor',
            mode: Optional[str] = None,
            **compile_kwargs: Any,
    ) -> Optional[nn.Module]:
        """The same for the moving average."""
        if not self.has_ema():
            return None
        self.get_eval_model(ema=True).module.backbone.compile(backend=backend, mode=mode, **compile_kwargs)
        return self.get_eval_model(ema=True)

    def get_clip_parameters(self, exclude_head: bool = False) -> List[nn.Parameter]:
        """Parameters whose gradients are clipped; adaptive clipping leaves out what tells the classes."""
        named = unwrap_model(self.trainable_module).named_parameters()
        return [p for n, p in named if not (exclude_head and '.cls_logits.' in n)]

    def create_evaluator(self, **kwargs: Any) -> CocoEvaluator:
        """COCO's metrics over the evaluation split; `kwargs` are of timm's evaluators and mean nothing here."""
        if self.dataset is None:
            raise PSTError('There is no split to evaluate on.')
        return CocoEvaluator(self.dataset, max_dets=self.max_dets)

    def forward(
            self,
            input: List[torch.Tensor],
            target: List[Dict[str, torch.Tensor]],
    ) -> Dict[str, torch.Tensor]:
        """Images (3, H, W) and their targets to the loss, the sum of torchvision's, and these one by one."""
        losses = self.trainable_module(input, target)
        return {'loss': torch.stack(list(losses.values())).sum(), **losses}
