"""What can be measured of a model's answers. Knows utils."""
from .agreement import Agreement, compare_logits
from .answers import Answers, pack_answers, unpack_answers
from .base import Metric
from .binomial import binomial_interval, binomial_tail, binomial_upper, drop_p_value
from .calibration import Calibration, Refit, calibration_error, fit_temperature, refit_temperature
from .classification import ClassReport, RealLabels
from .failure import failure_auroc
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
    'RealLabels', 'Refit', 'binomial_interval', 'binomial_tail', 'binomial_upper', 'calibration_error',
    'compare_logits', 'detectable_difference', 'drop_p_value', 'failure_auroc', 'fit_temperature', 'holm',
    'image_interval', 'mcnemar', 'mean_and_sd', 'pack_answers', 'paired_difference', 'refit_temperature',
    'seed_interval', 'unpack_answers',
]
