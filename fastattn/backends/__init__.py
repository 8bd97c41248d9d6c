"""What runs a call: the table of backends, the operators that torch knows, their derivatives and
the libraries of kernels. Next to read: registry.py.
"""
