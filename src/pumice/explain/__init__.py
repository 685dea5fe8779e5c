"""Explanations show where each word of an answer looked, and whether the images mattered."""
