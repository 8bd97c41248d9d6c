"""What a call is, in plain torch: numbers, operands, checks, the reference, the rule for errors.
Imports nothing else of fastattn.
"""
