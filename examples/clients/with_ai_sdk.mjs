// Vercel's AI SDK: text, a picture, a stream, an object and tools, by its default, the newer responses.
import { createOpenAI } from "@ai-sdk/openai";
import { generateObject, generateText, jsonSchema, streamText, tool } from "ai";
import { DOG, HOST, KEY, MODEL } from "./common.mjs";

const provider = createOpenAI({ baseURL: `${HOST}/v1`, apiKey: KEY });
const content = [
  { type: "text", text: "What is it?" },
  { type: "image", image: DOG },
];
const weather = tool({
  description: "Say what the weather is like.",
  inputSchema: jsonSchema({
    type: "object",
    properties: { city: { enum: ["Rome", "Paris"] } },
    required: ["city"],
    additionalProperties: false,
  }),
  execute: async ({ city }) => `It is sunny in ${city}.`,
});
for (const [name, model] of [["responses", provider(MODEL)], ["chat", provider.chat(MODEL)]]) {
  const messages = [{ role: "user", content }];
  const seen = await generateText({ model, messages });
  console.log(`${name}, picture:`, seen.text);
  messages.push(...seen.response.messages, { role: "user", content: "Are you sure?" });
  console.log(`${name}, history:`, (await generateText({ model, messages })).text);
  const stream = streamText({ model, system: "Be brief.", prompt: "What is a dog?" });
  let text = "";
  for await (const part of stream.textStream) text += part;
  if (!text) throw new Error(`${name}: nothing was streamed`);
  console.log(`${name}, stream:`, text);
  const streamed = [...(await stream.response).messages, { role: "user", content: "Are you sure?" }];
  console.log(`${name}, its history:`, (await generateText({ model, messages: streamed })).text);
  const schema = jsonSchema({
    type: "object",
    properties: { animal: { enum: ["dog", "cat"] } },
    required: ["animal"],
    additionalProperties: false,
  });
  const object = await generateObject({ model, schema, prompt: "A dog." });
  console.log(`${name}, object:`, object.object);
  const auto = await generateText({ model, tools: { weather }, prompt: "What is the weather in Rome?" });
  console.log(`${name}, auto:`, auto.text);
  const called = await generateText({
    model,
    tools: { weather },
    toolChoice: "required",
    prompt: "What is the weather in Rome?",
  });
  if (!called.toolResults.length) throw new Error(`${name}: no tool was called`);
  console.log(`${name}, tool:`, called.toolResults[0].output);
}
