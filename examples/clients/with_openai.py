"""The openai library: chat, pictures, streams, schemas, tools, and the newer responses."""

import openai
import pydantic
from common import KEY, MODEL, PICTURE, URL

client = openai.OpenAI(base_url=URL, api_key=KEY)
seen = [
    {"type": "text", "text": "What is in the picture?"},
    {"type": "image_url", "image_url": {"url": PICTURE}},
]
messages = [{"role": "user", "content": seen}]
first = client.chat.completions.create(model=MODEL, messages=messages)
print("chat:", first.choices[0].message.content)
messages += [first.choices[0].message.model_dump(), {"role": "user", "content": "Are you sure?"}]
print("history:", client.chat.completions.create(model=MODEL, messages=messages).choices[0].message.content)
stream = client.chat.completions.create(model=MODEL, messages=messages, stream=True)
print("stream:", "".join(chunk.choices[0].delta.content or "" for chunk in stream))


class Animal(pydantic.BaseModel):
    name: str
    is_outside: bool


parsed = client.chat.completions.parse(model=MODEL, messages=messages, response_format=Animal)
print("schema:", parsed.choices[0].message.parsed)
tool = openai.pydantic_function_tool(Animal)
called = client.chat.completions.parse(model=MODEL, messages=messages, tools=[tool], tool_choice="required")
print("tool:", called.choices[0].message.tool_calls[0].function.parsed_arguments)
print("responses:", client.responses.create(model=MODEL, input="What is a dog?").output_text)
response = client.responses.parse(model=MODEL, input="A dog.", text_format=Animal)
print("responses, schema:", response.output_parsed)
