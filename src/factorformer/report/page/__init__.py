"""The report of a compression: one HTML file that needs nothing else."""

from factorformer.report.page.document import check_packages, write
from factorformer.report.page.evidence import Evidence, gather

__all__ = ["Evidence", "check_packages", "gather", "write"]
