<<<<<<< HEAD
"""Triton kernels, installed as `fastattn.kernels`. Start at launch.py, which is what ops.py calls.

Importing this package does not import Triton; importing any module of it does. Under
TRITON_INTERPRET=1, set before that, the kernels run on CPU tensors, slowly: that is how the tests
run them on machines without a GPU.
"""
=======
"""Triton kernels, installed as `fastattn.kernels`: spec, philox, forward, backward, decode, and one
file for each fused operator: norm, rotate, gate, activate, linear_cross_entropy; rows is what these
share. The attention kernels are not in this version: the triton backend says so in `why_not`."""
>>>>>>> fused
