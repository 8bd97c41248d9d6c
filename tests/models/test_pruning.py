"""head_importance() and prune_heads(): a pruned model gives what masking its heads gives."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

import fastattn
from fastattn.models import BERT
from fastattn.projections import projections_of
from fastattn.pruning import head_importance, least_important, prune_heads

S = 7


def encoder(cls=nn.TransformerEncoderLayer) -> nn.Module:
    model = nn.Sequential(*(cls(16, 4, 32, dropout=0.0, batch_first=True) for _ in range(2)))
    fastattn.swap(model)
    return model


def blocks(kv_heads: int = 4) -> nn.Module:
    options = {"causal": True, "rotary": True, "bias": True, "sinks": True, "qk_norm": True}
    make = partial(fastattn.nn.Attention, 16, 4, kv_heads, **options)
    return nn.Sequential(*(make() for _ in range(2)))


def transformer(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    import fastattn.hf

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
             "intermediate_size": 32, "vocab_size": 16, "max_position_embeddings": 16,
             "embedding_size": 16, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 32,
             "image_size": 8, "patch_size": 4, "num_key_value_heads": 2}  # fmt: skip
    config = transformers.AutoConfig.for_model(name, **sizes)
    return fastattn.hf.enable(transformers.AutoModel.from_config(config)).eval()


def bert() -> nn.Module:
    return BERT(vocab_size=16, max_len=S, dim=16, heads=4, layers=2).eval()


MODELS = {
    "torch": encoder,
    "nn": blocks,
    "grouped": partial(blocks, 2),
    "fastattn.models": bert,
    **{
        name: partial(transformer, name)
        for name in ("bert", "distilbert", "albert", "vit", "llama")
    },
}


def inputs(kind: str):
    if kind in ("torch", "nn", "grouped"):
        return (torch.randn(3, S, 16),)
    return (torch.randn(3, 3, 8, 8) if kind == "vit" else torch.randint(16, (3, S)),)


def output(model: nn.Module, given) -> torch.Tensor:
    out = model(*given)
    return out if isinstance(out, torch.Tensor) else out.last_hidden_state


def masked(model: nn.Module, heads) -> nn.Module:
    """A copy whose heads give zero: their columns of the output projection are."""
    model = copy.deepcopy(model)
    for name, removed in heads.items():
        parts = projections_of(model, name)
        with torch.no_grad():
            parts.out.weight.unflatten(1, (parts.heads, -1))[:, removed] = 0
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_a_pruned_model_is_the_masked_one(kind):
    torch.manual_seed(0)
    model, given = MODELS[kind](), inputs(kind)
    with fastattn.capture(stats=("max_logit",)) as rec:
        output(model, given)
    names = list(dict.fromkeys(r.name for r in rec))
    heads = {names[0]: [2, 3], names[-1]: [0, 1] if kind in ("grouped", "llama") else [1]}
    if len(names) == 1:  # ALBERT's layers share their weights
        heads = {names[0]: [0, 2]}
    before = sum(x.numel() for x in model.state_dict().values())
    wanted, unpruned = output(masked(model, heads), given), output(model, given)
    assert prune_heads(model, heads) is model
    torch.testing.assert_close(output(model, given), wanted, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(wanted, unpruned, atol=1e-3)
    assert sum(x.numel() for x in model.state_dict().values()) < before
    fresh = MODELS[kind]()
    prune_heads(fresh, heads).load_state_dict(model.state_dict())
    torch.testing.assert_close(output(fresh, given), output(model, given))
    output(model, given).square().sum().backward()
    with fastattn.capture(stats=("max_logit",)) as rec:
        output(model, given)
    assert rec[0].max_logit.shape[1] == 2


def test_importance_is_the_gradient_of_a_gate():
    torch.manual_seed(0)
    model, x = blocks(), torch.randn(3, S, 16)
    target = torch.randn(3, S, 16)
    with head_importance(normalize=False) as importance:
        for half in (slice(0, 2), slice(2, 3)):
            (model(x[half]) * target[half]).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    (model(x) * target).sum().backward()
    assert all(torch.allclose(p.grad, grads[n], atol=1e-4) for n, p in model.named_parameters())
    for n, attn in enumerate(model):
        gate = torch.ones(3, 4, 1, 1, requires_grad=True)  # of each example and head
        attn.attend = lambda *a, gate=gate, **o: fastattn.attention(*a, **o) * gate
        ((model(x) * target).sum()).backward()
        del attn.attend
        torch.testing.assert_close(
            importance[str(n)], gate.grad[..., 0, 0].abs().sum(0).double(), atol=1e-4, rtol=1e-4
        )
    with head_importance() as importance:
        model(x).sum().backward()
    assert all(torch.allclose(x.norm(), torch.ones(()).double()) for x in importance.values())


def test_the_least_important_heads():
    importance = {"a": torch.tensor([0.9, 0.1, 0.8]), "b": torch.tensor([0.3, 0.2, 0.25])}
    assert least_important(importance, 3) == {"a": [1], "b": [1, 2]}
    assert least_important(importance, 2) == {"a": [1, 2], "b": [1, 2]}
    assert least_important(importance, 6) == {"a": [], "b": []}
    with pytest.raises(ValueError, match=r"keep is 1; accepted is 2 .* to 6"):
        least_important(importance, 1)


def test_what_cannot_be_pruned_is_refused_and_unchanged():
    model = blocks(2)
    model.append(nn.Linear(16, 16))
    state = copy.deepcopy(model.state_dict())
    for heads, sentence in (
        ({"0": [0, 1], "1": [0]}, "whole groups"),
        ({"0": [4]}, "0 has 4 heads, and"),
        ({"0": [0, 1, 2, 3]}, "all 4 heads of 0"),
        ({"2": [0]}, "2 is a Linear, whose projections are not where"),
        ({"5": [0]}, "the model has no module '5'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            prune_heads(model, {"1": [2, 3], **heads})
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    with pytest.raises(ValueError, match=r"torch's own MultiheadAttention.*fastattn\.swap"):
        prune_heads(nn.Sequential(nn.MultiheadAttention(16, 4)), {"0": [1]})
    with pytest.raises(ValueError, match="further weights for each head"):
        prune_heads(biased(), {"attn": [1]})


def biased() -> nn.Module:
    model = nn.Module()
    model.attn = fastattn.nn.Attention(16, 4)
    model.attn.relative = nn.Embedding(32, 4)  # T5's
    return model
