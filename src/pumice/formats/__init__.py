"""The formats of models: each format's reader and writer stand side by side.

names                tables of tensor names
families             tables of the families of language models and vision towers
recognise            which format a file or folder has, by its contents
text/                tokenizers and chat templates
hf/                  LLaVAs of transformers
efficientnet_lite    the vision tower of `pumice-tiny`
gguf/                files of llama.cpp
peft/                LoRA adapters
components           a vision tower or a language model alone
llava/               LLaVAs of the original code
pumice/              our own folder, which is read strictly and written atomically
read                 any model -> its parts
load                 parts -> a model that runs
import_              any model -> our folder
export               our model -> other formats

Each line may import what stands above it. Importing this package imports none of them.
"""
