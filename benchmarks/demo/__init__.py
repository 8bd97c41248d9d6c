"""python -m fastattn demo: a pretrained encoder before and after swap()."""
