"""Triton kernels, installed as `fastattn.kernels`. Attention starts at launch.py;
norm, rope, gate, activate and linear_cross_entropy are the fused operators around it, and rows.py
has what these share.

Importing this package does not import Triton; importing any module of it does. Under
TRITON_INTERPRET=1, set before that, the kernels run slowly on CPU tensors, which is how the tests
run them on machines without a GPU.
"""
