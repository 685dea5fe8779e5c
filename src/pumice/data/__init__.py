"""Training data: LLaVA rows on disk, mixtures, packs, and checks."""
