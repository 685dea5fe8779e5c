"""Training rows of `pumice-tiny`: pictures and their captions in, LLaVA-Instruct rows out.

Each source is one module. The same seed and the same pictures give the same rows.
"""
