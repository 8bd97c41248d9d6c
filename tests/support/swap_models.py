"""Models for tests/swapping/test_swapping.py and tests/swapping/test_swapping_after.py: one of each
kind that swap() meets."""

from __future__ import annotations

import functools

import swap_helpers
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa

D, H, S = 16, 2, 6


class Named(nn.MultiheadAttention):
    """Without its own forward: swapped, and its other methods are kept."""

    def describe(self):
        return f"{self.num_heads} heads"


class Doubled(nn.MultiheadAttention):
    """With its own forward: left alone."""

    def forward(self, *args, **kwargs):
        out, weights = super().forward(*args, **kwargs)
        return 2 * out, weights


class OwnLayer(nn.TransformerEncoderLayer):
    """Left alone, but its submodules are swapped, and torch's fast path must not bypass them."""

    def forward(self, src, *args, **kwargs):
        return super().forward(src, *args, **kwargs)


class Block(nn.Module):
    """Attention the way timm writes it."""

    def __init__(self, dim=D, num_heads=H, qk_norm=True):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale, self.fused_attn = self.head_dim**-0.5, True
        self.qkv = nn.Linear(dim, 3 * dim)
        norm = nn.LayerNorm if qk_norm else nn.Identity
        self.q_norm, self.k_norm = norm(self.head_dim), norm(self.head_dim)
        self.attn_drop, self.proj_drop = nn.Dropout(0.1), nn.Dropout(0.1)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, attn_mask=None):
        batch, n, _ = x.shape
        qkv = self.qkv(x).reshape(batch, n, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused_attn:
            p = self.attn_drop.p if self.training else 0.0
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=p)
        else:
            scores = q * self.scale @ k.transpose(-2, -1)
            scores = scores if attn_mask is None else scores + attn_mask
            x = self.attn_drop(scores.softmax(-1)) @ v
        x = x.transpose(1, 2).reshape(batch, n, self.num_heads * self.head_dim)
        return self.proj_drop(self.proj(x))


class ImportedAttention(Block):
    """Calls the function by a name imported from torch."""

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(scaled_dot_product_attention(q, k, v))


class HiddenAttention(Block):
    """F is imported, but attention is called as torch.nn.functional's."""

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.relu(self.proj(torch.nn.functional.scaled_dot_product_attention(q, k, v)))


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        options = {"dim_feedforward": 32, "batch_first": True, "dropout": 0.0}
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, H, **options), 2)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(D, H, **options), 1)
        self.named, self.doubled = (c(D, H, batch_first=True) for c in (Named, Doubled))
        self.own = OwnLayer(D, H, **options)
        self.block = Block()

    def forward(self, x):
        hidden = torch.arange(x.shape[1]) >= torch.tensor([[4], [6]])
        memory = self.encoder(x, src_key_padding_mask=hidden)
        x = self.decoder(x, memory, memory_key_padding_mask=hidden)
        x = x + self.named(x, x, x)[0] + self.doubled(x, x, x, need_weights=False)[0]
        return self.block(self.own(x))


def model(cls=Everything, *args):
    torch.manual_seed(0)
    return cls(*args).eval()


def x_of():
    torch.manual_seed(1)
    return torch.randn(2, S, D)


# ---- ways to spell the call of scaled_dot_product_attention -------------------------------------


def forwards(function):
    """A wrapper that calls a closed-over function."""

    @functools.wraps(function)
    def forward(*args, **kwargs):
        return function(*args, **kwargs)

    return forward


def helper(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def helper_of_a_helper(q, k, v):
    return attend(q, v=v, k=k)


def with_default(q, k, v, attend=torch.nn.functional.scaled_dot_product_attention, *, times=1):
    return attend(q, k, v) * times


def recursive(q, k, v, depth=2):
    return recursive(q, k, v, depth - 1) if depth else F.scaled_dot_product_attention(q, k, v)


attend = forwards(helper)
functional = F


class Spelled(nn.Module):
    """The base of the classes below, each of which spells attend(q, k, v) in its own way."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D)

    def forward(self, x):
        return self.attend(*self.qkv(x).unflatten(-1, (-1, H)).movedim(-1, 1).chunk(3, -1))


def spelled(name, attend, **members):
    return type(name, (Spelled,), {"attend": attend, "__module__": __name__, **members})


class WithSuper(Spelled):
    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


class Calling(WithSuper):
    """Its own attend doubles what super() gives."""

    def attend(self, q, k, v):
        return 2 * super().attend(q, k, v)


class Held(Spelled):
    """torch's function is an attribute of the instance."""

    def __init__(self):
        super().__init__()
        self.function = F.scaled_dot_product_attention

    def attend(self, q, k, v):
        return self.function(q, k, v)


class Closing(Spelled):
    """Its method is made by a function."""

    def made(functional):
        return lambda self, q, k, v: functional.scaled_dot_product_attention(q, k, v)

    attend = made(F)


SPELLINGS = {
    "imported": spelled("Imported", lambda self, q, k, v: scaled_dot_product_attention(q, k, v)),
    "renamed": spelled("Renamed", lambda self, q, k, v: sdpa(q, k, v)),
    "F": spelled("Short", lambda self, q, k, v: F.scaled_dot_product_attention(q, k, v)),
    "alias of F": spelled("Alias", lambda self, *x: functional.scaled_dot_product_attention(*x)),
    "nn.functional": spelled(
        "Nn", lambda self, *x: nn.functional.scaled_dot_product_attention(*map(nn.Identity(), x))
    ),
    "torch.nn.functional": spelled(
        "Torch", lambda self, *x: torch.nn.functional.scaled_dot_product_attention(*x)
    ),
    "torch._C._nn": spelled(
        "C", lambda self, *x: torch._C._nn.scaled_dot_product_attention(*x)
    ),
    "a helper": spelled("Helped", lambda self, q, k, v: helper(q, k, v)),
    "a helper's helper": spelled("Far", lambda self, *x: helper_of_a_helper(*x)),
    "recursion": spelled("Recursive", lambda self, *x: recursive(*x)),
    "a helper elsewhere": spelled("Elsewhere", lambda self, *x: swap_helpers.attend(*x)),
    "a default": spelled("Default", lambda self, *x: with_default(*x, times=2)),
    "a static method": spelled("Static", staticmethod(helper)),
    "a decorated method": spelled("Wrapped", forwards(lambda self, *x: helper(*x))),
    "no_grad": spelled("NoGrad", torch.no_grad()(lambda self, *x: helper(*x))),
    "the class's": spelled("OfClass", staticmethod(F.scaled_dot_product_attention)),
    "the instance's": Held,
    "a closure": Closing,
    "a base's, by super()": Calling,
    "inside": spelled("Inside", lambda self, *x: next(helper(*y) for y in (x,))),
}  # fmt: skip


class ByAttention(Spelled):
    def attend(self, q, k, v):
        return WithSuper.attend(self, q, k, v)


class ByPartial(Held):
    def __init__(self):
        super().__init__()
        self.function = functools.partial(helper)


class ByImport(Spelled):
    def attend(self, q, k, v):
        from torch.nn.functional import scaled_dot_product_attention as function

        return function(q, k, v)


class ByTorch(nn.Module):
    """CLIP's pooling: a function of torch calls attention for it."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(D, H)

    def forward(self, x):
        a = self.attn
        return F.multi_head_attention_forward(
            x, x, x, D, H, a.in_proj_weight, a.in_proj_bias, None, None, False, 0.0,
            a.out_proj.weight, a.out_proj.bias, need_weights=False,
        )[0]  # fmt: skip


class Counted(Spelled):
    def attend(self, q, k, v):
        global calls
        calls += 1
        return helper(q, k, v)


calls = 0
LEFT = {
    "its class's method": (ByAttention, "ByAttention.attend calls WithSuper.attend by its class"),
    "a partial": (ByPartial, "its attribute function is a function that calls it"),
    "an import inside": (ByImport, "takes scaled_dot_product_attention from what is known only"),
    "torch's function": (ByTorch, "calls torch.nn.functional.multi_head_attention_forward"),
    "a global counter": (Counted, "Counted.attend assigns global names"),
}


class Processor:
    """diffusers' older attention processors: an object that a module holds and calls."""

    def __call__(self, attention, x):
        q, k, v = attention.qkv(x).unflatten(-1, (-1, H)).movedim(-1, 1).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v)


class ProcessedAttention(Spelled):
    def __init__(self, processor=None):
        super().__init__()
        self.processor = processor or Processor()

    def forward(self, x):
        return self.processor(self, x)
