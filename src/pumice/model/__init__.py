"""The model: torch and config only, never text, pictures or files."""
