"""What runs a call: the table of backends, the operators that torch knows, their derivatives and
the libraries of kernels. Next to read: registry.py.
"""

from . import flops, operators, operators_jvp  # noqa: F401  they tell torch of the operators
