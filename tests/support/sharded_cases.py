"""What each of two processes checks for tests/nn/test_sharded.py: models sharded by torch's own
tools equal the model in one process. Prints "right" at the end."""

from __future__ import annotations

import copy
import os
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe, SplitPoint, pipeline
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import fastattn
from fastattn.models import BERT, GPT, EncoderDecoder
from fastattn.nn import Attention, TransformerBlock
from fastattn.nn.block import _add

PAGE = Path(__file__).parents[2] / "docs" / "pipelines.md"
SIZE = {"vocab_size": 50, "dim": 32, "heads": 4, "kv_heads": 2, "layers": 2, "max_len": 64}
IDS = torch.randint(3, 50, (2, 8), generator=torch.Generator().manual_seed(1))
PADDED = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
DOCUMENTS = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2]).int()
EMBED = {"embed": RowwiseParallel(input_layouts=Replicate())}
HEAD = {"head": ColwiseParallel(output_layouts=Replicate())}


def of_the_page(name: str):
    """The function that docs/pipelines.md defines."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (block,) = [x for x in blocks if f"def {name}(" in x]
    found: dict = {"torch": torch}
    exec(block, found)
    return found[name]


tensor_parallel = of_the_page("tensor_parallel")


clip = of_the_page("clip")


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def step(model, **inputs) -> dict[str, torch.Tensor]:
    """Everything that one training step gives, by name."""
    torch.manual_seed(5)
    out = model(IDS, labels=IDS, **inputs)
    out.loss.backward()
    grads = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": out.loss.detach(), "hidden": out.last_hidden_state.detach(), **grads}


def assert_equal(found, wanted, what):
    assert found.keys() == wanted.keys(), what
    for name, x in found.items():
        torch.testing.assert_close(
            x, wanted[name], rtol=1e-4, atol=2e-5, msg=lambda text, n=name: f"{what} {n}: {text}"
        )


# ---- the calls -----------------------------------------------------------------------------------


def calls(mesh):
    """DTensors are refused in every argument with one sentence, and explain() says the same."""
    whole = {
        **{name: torch.randn(2, 4, 6, 16) for name in "qkv"},
        "mask": torch.ones(6, 6).bool(),
        "bias": torch.randn(4, 6, 6),
        "alibi_slopes": torch.rand(4),
        "sinks": torch.randn(4),
        "kv_lens": torch.tensor([3, 6]).int(),
        "document_ids": torch.zeros(6).int(),
        "dropout_seed": torch.tensor([1, 2]),
    }
    for name, x in whole.items():
        call = {key: whole[key] for key in "qkv"} | {"dropout_p": 0.1}
        call[name] = distribute_tensor(x, mesh, [Replicate()])
        q, k, v = (call.pop(key) for key in "qkv")
        for function in (fastattn.attention, fastattn.explain):
            with pytest.raises(TypeError, match=rf"^{name} is a DTensor; .* {name}\.to_local\(\)"):
                function(q, k, v, **call)


# ---- tensor parallelism --------------------------------------------------------------------------

CASES = {  # name: (model, its options, inputs, more of the plan)
    "gpt": (GPT, {"norm": "layer"}, {"document_ids": DOCUMENTS}, {}),
    "gpt qk_norm": (GPT, {"qk_norm": True, "mlp": "gelu"}, {"attention_mask": PADDED}, {}),
    "gpt head": (GPT, {"tie_embeddings": False}, {}, HEAD),
    "gpt embed": (GPT, {}, {"skip_logits": True}, EMBED),
    "bert": (BERT, {}, {"attention_mask": PADDED}, {}),
    "encoder-decoder": (EncoderDecoder, {"dropout": 0.3}, {"attention_mask": PADDED}, {}),
    "gpt dropout": (GPT, {"dropout": 0.3}, {}, {}),
}


def models(mesh):
    for name, (cls, options, inputs, more) in CASES.items():
        for parts in (False, True):
            if parts and (name in ("encoder-decoder", "gpt dropout") or more is EMBED):
                continue
            torch.manual_seed(0)
            alone = cls(**{**SIZE, **options})
            model = tensor_parallel(copy.deepcopy(alone), mesh, parts)
            parallelize_module(model, mesh, more) if more else None
            assert_equal(step(model, **inputs), step(alone, **inputs), f"{name}, parts {parts}")


def optimizing(mesh):
    """The page's clip() and AdamW change sharded and replicated parameters as in one process."""
    torch.manual_seed(0)
    alone = GPT(**SIZE, qk_norm=True)
    model = tensor_parallel(copy.deepcopy(alone), mesh, True)
    results = []
    for x in (alone, model):
        step(x)
        norm = clip(x, 0.1) if x is model else nn.utils.clip_grad_norm_(x.parameters(), 0.1)
        torch.optim.AdamW(x.parameters(), lr=0.1, eps=1.0).step()  # of gradients, not their signs
        results.append({"norm": norm, **{n: whole(p.detach()) for n, p in x.named_parameters()}})
    assert_equal(*reversed(results), "after a step")


def generation(mesh):
    for cls in (GPT, EncoderDecoder):
        for attention in ("fastattn", "torch"):
            torch.manual_seed(0)
            model = cls(**SIZE, attention=attention).eval()

            def runs(model=model):
                prompt = IDS[:, :6]
                yield model.generate(prompt, 6)
                yield model.generate(prompt, 6, attention_mask=PADDED[:, :6], num_beams=3)
                torch.manual_seed(3)
                yield model.generate(prompt, 6, temperature=1.0)

            wanted = list(runs())
            tensor_parallel(model, mesh)
            for found, want in zip(runs(), wanted):
                assert torch.equal(found, want)
            attn = (model.blocks if cls is GPT else model.decoder)[0].attn
            assert attn.make_cache(2, 8).k.shape == (2, 0, 8, 8)


def attention_alone(mesh):
    """Sinks, biases with every head, DTensors from the projections, plans for the norms of q and k,
    and what is refused."""
    x = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(2))
    bias = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))

    def part(layer, **more):
        columns = ColwiseParallel(**more)
        plan = {f"{n}_proj": columns for n in "qkv"} | {"o_proj": RowwiseParallel()}
        return parallelize_module(layer, mesh, plan)

    def grads(layer):
        y = x.clone().requires_grad_()
        out = layer(y, bias=bias)
        (out * out.detach().cos()).sum().backward()
        named = {n: whole(p.grad) for n, p in layer.named_parameters()}
        return {"out": out.detach(), "x": y.grad, **named}

    torch.manual_seed(0)
    alone = Attention(32, 4, 2, qk_norm=True, sinks=True, rotary=True)
    nn.init.normal_(alone.sinks)
    wanted = grads(copy.deepcopy(alone))
    for more in ({}, {"use_local_output": False}):
        assert_equal(grads(part(copy.deepcopy(alone), **more)), wanted, f"attention {more}")
    planned = part(copy.deepcopy(alone))
    for name in ("q_norm", "k_norm"):
        parallelize_module(planned, mesh, {name: SequenceParallel(sequence_dim=1)})
    planned.sinks = nn.Parameter(distribute_tensor(planned.sinks.detach(), mesh, [Shard(0)]))
    assert_equal(grads(planned), wanted, "attention, planned norms and sinks")

    narrow = part(Attention(32, 4, 1))
    with pytest.raises(ValueError, match=r"k_proj gives 4 channels.*divides kv_heads = 1"):
        narrow(x)
    columns = ColwiseParallel()
    queries = parallelize_module(Attention(32, 4, 2), mesh, {"q_proj": columns})
    with pytest.raises(ValueError, match="q_proj gives 2 of 4 heads and k_proj 2 of 2"):
        queries(x)
    rows = RowwiseParallel(
        input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=False
    )
    partial = parallelize_module(Attention(32, 4), mesh, {"q_proj": rows})
    with pytest.raises(ValueError, match=r"q_proj gives a DTensor with the placements \[Shard"):
        partial(x)


def sequence_parts(mesh):
    """Different ranks drop different elements of a sequence, and the generators stay equal. Odd
    lengths are refused before torch stops the process."""
    norm = parallelize_module(TransformerBlock(32, 4).attn_norm, mesh, SequenceParallel())
    torch.manual_seed(7)
    dropped = _add(norm, torch.ones(2, 16, 32), torch.zeros(2, 16, 32), 0.5) == 0
    both = [torch.empty_like(dropped) for _ in range(2)]
    dist.all_gather(both, dropped)
    assert 0.4 < (both[0] == both[1]).float().mean() < 0.6
    after = torch.rand(1)
    same = [torch.empty(1), torch.empty(1)]
    dist.all_gather(same, after)
    assert same[0] == same[1]

    model = tensor_parallel(GPT(**SIZE, dropout=0.3), mesh, True)
    hidden = [torch.empty(2, 8, 32) for _ in range(2)]
    dist.all_gather(hidden, step(model)["hidden"])
    assert torch.equal(*hidden)
    with pytest.raises(ValueError, match="sequences of 7 tokens came to a plan"):
        model(IDS[:, :7])


# ---- stages of a pipeline ------------------------------------------------------------------------


def pipelines(rank):
    def loss_of(out, labels):
        return F.cross_entropy(out[0].flatten(0, 1), labels.flatten())

    for schedule, tied in ((ScheduleGPipe, False), (Schedule1F1B, True)):
        torch.manual_seed(0)
        model = GPT(**SIZE, tie_embeddings=tied, qk_norm=True)
        alone = copy.deepcopy(model)
        stages = pipeline(model, (IDS[:1],), split_spec={"blocks.1": SplitPoint.BEGINNING})
        stage = stages.build_stage(rank, torch.device("cpu"))
        losses: list[torch.Tensor] = []
        run = schedule(stage, 2, loss_fn=loss_of)
        run.step(IDS) if rank == 0 else run.step(target=IDS, losses=losses)
        wanted = loss_of(alone(IDS), IDS)
        wanted.backward()
        if losses:
            torch.testing.assert_close(torch.stack(losses).mean(), wanted)
        theirs = dict(alone.named_parameters())
        mine = dict(stage.submod.named_parameters())
        if tied:  # each stage has the gradient of its own use
            dist.all_reduce(mine["embed.weight"].grad)
        assert_equal(
            {n: p.grad for n, p in mine.items()}, {n: theirs[n].grad for n in mine}, "stage"
        )


# ---- FSDP2 ---------------------------------------------------------------------------------------


def started_sharded(mesh):
    """fully_shard of a model on the meta device, initialised part by part: it trains, generates,
    and loads what one process saved; also combined with tensor parallelism."""
    with torch.device("meta"):
        model = BERT(**{**SIZE, "layers": 3})
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for name, x in model.state_dict().items():
        x = whole(x)
        std = 0.02 / 6**0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
        if "norm" in name or name.endswith("bias"):
            assert torch.equal(x, torch.full_like(x, float(name.endswith("norm.weight")))), name
        else:
            assert 0.8 * std < x.std() < 1.2 * std, name

    plane = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    torch.manual_seed(0)
    alone = GPT(**SIZE, dropout=0.3, qk_norm=True)
    model = tensor_parallel(copy.deepcopy(alone), plane["tensor"])
    for block in model.blocks:
        fully_shard(block, mesh=plane["data"])
    fully_shard(model, mesh=plane["data"])
    assert_equal(step(model), step(alone), "data and tensor parallel")

    sharded = copy.deepcopy(alone)
    fully_shard(sharded, mesh=mesh)
    wanted = alone.generate(IDS, 4)
    for found in (model, sharded):
        assert torch.equal(found.generate(IDS, 4), wanted)


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    calls(mesh)
    models(mesh)
    optimizing(mesh)
    generation(mesh)
    attention_alone(mesh)
    sequence_parts(mesh)
    pipelines(rank)
    started_sharded(mesh)
    dist.destroy_process_group()
    print("right")


if __name__ == "__main__":
    sys.exit(main())
