"""The engine turns prompts into tokens and text."""
