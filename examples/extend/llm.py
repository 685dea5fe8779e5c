"""A family of language models without new fields: Ministral, a Llama whose layers have a sliding window.

    python examples/extend/llm.py train RECIPE

In the recipe, `model.decoder` is a folder of transformers, or a name on the hub, whose `model_type` is
ministral. It is the `pumice` command with one more row of the table of families. What no tensor tells stands
in the row: how values rotate, and which layers have the window. A test compares such a row with transformers
on a small random model (`tests/test_extend.py`).
"""

from __future__ import annotations

import sys

from pumice.cli import main
from pumice.formats.families import FAMILIES, HALVES, Family

FAMILIES["ministral"] = Family(
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
    },
    class_name="MinistralForCausalLM",
    template=None,
    original=None,
    rotation=HALVES,
    window="layer_types",
    gguf=None,
)

if __name__ == "__main__":
    sys.exit(main())
