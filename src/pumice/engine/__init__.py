"""The engine: prompts become tokens, tokens become text as they come.

Knows: a model, token ids, sampling. Does not know: conversations, templates, pictures, people.
"""
