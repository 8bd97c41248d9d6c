"""fastattn.audit: a model against float64, layer by layer. Public name of cli/verify_model.py."""

from .cli.model_loading import load_inputs, load_model
from .cli.verify_model import Audit, Layer, audit

__all__ = ["Audit", "Layer", "audit", "load_inputs", "load_model"]
