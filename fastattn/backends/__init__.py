"""What runs a call: the table of backends, the operators that torch knows, their derivatives and
the libraries of kernels. Next to read: registry.py.
"""

from . import flops, operators  # noqa: F401  importing them tells torch of the operators
