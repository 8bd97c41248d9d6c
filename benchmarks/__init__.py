"""Benchmarks, installed as fastattn.benchmarks: timing.py is the protocol, bench.py the rows."""
