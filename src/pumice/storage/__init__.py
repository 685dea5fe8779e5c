"""Where models are kept: tensors in files, downloads, JSON, and a model in parts."""
