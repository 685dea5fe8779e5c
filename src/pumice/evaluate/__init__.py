"""Score answers to benchmarks as the official scorers do."""
