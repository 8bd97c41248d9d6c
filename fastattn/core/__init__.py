"""An attention call in plain torch: its numbers, operands and checks, the reference, the tolerance
rule. Imports nothing else of fastattn.
"""
