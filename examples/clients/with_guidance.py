"""guidance: a question and its answer."""

import guidance
from common import KEY, MODEL, URL

model = guidance.models.OpenAI(MODEL, base_url=URL, api_key=KEY)
with guidance.user():
    model += "What is a dog? Answer briefly."
with guidance.assistant():
    model += guidance.gen("answer", max_tokens=30)
print("answer:", model["answer"])
