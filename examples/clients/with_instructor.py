"""instructor: its default mode, which forces a call of a function."""

import instructor
import openai
import pydantic
from common import KEY, MODEL, URL


class Person(pydantic.BaseModel):
    name: str
    age: int


client = instructor.from_openai(openai.OpenAI(base_url=URL, api_key=KEY))
messages = [{"role": "user", "content": "Jason is 25 years old."}]
person = client.chat.completions.create(model=MODEL, messages=messages, response_model=Person)
assert isinstance(person, Person)
print(person)
