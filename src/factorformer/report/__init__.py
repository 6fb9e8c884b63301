"""What a model costs and how well it does: one JSON schema, and human-readable tables."""

from factorformer.report.inventory import inventory
from factorformer.report.measure import latency
from factorformer.report.result import Result

__all__ = ["Result", "inventory", "latency"]
