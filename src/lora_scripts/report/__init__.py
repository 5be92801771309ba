"""The page that tells how a run went."""

from lora_scripts.report.facts import HardThumbnail, Measurement, ReportFacts, Thumbnail
from lora_scripts.report.page import render_report, write_report

__all__ = ["HardThumbnail", "Measurement", "ReportFacts", "Thumbnail", "render_report", "write_report"]
