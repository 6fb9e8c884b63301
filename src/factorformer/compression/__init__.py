"""The main verbs: plan a compression, and carry it out."""

from factorformer.compression._compress import compress
from factorformer.compression._initialize import initialize, outline
from factorformer.compression._plan import check_options, plan
from factorformer.compression._report import Report

__all__ = ["Report", "check_options", "compress", "initialize", "outline", "plan"]
