"""The operators around attention, each with its reference, its checks and its derivatives: norm,
rope, gate, activation, linear cross entropy, and the writing of a key-value cache.
"""
