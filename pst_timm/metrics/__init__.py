"""What can be measured of a model's answers. Knows utils."""
from .agreement import Agreement, compare_logits
from .answers import Answers, pack_answers, unpack_answers
from .base import Metric
from .calibration import Calibration, Refit, calibration_error, fit_temperature, refit_temperature
from .classification import ClassReport, RealLabels
from .intervals import (
    Difference,
    Interval,
    PairedTest,
    detectable_difference,
    holm,
    image_interval,
    mcnemar,
    mean_and_sd,
    paired_difference,
    seed_interval,
)

__all__ = [
    'Agreement', 'Answers', 'Calibration', 'ClassReport', 'Difference', 'Interval', 'Metric', 'PairedTest',
    'RealLabels', 'Refit', 'calibration_error', 'compare_logits', 'detectable_difference', 'fit_temperature', 'holm',
    'image_interval', 'mcnemar', 'mean_and_sd', 'pack_answers', 'paired_difference', 'refit_temperature',
    'seed_interval', 'unpack_answers',
]
