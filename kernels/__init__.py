"""Triton kernels, installed as `fastattn.kernels`: spec, philox, forward, backward, decode, and one
file for each fused operator: norm, rotate, gate, activate, linear_cross_entropy; rows is what these
share. The attention kernels are not in this version: the triton backend says so in `why_not`."""
