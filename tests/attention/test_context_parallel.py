"""torch's context_parallel, which fastattn does not support: every call must raise, on two
processes."""

from __future__ import annotations

import pytest
import torch.distributed
from two_processes import assert_right


@pytest.mark.native
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")
def test_every_call_refuses_under_context_parallel():
    assert_right("context_parallel_cases.py")
