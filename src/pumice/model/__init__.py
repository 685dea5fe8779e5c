"""The model: vision tower, connector and decoder, in plain PyTorch."""
