"""What runs a call: the table of backends, the operators that torch knows, their derivatives and
the libraries of kernels. Next to read: registry.py.
"""

from . import (  # noqa: F401  they tell torch of the operators
    flops,
    operators,
    operators_jvp,
    operators_statistics,
    transforms,
)
