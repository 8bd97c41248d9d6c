"""diffusers' models with swap() and with the attention backend "fastattn"."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch


def test_nothing_is_imported_unasked():
    code = "import sys, torch, fastattn; fastattn.swap(torch.nn.Linear(1, 1)); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"diffusers", "fastattn.diffusers", "peft", "timm"}


class Count:
    """How often fastattn's attention() and torch's function run in a block."""

    def __enter__(self):
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self.profile.__enter__()
        return self

    def __exit__(self, *error):
        self.profile.__exit__(*error)
        counts = {e.key: e.count for e in self.profile.key_averages()}
        self.ours = counts.get("fastattn::flash_attn_fwd", 0)
        self.torchs = counts.get("aten::scaled_dot_product_attention", 0)


def unet(diffusers):
    """Processors that call torch's function: swapped in both ways."""
    m = diffusers.UNet2DConditionModel(
        block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, sample_size=8,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=16, attention_head_dim=4,
    )  # fmt: skip
    x = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3, 5])}
    return m, x | {"encoder_hidden_states": torch.randn(2, 7, 16)}, 8


def flux(diffusers):
    """Processors that call dispatch_attention_fn."""
    m = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    x = {"hidden_states": torch.randn(1, 16, 4), "encoder_hidden_states": torch.randn(1, 6, 32)}
    x |= {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(6, 3)}
    return m, x | {"pooled_projections": torch.randn(1, 32), "timestep": torch.tensor([0.5])}, 2


def ran(m, x):
    """([output, gradients], calls of fastattn's kernel, calls of torch's function)."""
    m.zero_grad()
    with Count() as count:
        out = m(**x, return_dict=False)[0]
    out.sin().sum().backward()
    return [out.detach(), *(p.grad for p in m.parameters() if p.grad is not None)], count


@pytest.mark.native
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("way", ["swap", "backend"])
@pytest.mark.parametrize("make", [unet, flux])
def test_models_are_equal_and_come_back(make, way):
    diffusers = pytest.importorskip("diffusers")
    import fastattn.diffusers

    torch.manual_seed(0)
    m, x, calls = make(diffusers)
    m.eval()
    want, count = ran(m, x)
    assert (count.ours, count.torchs) == (0, calls)
    if way == "swap":
        report = fastattn.swap(m)
        assert len(report.swapped) == calls and report.left == ()
    else:
        m.set_attention_backend("fastattn")
    for made in (m, copy.deepcopy(m)):
        got, count = ran(made, x)
        assert (count.ours, count.torchs) == (calls, 0)
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    if way == "swap":
        fastattn.unswap(m)
    else:
        m.set_attention_backend("native")
    _, count = ran(m, x)
    assert (count.ours, count.torchs) == (0, calls)


def test_arguments_of_other_backends_are_refused():
    pytest.importorskip("diffusers")
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    import fastattn.diffusers  # noqa: F401  registers the backend

    q = torch.randn(1, 4, 2, 8)
    hidden = torch.tensor([[True, True, True, False]])
    got = dispatch_attention_fn(q, q, q, attn_mask=hidden, backend="fastattn")
    want = dispatch_attention_fn(q, q, q, attn_mask=hidden[:, None, None], backend="native")
    torch.testing.assert_close(got, want)
    with pytest.raises(NotImplementedError, match=r"window_size reached diffusers' attention back"):
        dispatch_attention_fn(q, q, q, attention_kwargs={"window_size": (1, 1)}, backend="fastattn")


def test_processors_that_cannot_be_served_are_named():
    diffusers = pytest.importorskip("diffusers")
    from diffusers.models.attention_processor import AttnProcessor

    m, _, _ = unet(diffusers)
    m.set_attn_processor(AttnProcessor())
    with pytest.warns(UserWarning, match=r"AttnProcessor of UNet2DConditionModel ignores"):
        m.set_attention_backend("fastattn")
    m.set_attention_backend("native")
