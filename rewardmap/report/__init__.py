"""What a run leaves behind: metrics, curves, sample answers beside their maps, and the closing table."""

from rewardmap.report.curves import draw_curves
from rewardmap.report.metrics import MetricsLog, read_metrics
from rewardmap.report.samples import draw_samples
from rewardmap.report.table import write_report

__all__ = ["MetricsLog", "draw_curves", "draw_samples", "read_metrics", "write_report"]
