"""The losses of distillation.py against the divergence of whole rows, in float64."""

from __future__ import annotations

import pytest
import torch

import fastattn
from fastattn import distillation
from fastattn.distillation import attention_transfer_loss, relation, relation_loss

B, H, S = 2, 4, 11


def probs(call) -> torch.Tensor:
    """[B, heads, S, S (and a sink)] in float64, by the reference with unit vectors as values."""
    from fastattn.core.reference import reference

    x = call.operands
    eye = torch.eye(S, dtype=torch.float64).expand(B, call.k.shape[1], -1, -1)
    p = reference(call.q.double(), call.k.double(), eye, call.spec, x).out
    return p if x.sinks is None else torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1)


def divergence(teacher, student) -> torch.Tensor:
    pt, ps = probs(teacher).detach(), probs(student)
    if pt.shape[-1] < ps.shape[-1]:
        pt = torch.nn.functional.pad(pt, (0, 1))
    logs = (pt.clamp(min=1e-300).log() - ps.clamp(min=1e-300).log()) * pt
    return torch.where(pt > 0, logs, 0.0).sum(-1)


def bias():
    return torch.randn(1, H, S, S)


CASES = {  # options of both sides, of the teacher, of the student
    "plain": ({}, {}, {}),
    "scale": ({}, {"scale": 0.7}, {"scale": 0.3}),
    "causal": ({"causal": True}, {}, {}),
    "padding": ({"kv_lens": torch.tensor([11, 5], dtype=torch.int32)}, {}, {}),
    "unseen rows": ({"mask": torch.arange(S)[:, None] > 3}, {}, {}),
    "teacher's bias": ({}, {"bias": bias(), "softcap": 5.0}, {}),
    "student's bias": ({"causal": True}, {}, {"bias": bias()}),
    "softcap": ({}, {}, {"softcap": 2.0}),
    "alibi": ({"kv_lens": torch.tensor([11, 5], dtype=torch.int32)}, {},
              {"alibi_slopes": torch.rand(H)}),
    "sinks": ({}, {"sinks": torch.randn(H)}, {"sinks": torch.randn(H)}),
    "student's sinks": ({}, {}, {"sinks": torch.randn(H)}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_whole_rows(case, monkeypatch):
    monkeypatch.setattr(distillation, "CHUNK", 4 * H * S * B)  # several chunks
    shared, own, others = CASES[case]
    torch.manual_seed(0)
    teacher = relation(torch.randn(B, H, S, 16), torch.randn(B, 2, S, 16), **shared, **own)
    leaves = {"q": torch.randn(B, H, S, 8), "k": torch.randn(B, H, S, 8)}
    leaves |= {name: others[name].clone() for name in ("bias", "sinks") if name in others}
    leaves = {name: x.requires_grad_() for name, x in leaves.items()}
    q, k, *_ = leaves.values()
    student = relation(q, k, **shared, **(others | {n: leaves[n] for n in leaves if n in others}))
    losses = attention_transfer_loss(teacher, student, reduction="none")
    true = divergence(teacher, student)
    torch.testing.assert_close(losses.double(), true, atol=3e-5, rtol=1e-4)
    weight = torch.randn(B, H, S)
    found = torch.autograd.grad((losses * weight).sum(), list(leaves.values()))
    wanted = torch.autograd.grad((true * weight).sum(), list(leaves.values()))
    for name, a, b in zip(leaves, found, wanted):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_records_of_a_capture_are_compared():
    attn = fastattn.nn.Attention(16, H, causal=True, dropout=0.5)
    small = fastattn.nn.Attention(8, H, head_dim=4, causal=True)
    x = torch.randn(B, S, 16)
    with torch.no_grad(), fastattn.capture(stats=(), inputs=True) as teacher:
        attn(x)
    with fastattn.capture(stats=(), inputs=True, grad=True) as student:
        small(x[..., :8])
    loss = attention_transfer_loss(teacher[0], student[0])
    loss.backward()
    true = divergence(distillation._call("teacher", teacher[0]), student[0].call).mean()
    torch.testing.assert_close(loss.double(), true, atol=1e-5, rtol=1e-4)
    assert small.q_proj.weight.grad.abs().max() > 0 and attn.q_proj.weight.grad is None
    with pytest.raises(TypeError, match="teacher is a Record without a call"):
        with fastattn.capture() as rec:
            attn(x)
        attention_transfer_loss(rec[0], student[0])


def test_relations_of_values():
    """MiniLM's, and with other numbers of heads MiniLMv2's."""
    theirs, ours = torch.randn(B, H, S, 16), torch.randn(B, 2, S, 8)
    loss = relation_loss(theirs, ours, relation_heads=8, causal=True)
    split = [x.transpose(1, 2).reshape(B, S, 8, -1).transpose(1, 2) for x in (theirs, ours)]
    true = divergence(*(relation(x, x, causal=True) for x in split)).mean()
    torch.testing.assert_close(loss.double(), true, atol=1e-5, rtol=1e-4)
    assert abs(relation_loss(ours, ours)) < 1e-5
    with pytest.raises(ValueError, match="relation_heads is 3, and teacher has 64 channels"):
        relation_loss(theirs, ours, relation_heads=3)


def test_half_precision_and_two_dtypes():
    torch.manual_seed(0)
    teacher = relation(*torch.randn(2, B, H, S, 16).bfloat16())
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        q, k = (x.to(dtype).requires_grad_() for x in torch.randn(2, B, H, S, 8))
        student = relation(q, k, bias=bias().to(dtype))
        losses = attention_transfer_loss(teacher, student, reduction="none")
        assert losses.dtype == torch.float32
        torch.testing.assert_close(
            losses.double(), divergence(teacher, student), atol=3e-5, rtol=1e-4
        )
        losses.sum().backward()
        assert q.grad.dtype == dtype and bool(k.grad.isfinite().all())


def test_rows_and_reductions():
    a, b = (relation(*torch.randn(2, B, H, S, 8)) for _ in range(2))
    real = torch.arange(S) < torch.tensor([[S], [4]])
    each = attention_transfer_loss(a, b, reduction="none")
    kept = each[real[:, None].expand(-1, H, -1)]
    assert torch.allclose(attention_transfer_loss(a, b, rows=real), kept.mean())
    assert torch.allclose(attention_transfer_loss(a, b, rows=real, reduction="sum"), kept.sum())
    with pytest.raises(ValueError, match="reduction is 'avg'"):
        attention_transfer_loss(a, b, reduction="avg")
    with pytest.raises(TypeError, match=r"rows is torch\.int64"):
        attention_transfer_loss(a, b, rows=real.long())


def test_what_cannot_be_compared_is_refused():
    def of(heads=H, length=S, **options):
        return relation(*torch.randn(2, B, heads, length, 8), **options)

    for teacher, student, sentence in (
        (of(), of(heads=2), r"the student has \[2, 2, 11\] batch entries, heads and rows"),
        (of(causal=True), of(), r"aligned to the end\) is \(-1, -1, False\)"),
        (of(kv_lens=torch.tensor([3, 4], dtype=torch.int32)), of(), "kv_lens of teacher and"),
        (of(sinks=torch.zeros(H)), of(), "the teacher has sinks and the student has none"),
    ):
        with pytest.raises(ValueError, match=sentence):
            attention_transfer_loss(teacher, student)
    with pytest.raises(TypeError, match=r"relation\(\) has no option 'dropout_p'"):
        of(dropout_p=0.5)


def test_no_square_is_stored():
    """4096 rows: a matrix of one head would be 64 MB, and both sides' with gradients 1.5 GB."""
    pytest.importorskip("resource")
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.untyped_storage().nbytes())
            return out

    q = torch.randn(1, 1, 4096, 8, requires_grad=True)
    with Sizes():
        attention_transfer_loss(relation(*torch.randn(2, 1, 1, 4096, 8)), relation(q, q)).backward()
    assert largest <= 4096 * 16 * 4
