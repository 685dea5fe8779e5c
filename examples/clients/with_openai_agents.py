"""openai-agents: an agent by the newer responses, its default; with an output type; as a stream."""

import asyncio

import pydantic
from agents import Agent, Runner, function_tool, set_default_openai_client
from common import KEY, MODEL, PICTURE, URL
from openai import AsyncOpenAI

set_default_openai_client(AsyncOpenAI(base_url=URL, api_key=KEY), use_for_tracing=False)


class Animal(pydantic.BaseModel):
    name: str
    is_outside: bool


@function_tool
def weather(city: str) -> str:
    """Say what the weather is like."""
    return f"It is sunny in {city}."


async def main() -> None:
    agent = Agent(name="Guide", instructions="Be brief.", model=MODEL, tools=[weather])
    first = await Runner.run(agent, "What is a dog?")
    print("text:", first.final_output)
    seen = [
        {"type": "input_image", "image_url": PICTURE, "detail": "auto"},
        {"type": "input_text", "text": "What is it?"},
    ]
    history = [*first.to_input_list(), {"role": "user", "content": seen}]
    print("history, picture:", (await Runner.run(agent, history)).final_output)
    typed = Agent(name="Namer", model=MODEL, output_type=Animal)
    print("object:", (await Runner.run(typed, "A dog in a garden.")).final_output)
    streamed = Runner.run_streamed(agent, "What is a cat?")
    async for _ in streamed.stream_events():
        pass
    print("stream:", streamed.final_output)


asyncio.run(main())
