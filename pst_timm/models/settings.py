"""What training and validation have to know of a model with PST beside timm's interface."""
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import torch

from pst_timm.layers import FINE_FUSIONS, HasAttention, attention_set

__all__ = ['AttentionSettings']


class AttentionSettings(HasAttention):
    """The settings of the attention layers of a network, a classifier or a detector.

    Any timm model may offer these methods, and a caller uses those that it finds:

    * `set_train_step(seed, step)`: place the model's own random decisions in a sequence that all ranks share.
    * `inference_settings()`: what the model has beside its weights, as arguments of what made it.
    * `with_settings(**settings)`: a context in which these are others.
    * `sweep_settings(topks)`: the settings that are worth a comparison, each for `with_settings`.
    * `settings_columns(setting, img_size)`: what a table of results says of one of these.
    * `tokens(img_size)`: how many tokens there are to select from; a k above it is that many.
    """

    set_train_step = HasAttention.set_fine_step  # as the engine calls it

    @torch.jit.ignore
    def inference_settings(self) -> Dict[str, Any]:
        """`topk` and `fine_fusion` as they are now; empty for a network without attention."""
        attentions = self.attentions()
        return {'topk': attentions[0].topk, 'fine_fusion': attentions[0].fine_fusion} if attentions else {}

    @torch.jit.ignore
    @contextmanager
    def with_settings(self, topk: Optional[int] = None, fine_fusion: Optional[str] = None) -> Iterator[None]:
        """Set the fine attention for a while; afterwards it is as it was, also after an error.

        Not while other threads run the model, see `set_topk`.

        Args:
            topk: Coarse tokens selected per image and head, unchanged if None.
            fine_fusion: 'gate' or 'joint', unchanged if None; 'coarse' is what tables call `topk=0`.

        Raises:
            ValueError: If `topk` is negative or not an integer, or the fusion is unknown or does not go with it.
        """
        if fine_fusion == 'coarse':
            if topk != 0:
                raise ValueError(f"fine_fusion='coarse' is attention with topk=0, got topk={topk!r}.")
            fine_fusion = None
        with attention_set(self.attentions(), topk, fine_fusion):
            yield

    @torch.jit.ignore
    def sweep_settings(self, topks: Sequence[int]) -> List[Dict[str, Any]]:
        """Settings to compare, for `with_settings`, each once.

        Args:
            topks: Coarse tokens to select; 0 is coarse attention alone.

        Returns:
            `topk` and `fine_fusion` of each: 'coarse' for k = 0, 'gate' and then 'joint' for every other k. A model
            without attention has one setting, the coarse one.
        """
        if not self.attentions():
            topks = [0]
        return [
            {'topk': k, 'fine_fusion': fusion}
            for k in dict.fromkeys(topks) for fusion in (FINE_FUSIONS if k else ('coarse',))]

    @torch.jit.ignore
    def settings_columns(self, setting: Dict[str, Any], img_size: Union[int, Tuple[int, int]]) -> Dict[str, Any]:
        """The columns of a table of results that tell a setting.

        Args:
            setting: One of `sweep_settings`.
            img_size: Height and width of the images, or one number for both.

        Returns:
            `topk` and `fine_fusion` as they are there, and how many tokens are then `selected`.
        """
        return {**setting, 'selected': min(setting['topk'], self.tokens(img_size))}

    @torch.jit.ignore
    def tokens(self, img_size: Union[int, Tuple[int, int]]) -> int:
        """How many coarse tokens there are to select from, 0 without attention; height and width, or one number."""
        raise NotImplementedError
