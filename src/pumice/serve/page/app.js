// The chat page. Requests to the server are in api.js, storage in store.js.

import { answer, Away, boxesOf, explanation, healthy, models, Refused } from "/page/api.js";
import { drawing, mayHoldBoxes } from "/page/boxes.js";
import { mount } from "/page/explain.js";
import { render } from "/page/markdown.js";
import { readPicture } from "/page/pictures.js";
import { loadChoice, loadConversation, saveChoice, saveConversation } from "/page/store.js";

// A picture, what it shows, a question, and what the model that comes with Pumice says wrongly.
const EXAMPLES = [
  ["dog", "A dog in dry grass", "Where is the dog?"],
  ["kitten", "A kitten with a ball of wool", "What animal is this?"],
  ["musicians", "Musicians in a street", "What are these people doing?"],
  ["horses", "Horses in a meadow", "What animals are these?", "It takes them for cows."],
];
const LONGEST_WAIT = 10; // seconds between two tries to reach the server
const FIELDS = ["temperature", "top_p", "max_tokens", "seed", "system", "key"];

const $ = (id) => document.getElementById(id);
const state = {
  messages: [], // {role, text, pictures: [{url, name}]} and {role, text, finish, usage, seconds, error}
  chosen: [], // pictures of the next question
  editing: null, // the number of the question that the next one replaces
  model: null,
  maxPictures: null, // that the model knows from training; null: as many as fit
  controller: null, // an AbortController for the answer in progress
};
const explanations = new WeakMap(); // answer -> its explanation, while it is shown
const answerBoxes = new WeakMap(); // finished answer -> a promise of its boxes

// --- elements ---

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

const button = (text, onclick, label = text) =>
  element("button", { type: "button", "aria-label": label, onclick }, text);

function announce(text) {
  $("announce").textContent = ""; // screen readers announce changes only, also of an equal text
  setTimeout(() => { $("announce").textContent = text; }, 50);
}

function showProblem(text) {
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
  const answerNode = element("div", { class: "said" });
  node.append(answerNode);
  showText(node, message);
  if (explanations.has(message)) {
    answerNode.hidden = true; // the explanation shows the same words
    const explanationNode = element("div", { class: "explained" });
    mount(explanationNode, explanations.get(message), picturesUpTo(number).map((picture) => picture.url));
    node.append(explanationNode);
  }
  showBoxes(node, message, number);
  if (message.error) node.append(element("p", { class: "problem", role: "alert" }, message.error));
  if (message.finish === null && !message.error) {
    node.setAttribute("aria-busy", "true");
    return node;
  }
  const tools = element("div", { class: "tools" });
  if (message.text) tools.append(button("Copy", (event) => copy(message.text, event.target), "Copy the answer"));
  if (message.text && picturesUpTo(number).length) {
    tools.append(element("button", { type: "button", class: "explain", "aria-pressed": String(explanations.has(message)),
      title: "Point at a word: where it looked in the pictures", onclick: (event) => explain(message, event.target) },
    "Explain"));
  }
  if (number === state.messages.length - 1) {
    const word = message.error ? "Try again" : "Regenerate";
    tools.append(button(word, regenerate, `${word}: answer once more`));
  }
  const factsText = facts(message);
  if (factsText) tools.append(element("small", { title: detail(message) }, factsText));
  node.append(tools);
  return node;
}

/** Show an answer, or that one is on its way; `progress`: how much of the question is read. */
function showText(node, message, progress = null) {
  const textNode = node.querySelector(".said");
  if (message.text) render(textNode, message.text);
  else if (message.finish === null && !message.error) {
    textNode.replaceChildren(element("span", { class: "waiting", role: "img", "aria-label": "An answer is on its way" },
      element("i"), element("i"), element("i")));
    if (progress) {
      const [processed, total] = [progress.processed, progress.total].map((count) => count.toLocaleString());
      textNode.append(element("small", {}, `${processed} of ${total} tokens read`));
    }
  } else textNode.replaceChildren();
}

/** Draw the boxes of a finished answer on the picture that was shown last; ask the server for them once. */
async function showBoxes(node, message, number) {
  const pictures = picturesUpTo(number), picture = pictures.at(-1);
  if (message.finish === null || !picture?.width || !mayHoldBoxes(message.text)) return;
  if (!answerBoxes.has(message)) {
    // Without the server, an answer is complete without the drawing.
    answerBoxes.set(message, boxesOf(message.text, picture, pictures.length, $("key").value).catch(() => []));
  }
  const boxes = await answerBoxes.get(message);
  if (boxes.length) node.querySelector(".said").after(drawing(picture, boxes));
}

function facts(message) {
  const parts = [];
  if (message.finish === "stopped") parts.push("stopped");
  if (message.finish === "length") parts.push("cut at the token limit");
  const tokens = message.usage?.completion_tokens;
  if (tokens !== undefined) parts.push(tokens === 1 ? "1 token" : `${tokens} tokens`);
  if (message.seconds) parts.push(`${message.seconds.toFixed(1)} s`);
  return parts.join(" · ");
}

function detail(message) {
  if (!message.usage) return "";
  const { prompt_tokens: prompt, prompt_tokens_details: details } = message.usage;
  return `${prompt} tokens in the question, ${details?.cached_tokens ?? 0} of them from the cache`;
}

const atEnd = () => window.innerHeight + window.scrollY >= document.documentElement.scrollHeight - 120;
const toEnd = () => window.scrollTo({ top: document.documentElement.scrollHeight });

// --- requests ---

function busy() { return state.controller !== null; }

function showBusy() {
  $("send").hidden = busy();
  $("stop").hidden = !busy();
  $("send").disabled = !$("question").value.trim() && !state.chosen.length;
}

async function send() {
  if (busy()) return;
  const text = $("question").value.trim();
  if (!text && !state.chosen.length) return;
  showProblem(null);
  state.messages.length = staying();
  state.messages.push({
    role: "user",
    text: text || (state.chosen.length > 1 ? "Describe these pictures." : "Describe this picture."),
    pictures: state.chosen,
  });
  clearComposer();
  await respond();
}

/** How many messages stay before the next question. It replaces one that is edited, and must follow an answer, not an error. */
function staying() {
  const number = state.editing ?? state.messages.length, last = state.messages[number - 1];
  return last?.role === "assistant" && last.error && !last.text ? number - 2 : number;
}

async function regenerate() {
  if (busy()) return;
  if (state.messages.at(-1)?.role === "assistant") state.messages.pop();
  if (state.messages.length) await respond();
}

async function respond() {
  const answerMessage = { role: "assistant", text: "", finish: null };
  const body = requestBody();
  state.messages.push(answerMessage);
  const controller = state.controller = new AbortController();
  showMessages();
  showBusy();
  toEnd();
  await saveMessages();
  for (let pause = 1; answerMessage.finish === null && !answerMessage.error;) {
    try {
      await stream(body, answerMessage, controller.signal);
      pause = 1;
    } catch (error) {
      if (controller.signal.aborted) answerMessage.finish = "stopped";
      else if (error instanceof Away) {
        showAway(error.message);
        await waitForServer(error.wait ?? pause, error.wait === null, controller.signal);
        pause = Math.min(2 * pause, LONGEST_WAIT);
        if (controller.signal.aborted) answerMessage.finish = "stopped";
      } else {
        answerMessage.error = error instanceof Refused ? error.message : `Something went wrong in this page: ${error.message}`;
        if (error.status === 401) askForKey();
      }
    }
  }
  showAway(null);
  if (state.controller === controller) state.controller = null;
  if (!state.messages.includes(answerMessage)) return; // the user started a new conversation
  const follow = atEnd();
  showMessages();
  showBusy();
  if (follow) toEnd();
  announce(answerMessage.error ? "" : answerMessage.finish === "stopped" ? "Stopped." : answerMessage.text);
  await saveMessages();
}

async function stream(body, answerMessage, signal) {
  const started = performance.now();
  let isFirst = true, paintPending = false;
  const paint = (progress) => {
    paintPending = false;
    const node = $("messages").lastElementChild;
    if (!node || state.messages.at(-1) !== answerMessage || answerMessage.finish !== null) return;
    const follow = atEnd();
    showText(node, answerMessage, progress);
    if (follow) toEnd();
  };
  const result = await answer(body, {
    key: $("key").value,
    signal,
    onText: (text) => {
      if (isFirst) { answerMessage.text = ""; isFirst = false; showAway(null); } // drop text from before the connection was lost
      answerMessage.text += text;
      if (!paintPending) { paintPending = true; requestAnimationFrame(() => paint()); }
    },
    onProgress: (progress) => { if (isFirst && !answerMessage.text) paint(progress); },
  });
  if (isFirst) answerMessage.text = "";
  answerMessage.usage = result.usage;
  answerMessage.seconds = (performance.now() - started) / 1000;
  answerMessage.finish = result.finish ?? "stop";
}

/** Wait for some seconds; with `poll`, until the server answers its health check. */
async function waitForServer(seconds, poll, signal) {
  for (let wait = seconds; !signal.aborted; wait = Math.min(1.6 * wait, LONGEST_WAIT)) {
    await new Promise((resolve) => {
      const timer = setTimeout(resolve, wait * 1000);
      signal.addEventListener("abort", () => { clearTimeout(timer); resolve(); }, { once: true });
    });
    if (signal.aborted || !poll || await healthy()) return;
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
  const fields = {
    temperature: number("temperature"), top_p: number("top_p"), max_tokens: number("max_tokens"), seed: number("seed"),
  };
  return Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== null));
}

function apiMessage(message) {
  if (message.role === "assistant") return { role: "assistant", content: message.text };
  return {
    role: "user",
    content: [
      ...message.pictures.map((picture) => ({ type: "image_url", image_url: { url: picture.url } })),
      { type: "text", text: message.text },
    ],
  };
}

function chatBody(messages) {
  const system = $("system").value.trim();
  return {
    ...(state.model && { model: state.model }),
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages.map(apiMessage)],
  };
}

const requestBody = () => ({ ...chatBody(state.messages), ...parameters() });

// --- explanations ---

const picturesUpTo = (number) => state.messages.slice(0, number).flatMap((message) => message.pictures ?? []);

/** Show the explanation of an answer, or hide it again. */
async function explain(message, node) {
  showProblem(null);
  if (!explanations.delete(message)) {
    node.disabled = true;
    node.textContent = "Looking…";
    const body = chatBody(state.messages.slice(0, state.messages.indexOf(message) + 1));
    try {
      explanations.set(message, await explanation(body, $("key").value));
    } catch (error) {
      showProblem(error.message);
    }
  }
  const number = state.messages.indexOf(message);
  if (number < 0) return; // the user started a new conversation
  const before = $("messages").children[number], after = reply(message, number);
  before.replaceWith(after);
  after.querySelector(".explain")?.focus();
  if (explanations.has(message)) announce("Explained. Move over the words with Tab and the arrow keys.");
}

// --- the next question ---

function clearComposer() {
  $("question").value = "";
  state.chosen = [];
  state.editing = null;
  showChosen();
  fitHeight();
}

function edit(number) {
  if (busy()) state.controller.abort();
  const message = state.messages[number];
  state.editing = number;
  state.chosen = [...message.pictures];
  $("question").value = message.text;
  showChosen();
  fitHeight();
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
  const shown = picturesUpTo(staying()).length + state.chosen.length;
  $("many").hidden = !state.chosen.length || !state.maxPictures || shown <= state.maxPictures;
  $("many").textContent = `This conversation will show ${shown} pictures. As far as the model's folder says, it learned from `
    + `${state.maxPictures} at a time: answers may be poor.`;
  showBusy();
}

function fitHeight() {
  const field = $("question");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
  showBusy();
}

async function add(files) {
  showProblem(null);
  for (const file of files) {
    try {
      const picture = await readPicture(file); // meanwhile a question may be sent, with what was chosen by then
      state.chosen.push(picture);
    } catch (error) {
      showProblem(error.message);
    }
  }
  showChosen();
  $("question").focus();
}

async function tryExample(name, title, text) {
  if (busy()) return;
  const blob = await (await fetch(`/page/examples/${name}.jpg`)).blob();
  state.chosen = [await readPicture(new File([blob], `${title}.jpg`, { type: "image/jpeg" }))];
  $("question").value = text;
  await send();
}

// --- copies and downloads ---

const saveMessages = () => saveConversation({ messages: state.messages });

async function copy(text, node) {
  const before = node.textContent;
  try {
    await navigator.clipboard.writeText(text);
    node.textContent = "Copied";
    announce("Copied.");
  } catch {
    node.textContent = "Not allowed here"; // browsers allow the clipboard on https and localhost only
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

function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
  $("menu").open = false;
}

async function newConversation() {
  state.controller?.abort();
  state.controller = null;
  state.messages = [];
  clearComposer();
  showProblem(null);
  showMessages();
  showAway(null);
  $("question").focus();
  await saveMessages();
}

// --- start ---

function addListeners() {
  $("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  $("fields").addEventListener("submit", (event) => event.preventDefault());
  $("question").addEventListener("input", fitHeight);
  $("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  });
  $("stop").addEventListener("click", () => { state.controller?.abort(); $("question").focus(); });
  $("choose").addEventListener("click", () => $("files").click());
  $("photograph").addEventListener("click", () => $("camera").click());
  for (const id of ["files", "camera"]) {
    $(id).addEventListener("change", async (event) => { await add([...event.target.files]); event.target.value = ""; });
  }
  $("cancel-edit").addEventListener("click", () => { clearComposer(); $("question").focus(); });
  $("new").addEventListener("click", newConversation);
  $("copy-all").addEventListener("click", (event) => copy(markdown(false), event.target));
  $("save-markdown").addEventListener("click", () => download("conversation.md", "text/markdown", markdown(true)));
  $("save-json").addEventListener("click", () =>
    download("conversation.json", "application/json", JSON.stringify(requestBody(), null, 2)));
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    if ($("menu").open) { $("menu").open = false; $("menu").querySelector("summary").focus(); }
    else if (busy()) state.controller.abort();
    else if (state.editing !== null) clearComposer();
  });
  document.addEventListener("click", (event) => { if (!$("menu").contains(event.target)) $("menu").open = false; });
  document.addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])].filter((file) => file.type.startsWith("image/"));
    if (files.length) { event.preventDefault(); add(files); }
  });
  let depth = 0; // each element under the pointer sends its own dragenter and dragleave
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
  $("examples").append(...EXAMPLES.map(([name, title, text, mistake]) => element("li", {},
    element("button", { type: "button", onclick: () => tryExample(name, title, text) },
      element("img", { src: `/page/examples/${name}.jpg`, alt: title, width: 400, height: 300 }),
      element("span", {}, text),
      ...(mistake ? [element("small", { class: "mistake", hidden: true }, mistake)] : [])))));
}

// Say what the model that comes with Pumice knows, and which example it gets wrong.
function tellLimits(isBuiltIn) {
  for (const mistake of document.querySelectorAll(".mistake")) mistake.hidden = !isBuiltIn;
  $("knows").hidden = !isBuiltIn;
}

async function connect() {
  for (let wait = 1; ; wait = Math.min(1.6 * wait, LONGEST_WAIT)) {
    try {
      const [card] = await models($("key").value);
      state.model = card.id;
      state.maxPictures = card.max_pictures;
      $("model").textContent = state.model;
      tellLimits(card.built_in);
      showChosen();
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
  addListeners();
  const stored = await loadConversation();
  state.messages = stored?.messages ?? [];
  const last = state.messages.at(-1);
  const unfinished = last?.role === "assistant" && last.finish === null && !last.error;
  if (unfinished) state.messages.pop(); // the page was closed during this answer: ask for it again below
  showMessages();
  showBusy();
  if (state.messages.length) toEnd();
  else $("question").focus();
  document.body.dataset.ready = "true";
  navigator.serviceWorker?.register("/sw.js").catch(() => {});
  const connected = connect();
  if (unfinished) respond();
  $("key").addEventListener("change", connect);
  await connected;
}

start();
