// Renders the Markdown that models usually write. Text is never parsed as HTML.

const INLINE = /(`[^`\n]+`)|(\*\*[^*\n]+\*\*)|(\*[^*\s][^*\n]*\*)/;

function inline(parent, text) {
  for (const part of text.split(INLINE)) {
    if (!part) continue;
    const [tag, markLength] = part.length > 2 && part.startsWith("`") && part.endsWith("`") ? ["code", 1]
      : part.length > 4 && part.startsWith("**") && part.endsWith("**") ? ["strong", 2]
      : part.length > 2 && part.startsWith("*") && part.endsWith("*") && part[1] !== "*" ? ["em", 1] : [null, 0];
    if (!tag) { parent.append(part); continue; }
    const element = document.createElement(tag);
    element.textContent = part.slice(markLength, -markLength);
    parent.append(element);
  }
}

/** Replace the content of an element with the rendered text. */
export function render(element, text) {
  const fragment = document.createDocumentFragment();
  let list = null, paragraph = null, code = null;
  const close = () => { list = paragraph = null; };
  for (const line of text.split("\n")) {
    if (code) {
      if (/^\s*```\s*$/.test(line)) code = null;
      else code.textContent += (code.textContent ? "\n" : "") + line;
      continue;
    }
    const item = /^\s*(?:([-*•])|(\d{1,3})[.)])\s+(.*)$/.exec(line);
    const heading = /^#{1,6}\s+(.*)$/.exec(line);
    if (/^\s*```/.test(line)) {
      close();
      const block = document.createElement("pre");
      code = document.createElement("code");
      block.append(code);
      fragment.append(block);
    } else if (item) {
      const kind = item[1] ? "ul" : "ol";
      if (!list || list.localName !== kind) {
        list = document.createElement(kind);
        if (item[2] && item[2] !== "1") list.start = Number(item[2]);
        fragment.append(list);
      }
      paragraph = null;
      const entry = document.createElement("li");
      inline(entry, item[3]);
      list.append(entry);
    } else if (heading) {
      close();
      const title = document.createElement("h3");
      inline(title, heading[1]);
      fragment.append(title);
    } else if (!line.trim()) {
      close();
    } else {
      list = null;
      if (paragraph) paragraph.append(document.createElement("br"));
      else { paragraph = document.createElement("p"); fragment.append(paragraph); }
      inline(paragraph, line);
    }
  }
  element.replaceChildren(fragment);
}
