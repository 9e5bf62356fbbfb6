"""R0 in JAX: few-step text-to-image generators by regularized reward maximization."""

import os

__version__ = "0.1.0"

# transformers, here for its tokenizers alone, would tell every user that PyTorch is missing.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
