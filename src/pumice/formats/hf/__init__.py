"""LLaVAs of transformers: read and written."""
