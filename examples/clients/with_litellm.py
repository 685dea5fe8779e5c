"""LiteLLM: a picture, history with its own answer, a stream, tools, and the newer responses."""

import litellm
from common import HOST, KEY, MODEL, PICTURE, URL

asked = {"model": f"openai/{MODEL}", "api_base": URL, "api_key": KEY}
content = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": PICTURE}}]
messages = [{"role": "user", "content": content}]
answer = litellm.completion(messages=messages, **asked).choices[0].message
print("picture:", answer.content)
messages += [answer.model_dump(), {"role": "user", "content": "Are you sure?"}]
print("history:", litellm.completion(messages=messages, **asked).choices[0].message.content)
stream = litellm.completion(messages=messages, stream=True, **asked)
print("stream:", "".join(chunk.choices[0].delta.content or "" for chunk in stream))
parameters = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
tools = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
called = litellm.completion(messages=messages, tools=tools, tool_choice="required", **asked)
print("tool:", called.choices[0].message.tool_calls[0].function)
print("responses:", litellm.responses(input="What is a dog?", **asked).output[0].content[0].text)
for name, base in (("anthropic", HOST), ("ollama_chat", HOST)):
    other = {"model": f"{name}/{MODEL}", "api_base": base, "api_key": KEY}
    print(f"{name}:", litellm.completion(messages=messages[:1], **other).choices[0].message.content)
try:
    litellm.completion(messages=[{"role": "user", "content": "word " * 9000}], **asked)
    raise SystemExit("a prompt that is too long was answered")
except litellm.ContextWindowExceededError as error:
    print("too long:", str(error)[:80])
