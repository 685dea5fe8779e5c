"""Training data: LLaVA rows on disk, mixtures of them, and their checks.

Knows: files of rows and how they become Conversations. Does not know: tokens, tensors, models.
"""
