"""Names of flash_attn 2 that do not exist here. Importing one raises an error that says why, and
what to use instead."""

from __future__ import annotations

import re
import sys
from opcode import opmap
from types import FrameType

_ABSENT = {
    r"_(wrapped_)?flash_attn_(varlen_)?(forward|backward)(_fake)?":
        "it is a single pass of FlashAttention's kernels, and the functions here are "
        "differentiated by autograd; call flash_attn_func or flash_attn_varlen_func",
    r"FlashAttn\w*Func":
        "it is the autograd.Function behind a public function; call that function, "
        "flash_attn_func and the like",
    r"flash_attn_unpadded_\w*func":
        "it is FlashAttention 1's; call flash_attn_varlen_func, or its packed forms",
    r"flash_attn_gpu|flash_attn_cuda|flash_attn_2_cuda|USE_TRITON_ROCM|_get_block_size_n":
        "it belongs to FlashAttention's own extension, which is not used here; "
        "fastattn.explain() says what computes a call",
    r"layers|modules|models|ops|losses|utils|cute|flash_attn_triton\w*|flash_blocksparse_\w+":
        "fastattn.flash_attn serves the seven functions and bert_padding; fastattn.nn, "
        "fastattn.fused.norm and fastattn.models have layers, norms, losses and models",
    r"[iI]ndex_?[pP]ut_?[fF]irst_?[aA]xis":
        "it is a part of pad_input; call pad_input",
    r"[iI]ndex_?[fF]irst_?[aA]xis(_?[rR]esidual)?":
        "call index_first_axis, which autograd differentiates",
    r"rearrange|repeat":
        "it is einops', which fastattn does not need; import it from einops",
}  # fmt: skip


def absent(module: str, name: str) -> Exception:
    """The exception that a module's __getattr__ raises for this name: an ImportError for `from
    module import name`, otherwise an AttributeError, so that hasattr() is False."""
    reason = next((why for names, why in _ABSENT.items() if re.fullmatch(names, name)), None)
    if reason is None:
        return AttributeError(f"module {module!r} has no attribute {name!r}")
    sentence = f"{module} has no {name}: {reason}"
    return (ImportError if _imports(sys._getframe(2)) else AttributeError)(sentence)


def _imports(frame: FrameType) -> bool:
    return frame.f_code.co_code[frame.f_lasti] == opmap["IMPORT_FROM"]
