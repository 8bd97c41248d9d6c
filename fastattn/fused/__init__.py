"""The operators around attention, each with its reference, checks and derivatives: norm, rope,
gate, activation, linear cross entropy, and appending to a KV cache.
"""
