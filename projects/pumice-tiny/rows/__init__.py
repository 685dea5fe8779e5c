"""Training rows of `pumice-tiny`: pictures and their captions in, LLaVA-Instruct rows out.

Knows: captions, tables of words, drawing of composites. Does not know: models, tokens, training.
Standard library and pillow only; the same seed gives the same rows.
"""
