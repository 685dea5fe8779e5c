"""smolagents: a ToolCallingAgent, which requires a call in every step."""

from common import KEY, MODEL, URL
from smolagents import OpenAIServerModel, ToolCallingAgent

model = OpenAIServerModel(MODEL, api_base=URL, api_key=KEY)
agent = ToolCallingAgent(tools=[], model=model, max_steps=3)
print("answer:", agent.run("What is two and two?"))
