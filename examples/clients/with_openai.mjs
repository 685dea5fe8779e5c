// The openai library of JavaScript: a picture, a stream, and the newer responses.
import OpenAI from "openai";
import { HOST, KEY, MODEL, PICTURE } from "./common.mjs";

const client = new OpenAI({ baseURL: `${HOST}/v1`, apiKey: KEY });
const content = [
  { type: "text", text: "What is it?" },
  { type: "image_url", image_url: { url: PICTURE } },
];
const messages = [{ role: "user", content }];
const first = await client.chat.completions.create({ model: MODEL, messages });
console.log("picture:", first.choices[0].message.content);
messages.push(first.choices[0].message, { role: "user", content: "Are you sure?" });
const stream = await client.chat.completions.create({ model: MODEL, messages, stream: true });
let text = "";
for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? "";
console.log("stream:", text);
const response = await client.responses.create({ model: MODEL, input: "What is a dog?" });
console.log("responses:", response.output_text);
const events = client.responses.stream({ model: MODEL, input: "What is a cat?" });
console.log("responses, stream:", (await events.finalResponse()).output_text);
