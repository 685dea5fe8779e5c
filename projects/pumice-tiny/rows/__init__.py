"""Training rows of `pumice-tiny`: pictures and their captions in, LLaVA-Instruct rows out.

Standard library and pillow only; the same seed gives the same rows.
"""
