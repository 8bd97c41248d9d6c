"""Whether two results of a block are equal."""

from __future__ import annotations

import torch


def close(a, b, scale=1.0):
    tolerance = scale * {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3}.get(
        a.dtype, 4e-2
    )
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
