// Draws the boxes of an answer on its picture.

const SVG = "http://www.w3.org/2000/svg";
const COLOURS = 6; // classes box-0 to box-5 of style.css
// Four numbers in brackets: the server says whether they are boxes, and where these lie.
// Blanks are few, as there: a search through many of them would take the page seconds.
const LIKE_BOXES =
  /[[(]\s{0,4}[\d.]+\s{0,4},\s{0,4}[\d.]+\s{0,4}(?:,|\)\s{0,4},?\s{0,4}\()\s{0,4}[\d.]+\s{0,4},\s{0,4}[\d.]+\s{0,4}[\])]/;

/** Return whether it is worth asking the server for the boxes of a text. */
export const mayHoldBoxes = (text) => LIKE_BOXES.test(text);

function element(name, attributes, text = "") {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return node;
}

/** Return a drawing of a picture {url, width, height} with boxes in shares of its sides. */
export function drawing(picture, boxes) {
  const { url, width, height } = picture;
  const labels = boxes.map((box, number) => box.label || `box ${number + 1}`);
  const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, class: "boxed", role: "img",
    "aria-label": `The picture with ${boxes.length === 1 ? "a box" : `${boxes.length} boxes`}: ${labels.join(", ")}` });
  const line = Math.max(width, height) / 200, letters = Math.max(width, height) / 30;
  svg.append(element("image", { href: url, width, height }));
  boxes.forEach((box, number) => {
    const x = box.left * width, y = box.top * height;
    const group = element("g", { class: `box-${number % COLOURS}` });
    group.append(element("title", {}, labels[number]));
    group.append(element("rect", { x, y, width: (box.right - box.left) * width, height: (box.bottom - box.top) * height,
      "stroke-width": line }));
    if (box.label) {
      const text = box.label.length > 40 ? `${box.label.slice(0, 39)}…` : box.label;
      // A box on the right has its label at its right edge, where there is room for it.
      const right = box.left + box.right > 1;
      group.append(element("text", { x: right ? box.right * width - line : x + line,
        "text-anchor": right ? "end" : "start", y: y > letters * 1.2 ? y - line * 1.5 : y + letters,
        "font-size": letters, "stroke-width": letters / 6 }, text));
    }
    svg.append(group);
  });
  return svg;
}
