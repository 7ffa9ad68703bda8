"""What the engine asks of a model beside timm's interface.

No model has to offer any of it; the engine uses the methods that it finds.
"""
from contextlib import AbstractContextManager
from typing import Any, Dict, List, Protocol, Sequence, Tuple, runtime_checkable

from pst_timm.metrics.base import Metric

__all__ = ['Adjustable', 'Finished', 'Measured', 'Prunable', 'TrainStepAware']


class TrainStepAware(Protocol):
    """A model with random decisions of its own, which all processes have to take alike."""

    def set_train_step(self, seed: int, step: int = 0) -> None:
        """Place the decisions at a training step; called at the start of an epoch, and where a run goes on.

        Args:
            seed: Seed of the run.
            step: Index of the next training step.
        """


@runtime_checkable
class Adjustable(Protocol):
    """A model that can be run with other settings than those it was made with."""

    def inference_settings(self) -> Dict[str, Any]:
        """What the model has beside its weights, as arguments of `timm.create_model`."""

    def sweep_settings(self, values: Sequence[int]) -> List[Dict[str, Any]]:
        """The settings that are worth a comparison for some values, each for `with_settings`."""

    def settings_columns(self, setting: Dict[str, Any], img_size: Tuple[int, int]) -> Dict[str, Any]:
        """What a table of results says of a setting.

        Args:
            setting: One of `sweep_settings`.
            img_size: Height and width of the images.
        """

    def with_settings(self, **settings: Any) -> AbstractContextManager:
        """A context in which these are the settings; afterwards they are as they were."""


@runtime_checkable
class Prunable(Protocol):
    """A model that knows which of its layers channels cannot be cut from."""

    def unprunable(self) -> List[str]:
        """Names of the modules that must stay as wide as they are, on both sides; see `channel_groups`."""


@runtime_checkable
class Measured(Protocol):
    """A model of which an evaluation measures more than of others."""

    def own_metrics(self) -> List[Metric]:
        """New metrics, which take in each batch right after the model has answered it."""


@runtime_checkable
class Finished(Protocol):
    """A model in its last form, such as an exported file: it is not compiled, pooled in another way or copied."""

    def finished_as(self) -> str:
        """What it is, for messages."""
