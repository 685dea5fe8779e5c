"""pydantic-ai: an agent that answers in text, sees a picture, and gives objects; a stream."""

import asyncio

import pydantic
from common import DOG, KEY, MODEL, URL
from pydantic_ai import Agent, BinaryContent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Animal(pydantic.BaseModel):
    name: str
    is_outside: bool


model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=URL, api_key=KEY))
agent = Agent(model, instructions="Be brief.")
picture = BinaryContent(DOG.read_bytes(), media_type="image/jpeg")
first = agent.run_sync(["What is in the picture?", picture])
print("picture:", first.output)
print("history:", agent.run_sync("Are you sure?", message_history=first.all_messages()).output)
print("object:", Agent(model, output_type=Animal).run_sync(["What is it?", picture]).output)


async def streamed() -> str:
    async with agent.run_stream("What is a dog?") as result:
        return await result.get_output()


print("stream:", asyncio.run(streamed()))
