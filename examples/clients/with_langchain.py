"""LangChain: a picture, a stream, structured output, and tools that may be called."""

import pydantic
from common import KEY, MODEL, PICTURE, URL
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI


class Animal(pydantic.BaseModel):
    """An animal in a picture."""

    name: str
    is_outside: bool


def weather(city: str) -> str:
    """Say what the weather is like."""
    return f"It is sunny in {city}."


model = ChatOpenAI(base_url=URL, api_key=KEY, model=MODEL)
content = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": PICTURE}}]
messages = [SystemMessage("Be brief."), HumanMessage(content)]
answer = model.invoke(messages)
print("picture:", answer.content)
print("history:", model.invoke([*messages, answer, HumanMessage("Are you sure?")]).content)
print("stream:", "".join(chunk.content for chunk in model.stream(messages)))
print("structured:", model.with_structured_output(Animal).invoke(messages))
print("function:", model.with_structured_output(Animal, method="function_calling").invoke(messages))
print("auto:", model.bind_tools([weather]).invoke("What is the weather in Rome?").content)
called = model.bind_tools([weather], tool_choice="any").invoke("What is the weather in Rome?")
print("any:", called.tool_calls)
