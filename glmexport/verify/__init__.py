"""Hold a bundle against the unpatched PyTorch reference of its checkpoint."""

from glmexport.verify.check import verify
from glmexport.verify.report import Report, Row

__all__ = ["Report", "Row", "verify"]
