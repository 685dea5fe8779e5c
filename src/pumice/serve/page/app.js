// The page: what is asked, shown and kept. The protocol is in api.js, the memory in store.js.

import { answer, Away, explanation, healthy, models, Refused } from "/page/api.js";
import { mount } from "/page/explain.js";
import { render } from "/page/markdown.js";
import { read } from "/page/pictures.js";
import { loadChoice, loadConversation, saveChoice, saveConversation } from "/page/store.js";

const EXAMPLES = [
  ["dog", "A dog lying in dry grass", "What is this dog doing?"],
  ["kitten", "A kitten with a ball of wool", "What is the kitten playing with?"],
  ["horses", "Horses in a meadow", "How many horses are there?"],
  ["musicians", "Musicians in a street", "What are these people doing?"],
];
const LONGEST_WAIT = 10; // seconds between two looks for a server that is away
const FIELDS = ["temperature", "top_p", "max_tokens", "seed", "system", "key"];

const $ = (id) => document.getElementById(id);
const state = {
  messages: [], // {role, text, pictures: [{url, name}]} and {role, text, finish, usage, seconds, error}
  chosen: [], // pictures of the question that is being written
  editing: null, // the number of the question that it replaces
  model: null,
  stopper: null, // ends the answer that is on its way
};
const explained = new WeakMap(); // answers whose explanation is shown

// --- elements ---

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

const button = (text, act, label = text) =>
  element("button", { type: "button", "aria-label": label, onclick: act }, text);

function say(text) {
  $("announce").textContent = "";
  setTimeout(() => { $("announce").textContent = text; }, 50); // a change is announced, a repetition is not
}

function complain(text) {
  $("problem").textContent = text ?? "";
  $("problem").hidden = !text;
}

// --- showing the conversation ---

function showMessages() {
  const nodes = state.messages.map((message, number) =>
    message.role === "user" ? question(message, number) : reply(message, number));
  $("messages").replaceChildren(...nodes);
  const empty = state.messages.length === 0;
  $("welcome").hidden = !empty;
  for (const id of ["copy-all", "save-markdown", "save-json", "new"]) $(id).disabled = empty;
}

function question(message, number) {
  const node = element("article", { class: "user", "aria-label": "You" });
  if (message.pictures.length) {
    node.append(element("div", { class: "shown" },
      ...message.pictures.map((picture) => element("img", { src: picture.url, alt: picture.name }))));
  }
  node.append(element("p", { class: "said" }, message.text));
  node.append(element("div", { class: "tools" },
    button("Edit", () => edit(number), `Edit the question: ${message.text}`)));
  return node;
}

function reply(message, number) {
  const node = element("article", { class: "assistant", "aria-label": "Answer" });
  const said = element("div", { class: "said" });
  node.append(said);
  showText(node, message);
  if (explained.has(message)) {
    said.hidden = true; // the explanation holds the same words
    const shown = element("div", { class: "explained" });
    mount(shown, explained.get(message), picturesUpTo(number).map((picture) => picture.url));
    node.append(shown);
  }
  if (message.error) node.append(element("p", { class: "problem", role: "alert" }, message.error));
  if (message.finish === null && !message.error) {
    node.setAttribute("aria-busy", "true");
    return node;
  }
  const tools = element("div", { class: "tools" });
  if (message.text) tools.append(button("Copy", (event) => copy(message.text, event.target), "Copy the answer"));
  if (message.text && picturesUpTo(number).length) {
    tools.append(element("button", { type: "button", class: "explain", "aria-pressed": String(explained.has(message)),
      title: "Point at a word: where it looked in the pictures", onclick: (event) => explain(message, event.target) },
    "Explain"));
  }
  if (number === state.messages.length - 1) {
    const word = message.error ? "Try again" : "Regenerate";
    tools.append(button(word, regenerate, `${word}: answer once more`));
  }
  const facts = told(message);
  if (facts) tools.append(element("small", { title: detail(message) }, facts));
  node.append(tools);
  return node;
}

function showText(node, message) {
  const said = node.querySelector(".said");
  if (message.text) render(said, message.text);
  else if (message.finish === null && !message.error) {
    said.replaceChildren(element("span", { class: "waiting", role: "img", "aria-label": "An answer is on its way" },
      element("i"), element("i"), element("i")));
  } else said.replaceChildren();
}

function told(message) {
  const facts = [];
  if (message.finish === "stopped") facts.push("stopped");
  if (message.finish === "length") facts.push("cut at the longest length");
  if (message.usage) facts.push(`${message.usage.completion_tokens} tokens`);
  if (message.seconds) facts.push(`${message.seconds.toFixed(1)} s`);
  return facts.join(" · ");
}

function detail(message) {
  if (!message.usage) return "";
  const { prompt_tokens: prompt, prompt_tokens_details: details } = message.usage;
  return `${prompt} tokens of question, ${details?.cached_tokens ?? 0} of them remembered from before`;
}

const atEnd = () => window.innerHeight + window.scrollY >= document.documentElement.scrollHeight - 120;
const toEnd = () => window.scrollTo({ top: document.documentElement.scrollHeight });

// --- asking ---

function busy() { return state.stopper !== null; }

function showBusy() {
  $("send").hidden = busy();
  $("stop").hidden = !busy();
  $("send").disabled = !$("question").value.trim() && !state.chosen.length;
}

async function send() {
  if (busy()) return;
  const text = $("question").value.trim();
  if (!text && !state.chosen.length) return;
  complain(null);
  if (state.editing !== null) state.messages.length = state.editing;
  dropUnanswered();
  state.messages.push({
    role: "user",
    text: text || (state.chosen.length > 1 ? "Describe these pictures." : "Describe this picture."),
    pictures: state.chosen,
  });
  clearComposer();
  await respond();
}

/** A question without an answer cannot be followed by another; an error is no answer. */
function dropUnanswered() {
  const last = state.messages.at(-1);
  if (last?.role === "assistant" && last.error && !last.text) state.messages.length -= 2;
}

async function regenerate() {
  if (busy()) return;
  if (state.messages.at(-1)?.role === "assistant") state.messages.pop();
  if (state.messages.length) await respond();
}

async function respond() {
  const slot = { role: "assistant", text: "", finish: null };
  const body = request();
  state.messages.push(slot);
  const stopper = state.stopper = new AbortController();
  showMessages();
  showBusy();
  toEnd();
  await remember();
  for (let pause = 1; slot.finish === null && !slot.error;) {
    try {
      await stream(body, slot, stopper.signal);
      pause = 1;
    } catch (error) {
      if (stopper.signal.aborted) slot.finish = "stopped";
      else if (error instanceof Away) {
        showAway(error.message);
        await comeBack(error.wait ?? pause, error.wait === null, stopper.signal);
        pause = Math.min(2 * pause, LONGEST_WAIT);
        if (stopper.signal.aborted) slot.finish = "stopped";
      } else {
        slot.error = error instanceof Refused ? error.message : `Something went wrong in this page: ${error.message}`;
        if (error.status === 401) askForKey();
      }
    }
  }
  showAway(null);
  if (state.stopper === stopper) state.stopper = null;
  if (!state.messages.includes(slot)) return; // a new conversation has begun meanwhile
  const follow = atEnd();
  showMessages();
  showBusy();
  if (follow) toEnd();
  say(slot.error ? "" : slot.finish === "stopped" ? "Stopped." : slot.text);
  await remember();
}

async function stream(body, slot, signal) {
  const begun = performance.now();
  let fresh = true, painting = false;
  const paint = () => {
    painting = false;
    const node = $("messages").lastElementChild;
    if (!node || state.messages.at(-1) !== slot || slot.finish !== null) return;
    const follow = atEnd();
    showText(node, slot);
    if (follow) toEnd();
  };
  const result = await answer(body, {
    key: $("key").value,
    signal,
    onText: (text) => {
      if (fresh) { slot.text = ""; fresh = false; showAway(null); } // what came before the server went away
      slot.text += text;
      if (!painting) { painting = true; requestAnimationFrame(paint); }
    },
  });
  if (fresh) slot.text = "";
  slot.usage = result.usage;
  slot.seconds = (performance.now() - begun) / 1000;
  slot.finish = result.finish ?? "stop";
}

/** Wait until the server is back; `ask`: look whether it is, instead of only waiting. */
async function comeBack(seconds, ask, signal) {
  for (let wait = seconds; !signal.aborted; wait = Math.min(1.6 * wait, LONGEST_WAIT)) {
    await new Promise((resolve) => {
      const timer = setTimeout(resolve, wait * 1000);
      signal.addEventListener("abort", () => { clearTimeout(timer); resolve(); }, { once: true });
    });
    if (signal.aborted || !ask || await healthy()) return;
  }
}

function showAway(text) {
  $("away").hidden = !text;
  if (text && $("away").textContent !== text) $("away").textContent = text;
}

function askForKey() {
  $("parameters").open = true;
  $("key").focus();
}

function parameters() {
  const number = (id) => ($(id).value === "" ? null : Number($(id).value));
  const found = {
    temperature: number("temperature"), top_p: number("top_p"), max_tokens: number("max_tokens"), seed: number("seed"),
  };
  return Object.fromEntries(Object.entries(found).filter(([, value]) => value !== null));
}

function wire(message) {
  if (message.role === "assistant") return { role: "assistant", content: message.text };
  return {
    role: "user",
    content: [
      ...message.pictures.map((picture) => ({ type: "image_url", image_url: { url: picture.url } })),
      { type: "text", text: message.text },
    ],
  };
}

function dialogue(messages) {
  const system = $("system").value.trim();
  return {
    ...(state.model && { model: state.model }),
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages.map(wire)],
  };
}

const request = () => ({ ...dialogue(state.messages), ...parameters() });

// --- explaining ---

const picturesUpTo = (number) => state.messages.slice(0, number).flatMap((message) => message.pictures ?? []);

/** Show where an answer's words looked, or no longer. */
async function explain(message, node) {
  complain(null);
  if (!explained.delete(message)) {
    node.disabled = true;
    node.textContent = "Looking…";
    const body = dialogue(state.messages.slice(0, state.messages.indexOf(message) + 1));
    try {
      explained.set(message, await explanation(body, $("key").value));
    } catch (error) {
      complain(error.message);
    }
  }
  const number = state.messages.indexOf(message);
  if (number < 0) return; // it is gone meanwhile
  const before = $("messages").children[number], after = reply(message, number);
  before.replaceWith(after);
  after.querySelector(".explain")?.focus();
  if (explained.has(message)) say("Explained. Move over the words with Tab and the arrow keys.");
}

// --- writing ---

function clearComposer() {
  $("question").value = "";
  state.chosen = [];
  state.editing = null;
  showChosen();
  grow();
}

function edit(number) {
  if (busy()) state.stopper.abort();
  const message = state.messages[number];
  state.editing = number;
  state.chosen = [...message.pictures];
  $("question").value = message.text;
  showChosen();
  grow();
  $("question").focus();
}

function showChosen() {
  $("chosen").hidden = !state.chosen.length;
  $("chosen").replaceChildren(...state.chosen.map((picture, number) => element("li", {},
    element("img", { src: picture.url, alt: picture.name }),
    button("×", () => {
      state.chosen.splice(number, 1);
      showChosen();
      $("question").focus();
    }, `Remove ${picture.name}`))));
  $("editing").hidden = state.editing === null;
  showBusy();
}

function grow() {
  const field = $("question");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
  showBusy();
}

async function add(files) {
  complain(null);
  for (const file of files) {
    try {
      state.chosen.push(await read(file));
    } catch (error) {
      complain(error.message);
    }
  }
  showChosen();
  $("question").focus();
}

async function tryExample(name, title, text) {
  if (busy()) return;
  const blob = await (await fetch(`/page/examples/${name}.jpg`)).blob();
  state.chosen = [await read(new File([blob], `${title}.jpg`, { type: "image/jpeg" }))];
  $("question").value = text;
  await send();
}

// --- keeping and taking away ---

const remember = () => saveConversation({ messages: state.messages });

async function copy(text, node) {
  const before = node.textContent;
  try {
    await navigator.clipboard.writeText(text);
    node.textContent = "Copied";
    say("Copied.");
  } catch {
    node.textContent = "Not allowed here"; // browsers give the clipboard to https and localhost alone
  }
  setTimeout(() => { node.textContent = before; }, 1500);
}

function markdown(withPictures) {
  const parts = state.messages.map((message) => {
    const shown = (message.pictures ?? [])
      .map((picture) => (withPictures ? `![${picture.name}](${picture.url})\n\n` : `[${picture.name}]\n\n`)).join("");
    return `**${message.role === "user" ? "You" : state.model ?? "Model"}**\n\n${shown}${message.text}\n`;
  });
  return parts.join("\n");
}

function save(name, kind, text) {
  const url = URL.createObjectURL(new Blob([text], { type: kind }));
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
  $("menu").open = false;
}

async function begin() {
  state.stopper?.abort();
  state.stopper = null;
  state.messages = [];
  clearComposer();
  complain(null);
  showMessages();
  showAway(null);
  $("question").focus();
  await remember();
}

// --- beginning ---

function wireUp() {
  $("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  $("fields").addEventListener("submit", (event) => event.preventDefault());
  $("question").addEventListener("input", grow);
  $("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  });
  $("stop").addEventListener("click", () => { state.stopper?.abort(); $("question").focus(); });
  $("choose").addEventListener("click", () => $("files").click());
  $("photograph").addEventListener("click", () => $("camera").click());
  for (const id of ["files", "camera"]) {
    $(id).addEventListener("change", async (event) => { await add([...event.target.files]); event.target.value = ""; });
  }
  $("cancel-edit").addEventListener("click", () => { clearComposer(); $("question").focus(); });
  $("new").addEventListener("click", begin);
  $("copy-all").addEventListener("click", (event) => copy(markdown(false), event.target));
  $("save-markdown").addEventListener("click", () => save("conversation.md", "text/markdown", markdown(true)));
  $("save-json").addEventListener("click", () =>
    save("conversation.json", "application/json", JSON.stringify(request(), null, 2)));
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    if ($("menu").open) { $("menu").open = false; $("menu").querySelector("summary").focus(); }
    else if (busy()) state.stopper.abort();
    else if (state.editing !== null) clearComposer();
  });
  document.addEventListener("click", (event) => { if (!$("menu").contains(event.target)) $("menu").open = false; });
  document.addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])].filter((file) => file.type.startsWith("image/"));
    if (files.length) { event.preventDefault(); add(files); }
  });
  let depth = 0; // dragenter and dragleave come in pairs, one for each element on the way
  const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");
  document.addEventListener("dragenter", (event) => { if (holdsFiles(event)) { depth += 1; $("drop").hidden = false; } });
  document.addEventListener("dragleave", (event) => {
    if (holdsFiles(event)) { depth -= 1; $("drop").hidden = depth > 0 ? false : true; }
  });
  document.addEventListener("dragover", (event) => { if (holdsFiles(event)) event.preventDefault(); });
  document.addEventListener("drop", (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    depth = 0;
    $("drop").hidden = true;
    add([...event.dataTransfer.files]);
  });
  $("theme").addEventListener("click", () => {
    const dark = getComputedStyle(document.documentElement).colorScheme === "dark";
    saveChoice("theme", document.documentElement.dataset.theme = dark ? "light" : "dark");
  });
  for (const id of FIELDS) {
    const field = $(id);
    field.value = loadChoice(id) ?? field.value;
    const shown = $(`${id}-shown`);
    const show = () => { if (shown) shown.textContent = field.value; };
    show();
    field.addEventListener("input", () => { show(); saveChoice(id, field.value); });
  }
  $("examples").append(...EXAMPLES.map(([name, title, text]) => element("li", {},
    element("button", { type: "button", onclick: () => tryExample(name, title, text) },
      element("img", { src: `/page/examples/${name}.jpg`, alt: title, width: 400, height: 300 }),
      element("span", {}, text)))));
}

async function meet() {
  for (let wait = 1; ; wait = Math.min(1.6 * wait, LONGEST_WAIT)) {
    try {
      [state.model] = await models($("key").value);
      $("model").textContent = state.model;
      if (!busy()) showAway(null);
      return;
    } catch (error) {
      if (error instanceof Refused) { if (error.status === 401) askForKey(); return; }
      showAway("The server is away; trying again.");
    }
    await new Promise((resolve) => setTimeout(resolve, wait * 1000));
  }
}

async function start() {
  const theme = loadChoice("theme");
  if (theme) document.documentElement.dataset.theme = theme;
  wireUp();
  const kept = await loadConversation();
  state.messages = kept?.messages ?? [];
  const last = state.messages.at(-1);
  const unfinished = last?.role === "assistant" && last.finish === null && !last.error;
  if (unfinished) state.messages.pop(); // the page was closed while its answer was on its way
  showMessages();
  showBusy();
  if (state.messages.length) toEnd();
  else $("question").focus();
  document.body.dataset.ready = "true";
  navigator.serviceWorker?.register("/sw.js").catch(() => {});
  const met = meet();
  if (unfinished) respond();
  $("key").addEventListener("change", meet);
  await met;
}

start();
