"""An audit of one's own training: does it leak, to whom, and what would stop that."""

from .inputs import Source, data_of
from .report import Audit, Exposed, Remedy
from .request import Request
from .run import audit

__all__ = ["Audit", "Exposed", "Remedy", "Request", "Source", "audit", "data_of"]
