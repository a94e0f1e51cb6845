"""Write the report of a run as one HTML file."""

from hinge.report.html import write_report
from hinge.report.run import report_run
from hinge.report.slides import ReportSlide, report_slide

__all__ = ["ReportSlide", "report_run", "report_slide", "write_report"]
