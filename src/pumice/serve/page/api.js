// Requests to the server: a streamed answer, an explanation, the models and the health check.

/** The server cannot be reached or is busy: try again. `wait`: seconds that the server asks us to wait. */
export class Away extends Error {
  constructor(message, wait = null) { super(message); this.wait = wait; }
}

/** The server refuses the request. `status`: the HTTP status. */
export class Refused extends Error {
  constructor(message, status) { super(message); this.status = status; }
}

const headers = (key) => ({ "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) });

/** The models here, the default one first: {id, max_pictures, built_in, ...}. */
export async function models(key) {
  const response = await fetch("/v1/models", { headers: headers(key) });
  if (!response.ok) throw await errorOf(response);
  return (await response.json()).data;
}

export async function healthy() {
  try {
    return (await fetch("/health", { cache: "no-store", signal: AbortSignal.timeout(5000) })).ok;
  } catch {
    return false;
  }
}

/** The boxes that an answer about a picture of width x height holds, [{label, left, top, right, bottom}] in shares. */
export async function boxesOf(text, { width, height }, pictures, key) {
  const body = JSON.stringify({ text, width, height, pictures });
  const response = await fetch("/boxes", { method: "POST", headers: headers(key), body });
  if (!response.ok) throw await errorOf(response);
  return (await response.json()).boxes;
}

/** The explanation of an answer, which is the last of `messages` in the body. */
export async function explanation(body, key) {
  let response;
  try {
    response = await fetch("/explain", { method: "POST", headers: headers(key), body: JSON.stringify(body) });
  } catch {
    throw new Away("The server is away; try again later.");
  }
  if (!response.ok) throw await errorOf(response);
  return response.json();
}

/**
 * Send a request and call `onText` with each piece of text, and before, of a long question, `onProgress` with
 * {processed, total}, its tokens. Resolves to {finish, usage} at the end.
 */
export async function answer(body, { key, signal, onText, onProgress }) {
  let response;
  try {
    response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: headers(key),
      body: JSON.stringify({ ...body, stream: true, return_progress: true, stream_options: { include_usage: true } }),
      signal,
    });
  } catch (error) {
    if (signal.aborted) throw error;
    throw new Away("The server is away; trying again.");
  }
  if (!response.ok) throw await errorOf(response);
  const result = { finish: null, usage: null };
  let done = false;
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") { done = true; break; }
      const event = JSON.parse(data);
      if (event.error) throw new Refused(event.error.message, 500);
      if (event.prompt_progress) onProgress(event.prompt_progress);
      const [choice] = event.choices;
      if (choice?.delta?.content) onText(choice.delta.content);
      result.finish = choice?.finish_reason ?? result.finish;
      result.usage = event.usage ?? result.usage;
    }
  } catch (error) {
    if (signal.aborted || error instanceof Refused) throw error;
    throw new Away("The server went away in the middle of its answer; trying again.");
  }
  if (!done) throw new Away("The server went away in the middle of its answer; trying again.");
  return result;
}

async function errorOf(response) {
  let message = `The server answered with status ${response.status}.`;
  try { message = (await response.json()).error.message; } catch { /* the body is not ours, such as the error page of a proxy */ }
  const wait = Number(response.headers.get("Retry-After")) || null;
  if (response.status === 429) return new Away("Many people are asking; trying again.", wait ?? 2);
  if ([502, 503].includes(response.status)) {
    return new Away("The server is away; trying again.", wait);
  }
  return new Refused(sentence(message), response.status);
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

/** Yield the data of each server-sent event. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      buffer += value;
      const complete = buffer.split("\n\n");
      buffer = complete.pop();
      for (const event of complete) {
        for (const line of event.split("\n")) if (line.startsWith("data: ")) yield line.slice(6);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
