"""What models, others' and ours, are kept in: each format's reader and writer side by side.

names                whose tensor is called what, as tables
families             what the formats need to know of each family of language models and vision towers
recognise            what a folder is, by its contents
text/                how text reaches a model: tokenizers, chat templates
hf/                  a LLaVA of transformers
efficientnet_lite    the vision tower of `pumice-tiny`
gguf/                llama.cpp's files
peft/                LoRA adapters, on a model of others or on ours
components           a vision tower or a language model alone
llava/               a LLaVA of the original code
pumice/              our own folder: strict reading, atomic writing
read                 any model -> its parts; knows which of these reads what
load                 parts -> a model that runs
import_              any model -> our folder
export               our model -> others' formats

Each line may import what stands above it. Importing this package imports none of them.
"""
