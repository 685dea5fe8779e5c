"""How text reaches a model of others: tokenizers and chat templates."""
