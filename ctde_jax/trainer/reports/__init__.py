"""Reports on a trained model: metrics with intervals, figures, and a page in one file."""

from ctde_jax.trainer.reports.classes import Calibration, ClassMetrics
from ctde_jax.trainer.reports.estimate import Estimate
from ctde_jax.trainer.reports.report import Report, check_task, make_report
from ctde_jax.trainer.reports.targets import TargetMetrics
from ctde_jax.trainer.reports.worst import WorstExample

__all__ = [
    "Calibration",
    "ClassMetrics",
    "Estimate",
    "Report",
    "TargetMetrics",
    "WorstExample",
    "check_task",
    "make_report",
]
