"""VLMEvalKit: its wrapper of OpenAI's protocol, whose longest answer is 4096 tokens."""

import importlib
import importlib.util
import sys
import types

from common import DOG, KEY, MODEL, URL

# `import vlmeval` would import all benchmarks, and torchvision with them. The wrapper needs none of them.
for name in ("vlmeval", "vlmeval.api"):
    spec = importlib.util.find_spec(name)
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = spec.submodule_search_locations
OpenAIWrapper = importlib.import_module("vlmeval.api.gpt").OpenAIWrapper

model = OpenAIWrapper(MODEL, api_base=f"{URL}/chat/completions", key=KEY, max_tokens=4096, retry=1)
answer = model.generate([{"type": "image", "value": str(DOG)}, {"type": "text", "value": "What is it?"}])
assert answer and "Failed" not in answer, answer
print("answer:", answer)
