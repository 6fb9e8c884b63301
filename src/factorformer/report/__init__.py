"""What a model costs and how well it does: measured, as one schema for programs and one table for people."""

from factorformer.report.inventory import inventory
from factorformer.report.measure import latency
from factorformer.report.result import Result

__all__ = ["Result", "inventory", "latency"]
