"""The report of a run, as one HTML file."""

from hinge.report.html import ReportSlide, report_slide, write_report

__all__ = ["ReportSlide", "report_slide", "write_report"]
