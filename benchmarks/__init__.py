"""Benchmarks, installed as fastattn.benchmarks. cli.py is `python -m fastattn bench`."""
