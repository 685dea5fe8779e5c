"""The model card of an exported folder: how to ask the model in transformers and in vLLM."""

from __future__ import annotations

_CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
---

# A LLaVA, exported by Pumice

```python
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("THIS FOLDER")
model = AutoModelForImageTextToText.from_pretrained("THIS FOLDER", dtype="auto")
content = [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]
text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
inputs = processor(text=text, images=Image.open("dog.jpg"), return_tensors="pt")
with torch.inference_mode():
    ids = model.generate(**inputs, max_new_tokens=100)
print(processor.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```
"""
_BOS = """
## The begin-of-text token

A prompt begins with `%s`, once. The chat template does not write it, as in llava-hf's folders: the tokenizer
puts it before the text that the template gives. vLLM's chat endpoint tells the tokenizer not to, so send
`"add_special_tokens": true` with every chat request there. In openai's library:

```python
client.chat.completions.create(..., extra_body={"add_special_tokens": True})
```
"""


def model_card(bos: str | None) -> str:
    """Return README.md. bos: the token that a prompt begins with, if there is one."""
    return _CARD + ("" if bos is None else _BOS % bos)
