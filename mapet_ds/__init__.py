"""Pre-training of Vision Transformers by masked and permuted prediction, on DeepSpeed and DALI."""

__version__ = "0.1.0"
