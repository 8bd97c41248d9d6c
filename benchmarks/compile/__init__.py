"""Audits of the GPU kernels' machine code. They need the compilers, but no GPU."""
