"""LLaVAs of the original code: read and written."""
