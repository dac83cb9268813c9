"""Precisions by their names in settings."""

from __future__ import annotations

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}
"""Name of a precision -> torch dtype."""
PRECISIONS = ("fp32", "bf16", "fp16")
