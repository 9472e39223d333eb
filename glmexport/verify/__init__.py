"""Hold a bundle against the unpatched PyTorch reference of its checkpoint."""

from glmexport.verify.check import progress_total, verify
from glmexport.verify.report import Report, Row

__all__ = ["Report", "Row", "progress_total", "verify"]
