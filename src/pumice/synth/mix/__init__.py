"""Mixtures of academic tasks, built from their official files as LLaVA-1.5 has them (arXiv 2310.03744)."""
