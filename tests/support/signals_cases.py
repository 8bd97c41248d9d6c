"""QK-clip in two processes, each of which has a copy of the model and sees other data."""

from __future__ import annotations

import torch
import torch.distributed as dist

import fastattn
from fastattn.signals import largest_logits, qk_clip


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = fastattn.nn.Attention(16, 4)
    x = torch.randn(2, 2, 9, 16)[dist.get_rank()]
    with fastattn.capture(stats=("max_logit",), model=model) as rec:
        model(x)
    own = largest_logits(rec)[""]
    every = [torch.empty_like(own) for _ in range(2)]
    dist.all_gather(every, own)
    assert not torch.equal(*every)
    largest = torch.maximum(*every)
    threshold = float(largest.mean())
    factors = qk_clip(model, rec, threshold)[""]
    assert torch.equal(factors, torch.where(largest > threshold, threshold / largest, 1.0))
    weights = [torch.empty_like(model.q_proj.weight) for _ in range(2)]
    dist.all_gather(weights, model.q_proj.weight.detach())
    assert torch.equal(*weights)
    print("right", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
