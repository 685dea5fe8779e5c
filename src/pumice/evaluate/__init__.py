"""Evaluation: answers and the truth become numbers.

Knows: how a field's official scorer counts. Does not know: how an answer was made.
"""
