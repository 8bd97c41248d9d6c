"""Small models and inputs that the tests of fastattn.models share."""

from __future__ import annotations

import torch

from fastattn.models import BERT, GPT, EncoderDecoder, FusionEncoder

SMALL = {"vocab_size": 40, "max_len": 32, "dim": 32, "heads": 4, "layers": 2}


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 40, shape, generator=torch.Generator().manual_seed(seed))


def mask_of(*lengths: int, total: int = 12, left: bool = False) -> torch.Tensor:
    mask = (torch.arange(total) < torch.tensor(lengths)[:, None]).long()
    return mask.flip(1) if left else mask


HOLES = torch.tensor([[1, 1, 0, 1] * 3, [1] * 12, [0, 1] * 6])
RIGHT = mask_of(12, 7, 3)
LEFT = mask_of(12, 7, 3, left=True)
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 7, [0] * 12, [0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 4, 4]]).int()


def gpt(**more) -> GPT:
    torch.manual_seed(0)
    return GPT(**{**SMALL, "kv_heads": 2, **more})


MODELS = {
    "GPT": gpt,
    "BERT": lambda: BERT(**SMALL),
    "EncoderDecoder": lambda: EncoderDecoder(**SMALL),
    "FusionEncoder": lambda: FusionEncoder(**SMALL, feature_dim=5, num_labels=2),
}
