"""What a run leaves behind: metrics, curves, sample answers beside their maps, and the closing table."""

from rewardmap.report.curves import draw_curves
from rewardmap.report.metrics import MetricsLog, read_metrics
from rewardmap.report.page import write_page
from rewardmap.report.samples import draw_samples
from rewardmap.report.table import write_report
from rewardmap.report.timeline import draw_curriculum

__all__ = ["MetricsLog", "draw_curriculum", "draw_curves", "draw_samples", "read_metrics", "write_page", "write_report"]
