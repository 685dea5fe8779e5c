"""Compute the official metrics of the field, and confidence intervals."""
