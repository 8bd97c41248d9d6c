"""Triton kernels, installed as `fastattn.kernels`. Attention starts at launch.py, called by ops.py;
norm, rotate, gate, activate and linear_cross_entropy are the fused operators around it, and rows is
what these share.

Importing this package does not import Triton; importing any module of it does. Under
TRITON_INTERPRET=1, set before that, the kernels run on CPU tensors, slowly: that is how the tests
run them on machines without a GPU.
"""
