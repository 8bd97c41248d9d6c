"""The commands of python -m fastattn that are not benchmarks. __main__.py lists them all."""
