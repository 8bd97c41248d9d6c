"""Invalid input to attention() and varlen_attention(): one clear sentence that names the argument,
the given value and what is accepted. The tests of decode_attention() and of the SDPA drop-in are in
their own files."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fastattn
from fastattn import attention, varlen_attention

Q = torch.randn(2, 4, 5, 8)
K = torch.randn(2, 2, 7, 8)
SQUARE = torch.randn(2, 2, 5, 8)
HUGE = torch.zeros(1).expand(1, 1, 2**30, 1)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def call(q=Q, k=K, v=K, **options):
    return lambda: attention(q, k, v, **options)


WRONG = {
    # q, k and v
    "q is an array": (TypeError, "q is of type ndarray; accepted is a torch.Tensor",
                      call(np.ones(3))),
    "k is a list": (TypeError, "k is of type list; accepted is a torch.Tensor", call(k=[1.0])),
    "v is None": (TypeError, "v is of type NoneType", call(v=None)),
    "k's dtype": (TypeError, "k is torch.float64 and q is torch.float32; one", call(k=K.double())),
    "v's dtype": (TypeError, "v is torch.bfloat16 and q is torch.float32", call(v=K.bfloat16())),
    "int tensors": (TypeError, "q is torch.int64; accepted are float32, bfloat16, float16, float64",
                    call(Q.long(), K.long(), K.long())),
    "complex tensors": (TypeError, "q is torch.complex64; accepted",
                        call(*(x.to(torch.complex64) for x in (Q, K, K)))),
    "fp8 tensors": (TypeError, "q is torch.float8_e5m2",
                    call(*(x.to(torch.float8_e5m2) for x in (Q, K, K)))),
    "k's device": (ValueError, "k is on meta and q on cpu; one device", call(k=K.to("meta"))),
    "sparse": (TypeError, "k has layout torch.sparse_coo; accepted is", call(k=K.to_sparse())),
    "nested": (TypeError, "q is a NestedTensor; accepted",
               call(torch.nested.nested_tensor([Q[0], Q[1]], layout=torch.jagged))),
    "nested, strided": (TypeError, "q is a NestedTensor; accepted",
                        lambda: attention(torch.nested.nested_tensor([Q[0], Q[1]]), K, K)),
    "rank 5": (ValueError, r"q has shape \[1, 2, 4, 5, 8\]; accepted are", call(Q[None])),
    "rank 1": (ValueError, r"q has shape \[8\]; accepted are \[B, heads, S, D\]", call(Q[0, 0, 0])),
    "k's rank": (ValueError, r"k has shape \[2, 7, 8\] and q \[2, 4, 5, 8\]; one rank",
                 call(k=K[0])),
    "k's batch": (ValueError, r"k has batch size 1 \(shape \[1, 2, 7, 8\]\) and q 2",
                  call(k=K[:1])),
    "v's batch": (ValueError, "v has batch size 1", call(v=K[:1])),
    "k's heads": (ValueError, "q has 4 heads and k 3; q's heads must be a multiple of k's",
                  call(k=torch.zeros(2, 3, 7, 8), v=torch.zeros(2, 3, 7, 8))),
    "no kv heads": (ValueError, "q has 4 heads and k 0", call(k=K[:, :0], v=K[:, :0])),
    "v's heads": (ValueError, "k has 2 heads and v 1; they must be equal", call(v=K[:, :1])),
    "v's length": (ValueError, "v has length 6 .* and k 7", call(v=K[:, :, :6])),
    "k's channels": (ValueError, "k has head dimension 7 .* and q 8", call(k=K[..., :7])),
    "no channels": (ValueError, "q has head dimension 0", call(Q[..., :0], K[..., :0])),
    "no v channels": (ValueError, "v has head dimension 0", call(v=K[..., :0])),
    "rows past 32 bits": (ValueError, r"lengths are 1073741824 \(q\) and 1 \(k\); they must be",
                          call(HUGE, HUGE[:, :, :1], HUGE[:, :, :1])),
    "keys past 32 bits": (ValueError, r"lengths are 1 \(q\) and 1073741824 \(k\)",
                          call(HUGE[:, :, :1], HUGE, HUGE)),
    "heads past 32 bits": (ValueError, "q has 2147483648 heads over the batch; they must be below",
                           call(*[torch.zeros(1).expand(2**16, 2**15, 1, 1)] * 3)),
    # numbers
    "scale is NaN": (ValueError, "scale is nan; accepted is a finite", call(scale=math.nan)),
    "scale is inf": (ValueError, "scale is -inf; accepted is a finite", call(scale=-math.inf)),
    "scale is a tensor": (TypeError, "scale is of type Tensor; accepted is a number",
                          call(scale=torch.tensor(1.0))),
    "scale past every float": (ValueError, "scale is inf; accepted", call(scale=10**400)),
    "scale is text": (TypeError, "scale is of type str", call(scale="1")),
    "softcap < 0": (ValueError, r"softcap is -1.0; accepted are 0 \(off\) and \[1e-30, 1e\+30\]",
                    call(softcap=-1)),
    "softcap past float32": (ValueError, r"softcap is 1e\+300; accepted", call(softcap=1e300)),
    "softcap is inf": (ValueError, "softcap is inf", call(softcap=math.inf)),
    "softcap is NaN": (ValueError, "softcap is nan", call(softcap=math.nan)),
    "dropout 1": (ValueError, r"dropout_p is 1.0; accepted is a number in \[0, 1\)",
                  call(dropout_p=1)),
    "dropout < 0": (ValueError, "dropout_p is -0.1", call(dropout_p=-0.1)),
    "dropout NaN": (ValueError, "dropout_p is nan", call(dropout_p=math.nan)),
    "dropout is None": (TypeError, "dropout_p is of type NoneType", call(dropout_p=None)),
    "dropout is an array": (TypeError, "dropout_p is of type ndarray; accepted is a number",
                            call(dropout_p=np.array([0.1, 0.2]))),
    "dropout is a tensor": (TypeError, "dropout_p is of type Tensor; accepted is a number",
                            call(dropout_p=torch.tensor([0.1, 0.2]))),
    "causal is 1.5": (TypeError, "causal is of type float; accepted are True", call(causal=1.5)),
    "causal is numpy's": (TypeError, "causal is of type numpy.bool", call(causal=np.bool_(True))),
    "causal is text": (TypeError, "causal is of type str", call(causal="yes")),
    "align": (ValueError, "align is 'middle'; accepted are 'end' and 'start'",
              call(align="middle")),
    "causal and a window ahead": (ValueError, r"causal=True came with window=\(3, 1\), which looks",
                                  call(causal=True, window=(3, 1))),
    "window is an int": (TypeError, "window is 5; accepted is a pair", call(window=5)),
    "window of three": (TypeError, r"window is \(1, 2, 3\); accepted", call(window=(1, 2, 3))),
    "window of floats": (TypeError, "window's left side is of type float", call(window=(1.5, 0))),
    "window of lists": (TypeError, "window's right side is of type list", call(window=(1, [2]))),
    "return_lse": (TypeError, "return_lse is of type str", call(return_lse="no")),
    "deterministic is 0": (TypeError, "deterministic is of type int", call(deterministic=0)),
    "deterministic": (TypeError, "deterministic is of type int", call(deterministic=7)),
    "backend": (ValueError, "backend is 'gpu'; accepted are 'cuda', 'triton', 'cpu', 'reference'",
                call(backend="gpu")),
    "backend cannot": (NotImplementedError, "backend='triton' cannot run this call: ",
                       call(backend="triton")),
    "unknown argument": (TypeError, "unexpected keyword argument 'is_causal'",
                         call(is_causal=True)),
    # operands
    "mask is a list": (TypeError, "mask is of type list; accepted is", call(mask=[[True]])),
    "mask is float": (TypeError, r"mask is torch.float32; accepted is torch.bool \(a float mask",
                      call(mask=torch.zeros(5, 7))),
    "mask shape": (ValueError, r"mask has shape \[5, 6\]; accepted is any that broadcasts to \[2,",
                   call(mask=torch.ones(5, 6).bool())),
    "mask rank": (ValueError, r"mask has shape \[1, 1, 1, 5, 7\]",
                  call(mask=torch.ones(1, 1, 1, 5, 7).bool())),
    "mask heads": (ValueError, r"mask has shape \[2, 2, 5, 7\]",
                   call(mask=torch.ones(2, 2, 5, 7).bool())),
    "mask device": (ValueError, "mask is on meta and q on cpu",
                    call(mask=torch.ones(5, 7, device="meta").bool())),
    "bias is int": (TypeError, "bias is torch.int64; accepted",
                    call(bias=torch.zeros(5, 7).long())),
    "bias is bool": (TypeError, "bias is torch.bool", call(bias=torch.ones(5, 7).bool())),
    "bias shape": (ValueError, r"bias has shape \[3, 1, 5, 7\]",
                   call(bias=torch.zeros(3, 1, 5, 7))),
    "slopes shape": (ValueError, r"alibi_slopes has shape \[2\]; accepted are \[heads\] = \[4\]",
                     call(alibi_slopes=torch.zeros(2))),
    "slopes dtype": (TypeError, "alibi_slopes is torch.float64; accepted is float32",
                     call(alibi_slopes=torch.zeros(4).double())),
    "slopes want a gradient": (NotImplementedError, "alibi_slopes requires grad and has no",
                               call(alibi_slopes=torch.zeros(4, requires_grad=True))),
    "sinks shape": (ValueError, r"sinks has shape \[2\]; accepted is \[heads\] = \[4\]",
                    call(sinks=torch.zeros(2))),
    "sinks dtype": (TypeError, "sinks is torch.float64 and q torch.float32; accepted",
                    call(sinks=torch.zeros(4).double())),
    "kv_lens past the end": (ValueError, r"kv_lens\[1\] is 8; accepted is a number of keys in",
                             call(kv_lens=ints(7, 8))),
    "kv_lens < 0": (ValueError, r"kv_lens\[0\] is -1", call(kv_lens=ints(-1, 3))),
    "kv_lens shape": (ValueError, r"kv_lens has shape \[3\]; accepted is \[B\] = \[2\]",
                      call(kv_lens=ints(1, 2, 3))),
    "kv_lens dtype": (TypeError, "kv_lens is torch.float32; accepted is torch.int32",
                      call(kv_lens=torch.zeros(2))),
    "kv_lens is a list": (TypeError, "kv_lens is of type list", call(kv_lens=[7, 7])),
    "kv_lens past 32 bits": (ValueError, "kv_lens holds 4294967296; its values must fit in 32 bits",
                             call(kv_lens=torch.tensor([2**32, 1]))),
    "documents decrease": (ValueError, "document_ids decreases along a row",
                           call(k=SQUARE, v=SQUARE, document_ids=ints(0, 0, 2, 1, 1))),
    "documents across": (ValueError, "document_ids came with 5 rows and 7 keys; it is for",
                         call(document_ids=ints(0, 0, 0, 1, 1))),
    "documents shape": (ValueError, r"document_ids has shape \[4\]; accepted are \[S\] = \[5\]",
                        call(k=SQUARE, v=SQUARE, document_ids=ints(0, 0, 0, 1))),
    "documents dtype": (TypeError, "document_ids is torch.float32",
                        call(k=SQUARE, v=SQUARE, document_ids=torch.zeros(5))),
    "seed of one": (TypeError, "dropout_seed is 5; accepted is",
                    call(dropout_p=0.1, dropout_seed=5)),
    "seed too large": (ValueError, "dropout_seed holds 18446744073709551616; accepted are 64-bit",
                       call(dropout_p=0.1, dropout_seed=(2**64, 0))),
    "seed of floats": (TypeError, "dropout_seed is of type float",
                       call(dropout_p=0.1, dropout_seed=(1.0, 0))),
    "seed tensor": (ValueError, r"dropout_seed is a torch.int32 tensor of shape \[2\]; accepted",
                    call(dropout_p=0.1, dropout_seed=ints(1, 2))),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("wrong", WRONG)
def test_attention(wrong):
    kind, sentence, run = WRONG[wrong]
    for _ in range(2):  # an error is never cached as a checked call
        with pytest.raises(kind, match=sentence) as caught:
            run()
        assert type(caught.value) is kind and "\n" not in str(caught.value)
    attention(Q, K, K)


TQ, TK = torch.randn(9, 4, 8), torch.randn(11, 2, 8)
CU_Q, CU_K = ints(0, 3, 9), ints(0, 5, 11)
PAGES = torch.randn(6, 4, 2, 8)


def packed(q=TQ, k=TK, v=None, cu_q=CU_Q, cu_k=CU_K, max_q=6, max_k=6, **options):
    return lambda: varlen_attention(
        q, k, k if v is None else v, cu_q, cu_k, max_q, max_k, **options
    )


def paged(table, **changes):
    return packed(k=PAGES, page_table=table, **changes)


WRONG_PACKED = {
    "q's rank": (ValueError, r"q has shape \[1, 9, 4, 8\]; accepted is \[Tq, heads, D\]",
                 packed(TQ[None])),
    "k's rank": (ValueError, r"k has shape \[11, 16\]; accepted is", packed(k=TK.flatten(1))),
    "k's rank with pages": (ValueError, r"k has shape \[11, 2, 8\]; accepted is \[pages,",
                            packed(page_table=ints(0, 1).view(2, 1))),
    "v's rows": (ValueError, r"v has shape \[10, 2, 8\] and k \[11, 2, 8\]", packed(v=TK[:10])),
    "heads": (ValueError, "q has 4 heads and k 3", packed(k=torch.zeros(11, 3, 8))),
    "dtype": (TypeError, "k is torch.float64 and q is torch.float32", packed(k=TK.double())),
    "cu_seqlens_q decreases": (ValueError, "cu_seqlens_q decreases from 5 to 3 at index 2",
                               packed(cu_q=ints(0, 5, 3))),
    "cu_seqlens_k decreases": (ValueError, "cu_seqlens_k decreases from 7 to 6",
                               packed(cu_k=ints(0, 7, 6))),
    "cu_seqlens_q overruns": (ValueError, "cu_seqlens_q ends at 10 and q has 9 rows; it must not",
                              packed(cu_q=ints(0, 5, 10))),
    "cu_seqlens_k overruns": (ValueError, "cu_seqlens_k ends at 12 and k has 11 rows",
                              packed(cu_k=ints(0, 6, 12))),
    "cu_seqlens_q starts late": (ValueError, "cu_seqlens_q starts at 1; it must start at 0",
                                 packed(cu_q=ints(1, 5, 9))),
    "cu_seqlens_q is negative": (ValueError, "cu_seqlens_q starts at -3",
                                 packed(cu_q=ints(-3, 5, 9))),
    "cu_seqlens differ": (ValueError, "cu_seqlens_k has 4 entries and cu_seqlens_q 3; they must",
                          packed(cu_k=ints(0, 4, 5, 6))),
    "cu_seqlens_q is empty": (ValueError, r"cu_seqlens_q has shape \[0\]; accepted is \[sequences",
                              packed(cu_q=ints())),
    "cu_seqlens_q is 2-D": (ValueError, r"cu_seqlens_q has shape \[1, 3\]",
                            packed(cu_q=CU_Q[None])),
    "cu_seqlens_q is float": (TypeError, "cu_seqlens_q is torch.float32; accepted is torch.int32",
                              packed(cu_q=CU_Q.float())),
    "cu_seqlens_q is a list": (TypeError, "cu_seqlens_q is of type list", packed(cu_q=[0, 3, 9])),
    "cu_seqlens_q's device": (ValueError, "cu_seqlens_q is on meta and q on cpu",
                              packed(cu_q=CU_Q.to("meta"))),
    "max_seqlen_q too small": (ValueError, "max_seqlen_q is 5 and cu_seqlens_q has a sequence of 6",
                               packed(max_q=5)),
    "max_seqlen_k too small": (ValueError, "max_seqlen_k is 3 and cu_seqlens_k has a sequence of 6",
                               packed(max_k=3)),
    "max_seqlen_q is a tensor": (TypeError, "max_seqlen_q is of type Tensor; accepted is an int",
                                 packed(max_q=torch.tensor(6))),
    "max_seqlen_k is negative": (ValueError, r"max_seqlen_k is -1; accepted is an int in \[0,",
                                 packed(max_k=-1)),
    "kv_lens": (ValueError, r"kv_lens\[0\] is 6; accepted is a number of the sequence's keys in",
                packed(kv_lens=ints(6, 6))),
    "documents": (NotImplementedError, "document_ids came to varlen_attention, where cu_seqlens",
                  packed(document_ids=ints(*[0] * 9))),
    "mask shape": (ValueError, r"mask has shape \[9, 11\]; accepted is any that broadcasts to",
                   packed(mask=torch.ones(9, 11).bool())),
    "causal and a window ahead": (ValueError, "causal=True came with",
                                  packed(causal=True, window=(1, 2))),
    "a page past the end": (ValueError, r"page_table row 1 names page 6; accepted is \[0, 5\]",
                            paged(ints(0, 1, 2, 6).view(2, 2))),
    "a negative page": (ValueError, "page_table row 0 names page -1",
                        paged(ints(0, -1, 2, 3).view(2, 2))),
    "too few pages": (ValueError, "page_table row 0 has 1 pages of 4 keys and its sequence 5 keys",
                      paged(ints(0, 1).view(2, 1))),
    "page_table's rows": (ValueError, r"page_table has shape \[1, 4\]; accepted is \[sequences,",
                          paged(ints(0, 1, 2, 3).view(1, 4))),
    "page_table's dtype": (TypeError, "page_table is torch.float32", paged(torch.zeros(2, 2))),
    "pages and gradients": (NotImplementedError, "page_table came with an input that requires grad",
                            paged(ints(0, 1, 2, 3).view(2, 2), q=TQ.clone().requires_grad_())),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_PACKED)
def test_varlen_attention(wrong):
    kind, sentence, run = WRONG_PACKED[wrong]
    with pytest.raises(kind, match=sentence) as caught:
        run()
    assert type(caught.value) is kind and "\n" not in str(caught.value)


def test_an_equal_call_that_passed_does_not_excuse_a_wrong_type():
    """True == 1 == 1.0, so they would hit the same entry of the cache of checked calls."""
    attention(Q, K, K, scale=1.0, causal=True, window=(1, 0), deterministic=False)
    for wrong in ({"scale": True}, {"causal": 1}, {"window": (1.0, 0)}, {"deterministic": 0}):
        right = {"scale": 1.0, "causal": True, "window": (1, 0), "deterministic": False}
        with pytest.raises(TypeError, match=next(iter(wrong))):
            attention(Q, K, K, **(right | wrong))
    fastattn.scaled_dot_product_attention(Q, Q, Q, is_causal=True)
    with pytest.raises(TypeError, match="is_causal"):
        fastattn.scaled_dot_product_attention(Q, Q, Q, is_causal=1)


def test_what_is_not_wrong():
    """Close to the limits of what is accepted."""
    attention(Q, K, K, window=[2, 0], causal=True)
    attention(Q, K, K, window=(2, -7), causal=True, scale=0, softcap=0, dropout_p=0)
    attention(Q, K, K, scale=np.float32(0.5), kv_lens=torch.tensor([0, 7]), deterministic=False)
    attention(Q, K, K, window=(2**31, 2**40), mask=torch.ones(7).bool(), bias=torch.zeros(()))
    attention(Q[:, :, :0], K, K)
    attention(Q, K[:, :, :0], K[:, :, :0])
    attention(Q[:0], K[:0], K[:0])
    for backend in (None, "reference"):
        attention(Q[:, :0], K[:, :0], K[:, :0], backend=backend)
        attention(Q[:0], K[:0], K[:0], mask=torch.ones(5, 7).bool(), bias=torch.zeros(5, 7),
                  backend=backend)  # fmt: skip
    attention(Q, K, K, window=(np.int64(2), 0))
    attention(Q, SQUARE, SQUARE, document_ids=torch.tensor([-5, -5, 0, 0, 2**31 - 1]))
    attention(Q.bfloat16(), K.bfloat16(), K.bfloat16(), bias=torch.zeros(5, 7, dtype=torch.float16))
    attention(Q, K, K, alibi_slopes=torch.zeros(4).half(), sinks=torch.zeros(4).bfloat16())
    packed(cu_q=CU_Q.long(), cu_k=CU_K.long(), max_q=100, max_k=200)()
    packed(max_q=np.int64(6))()
    packed(cu_q=ints(0), cu_k=ints(0), max_q=0, max_k=0)()
    paged(ints(0, 1, 2, 3).view(2, 2), kv_lens=ints(0, 6))()
    paged(ints(5, -9, 2, 3).view(2, 2), kv_lens=ints(4, 6))()  # a page that no key needs


def test_shapes_are_checked_under_compile_and_values_are_not():
    torch._dynamo.reset()

    @torch.compile(backend="eager")
    def f(q, k, lens):
        return attention(q, k, k, kv_lens=lens, backend="reference")

    with pytest.raises(Exception, match="head dimension 7"):
        f(Q, K[..., :7], ints(1, 1))
    torch._dynamo.reset()


@pytest.mark.native
def test_the_operator_itself_refuses_what_reaches_it():
    """Values that the checks cannot read, in a compiled call, are refused by the kernels."""
    torch._dynamo.reset()
    f = torch.compile(lambda q, k, lens: attention(q, k, k, kv_lens=lens), backend="aot_eager")
    assert torch.equal(f(Q, K, ints(1, 7)), attention(Q, K, K, kv_lens=ints(1, 7)))
    with pytest.raises(RuntimeError, match=r"kv_lens\[1\] is 8, outside \[0, 7\]"):
        f(Q, K, ints(1, 8))
    torch._dynamo.reset()


def test_a_failed_call_leaves_the_generator_alone():
    state = torch.get_rng_state()
    for options in ({"mask": torch.ones(3).bool()}, {"kv_lens": ints(8, 8)}):
        with pytest.raises(ValueError):
            fastattn.attention(Q, K, K, dropout_p=0.5, **options)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize("at", range(3))
def test_onednn_layout_is_refused_after_a_call_alike(at):
    """The memory of such a tensor is opaque, and its device, dtype and shape are those of a call
    that passed."""
    tensors = [torch.randn(1, 2, 8, 8) for _ in range(3)]
    attention(*tensors)
    tensors[at] = tensors[at].to_mkldnn()
    with pytest.raises(TypeError, match=f"{'qkv'[at]} has layout torch._mkldnn; accepted is"):
        attention(*tensors)
