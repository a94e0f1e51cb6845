"""Write the report of a run as one HTML file."""

from hinge.report.html import ReportSlide, report_slide, write_report
from hinge.report.run import report_run

__all__ = ["ReportSlide", "report_run", "report_slide", "write_report"]
