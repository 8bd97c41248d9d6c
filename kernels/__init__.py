"""Triton kernels, installed as `fastattn.kernels`: spec, philox, forward, backward, decode, and one
file for each fused operator. This version has none yet: the triton backend says so in `why_not`."""
