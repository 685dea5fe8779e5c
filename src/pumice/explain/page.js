// An explanation to look at: `mount(element, data, sources)` builds it inside `element`.
//
// data: what pumice.serve.explanation.explanation_json gives. sources: addresses of the pictures, in order, where
// data holds none. The script fetches nothing and keeps nothing; the element needs page.css.

const element = (name, properties = {}, children = []) => {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
};

const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

// Rows of numbers as uint8, each with a scale of its own: a function from a row's number to Float32Array.
const unpack = ({ values, scales, width }) => {
  const packed = bytes(values);
  const scale = new Float32Array(bytes(scales).buffer);
  return (row) => {
    const found = new Float32Array(width);
    for (let i = 0; i < width; i++) found[i] = packed[row * width + i] * scale[row];
    return found;
  };
};

// Spread each token's weight evenly over its box, in cells of a w x h grid; boxes are shares of the picture.
export const paint = (weights, boxes, [w, h]) => {
  const heat = new Float32Array(w * h);
  for (let n = 0; n < weights.length; n++) {
    const [left, top, right, bottom] = [boxes[4 * n] * w, boxes[4 * n + 1] * h, boxes[4 * n + 2] * w,
      boxes[4 * n + 3] * h];
    const area = (right - left) * (bottom - top);
    if (!(area > 0) || !weights[n]) continue;
    for (let y = Math.max(0, Math.floor(top)); y < Math.min(h, Math.ceil(bottom)); y++) {
      const tall = Math.min(bottom, y + 1) - Math.max(top, y);
      for (let x = Math.max(0, Math.floor(left)); x < Math.min(w, Math.ceil(right)); x++) {
        heat[y * w + x] += weights[n] * tall * (Math.min(right, x + 1) - Math.max(left, x)) / area;
      }
    }
  }
  return heat;
};

// The boxes of side x side equal regions, row by row.
const regions = (side) => Float32Array.from({ length: 4 * side * side }, (_, i) => {
  const region = i >> 2, edge = i & 3; // left, top, right, bottom
  return ((edge % 2 ? Math.floor(region / side) : region % side) + (edge > 1 ? 1 : 0)) / side;
});

const percent = (value) => `${(100 * value).toFixed(value < 0.1 ? 1 : 0)} %`;
const signed = (value) => (value < 0 ? '−' : '+') + Math.abs(value).toFixed(2);

export const mount = (root, data, sources = []) => {
  root.classList.add('px');
  const words = data.words;
  const methods = Object.fromEntries(data.methods.map((m) => [m.name, { ...m, row: m.weights && unpack(m.weights) }]));
  const raw = data.attention && unpack(data.attention.packed);
  const state = { method: data.method, low: 0, high: data.layers - 1, head: '', tint: 'grey', hovered: -1, pinned: -1 };

  // The weights of a word over all image tokens, summing to 1.
  const weigh = (word) => {
    let found;
    if (methods[state.method]) {
      found = methods[state.method].row(word);
    } else {
      const { heads } = data.attention;
      found = new Float32Array(data.tokens);
      for (let layer = state.low; layer <= state.high; layer++) {
        for (let head = 0; head < heads; head++) {
          if (state.head !== '' && head !== Number(state.head)) continue;
          raw((word * data.layers + layer) * heads + head).forEach((value, n) => { found[n] += value; });
        }
      }
    }
    const whole = found.reduce((a, b) => a + b, 0) || 1;
    return found.map((value) => value / whole);
  };

  const pictures = data.pictures.map((picture, number) => {
    const canvas = element('canvas', { width: picture.grid[0], height: picture.grid[1] });
    canvas.setAttribute('aria-hidden', 'true');
    const name = data.pictures.length > 1 ? `picture ${number + 1}` : 'the picture';
    const image = element('img', { src: picture.source || sources[number] || '', alt: `${name}, as the question shows it` });
    if (picture.width > 12 * picture.height || picture.height > 12 * picture.width) {
      // so thin that nothing could be seen: stretched, and said
      image.style.cssText = picture.width > picture.height ? 'height:3rem' : 'width:3rem;height:60vh';
    }
    const caption = element('figcaption');
    const figure = element('figure', { className: 'px-picture' },
      [element('div', { className: 'px-frame' }, [image, canvas]), caption]);
    if (image.style.cssText) figure.firstChild.style.width = picture.width > picture.height ? '' : '3rem';
    const boxes = new Float32Array(bytes(picture.boxes).buffer);
    return { ...picture, canvas, caption, figure, boxes, name, pixels: canvas.getContext('2d') };
  });

  const draw = () => {
    const word = state.hovered >= 0 ? state.hovered : state.pinned;
    for (const [number, span] of spans.entries()) span.classList.toggle('px-on', number === word);
    const weights = word < 0 || state.method === 'occlusion' ? null : weigh(word);
    const lost = word < 0 || weights ? null : pictures.map((p) => p.occlusion[word].flat());
    // One scale for all pictures, so that the brightest is where the word looked most.
    const heats = weights ? pictures.map((p) => paint(weights.subarray(...p.tokens), p.boxes, p.grid))
      : lost && pictures.map((p, n) =>
        paint(lost[n].map((nats) => Math.max(nats, 0)), regions(p.occlusion[word].length), p.grid));
    const most = heats && Math.max(...heats.map((heat, n) => Math.max(...heat) * heat.length), 1e-9);
    for (const [number, picture] of pictures.entries()) {
      const [w, h] = picture.grid;
      picture.pixels.clearRect(0, 0, w, h);
      picture.caption.textContent = '';
      if (!heats) continue;
      const heat = heats[number], shown = picture.pixels.createImageData(w, h);
      let inside = 0;
      for (let i = 0; i < heat.length; i++) {
        inside += heat[i];
        const level = heat[i] * heat.length / most;
        shown.data.set([255, Math.round(235 * level), Math.round(60 * level), Math.round(205 * level)], 4 * i);
      }
      picture.pixels.putImageData(shown, 0, 0);
      if (lost) {
        picture.caption.textContent = `when one region of ${picture.name} is blank, “${words[word].text}” is at most ` +
          picture.occlusion_said[word];
        continue;
      }
      const given = weights.subarray(...picture.tokens).reduce((a, b) => a + b, 0);
      picture.caption.textContent = `${percent(inside)} of the heat of “${words[word].text}” in ${picture.name}` +
        (given - inside > 0.005 ? `, ${percent(given - inside)} beside it (padding, line ends)` : '');
    }
    tell(word);
  };

  const facts = element('dl', { className: 'px-facts' });
  facts.setAttribute('aria-live', 'polite');
  const numbers = element('dl', { className: 'px-facts' });
  const fill = (list, rows) => list.replaceChildren(...rows.flatMap(([name, value]) =>
    [element('dt', { textContent: name }), element('dd', { textContent: value })]));
  const tell = (number) => {
    const word = words[number];
    // One comparison at a time: with a blank picture, unless another was chosen.
    const other = state.tint === 'dropped' ? 'dropped' : 'grey';
    const when = other === 'grey' ? 'when the picture is blank' : 'when no picture is shown';
    fill(facts, !word ? [['word', 'point at a word, or move with Tab and the arrow keys; Enter keeps one']] : [
      ['word', `“${word.text}”`], [when, word[`${other}_said`]],
    ]);
    fill(numbers, !word ? [] : [
      ['probability', percent(Math.exp(word.shown))],
      [when, `${percent(Math.exp(word[other]))} (${signed(word[other] - word.shown)} nats)`],
      ['attention on the picture', percent(word.share)],
    ]);
  };

  let waiting = false;
  const later = () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; draw(); });
  };

  const answer = element('p', { className: 'px-answer' });
  answer.setAttribute('aria-label', 'the answer, word by word');
  let end = 0;
  const spans = words.map((word, number) => {
    const span = element('span', { className: 'px-word', textContent: word.text, tabIndex: number ? -1 : 0 });
    span.setAttribute('role', 'button');
    span.setAttribute('aria-pressed', 'false');
    span.dataset.number = number;
    answer.append(data.answer.slice(end, word.start), span);
    end = word.end;
    return span;
  });
  answer.append(data.answer.slice(end));
  if (!words.length) answer.textContent = '(The answer is empty: there is no word to explain.)';

  const at = (event) => event.target.closest?.('.px-word')?.dataset.number;
  const hover = (event) => { state.hovered = Number(at(event) ?? -1); later(); };
  const pin = (number) => {
    state.pinned = state.pinned === number ? -1 : number;
    spans.forEach((span, n) => span.setAttribute('aria-pressed', String(n === state.pinned)));
    later();
  };
  answer.addEventListener('pointerover', hover);
  answer.addEventListener('pointerleave', () => { state.hovered = -1; later(); });
  answer.addEventListener('focusin', hover);
  answer.addEventListener('focusout', () => { state.hovered = -1; later(); });
  answer.addEventListener('click', (event) => { if (at(event)) pin(Number(at(event))); });
  answer.addEventListener('keydown', (event) => {
    const number = Number(at(event) ?? -1);
    if (number < 0) return;
    const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
    if (event.key === 'Enter' || event.key === ' ') pin(number);
    else if (event.key === 'Escape') pin(state.pinned);
    else if (event.key === 'Home' || event.key === 'End' || steps[event.key]) {
      const next = event.key === 'Home' ? 0 : event.key === 'End' ? words.length - 1 : number + steps[event.key];
      const span = spans[Math.min(Math.max(next, 0), words.length - 1)];
      for (const other of spans) other.tabIndex = -1;
      span.tabIndex = 0;
      span.focus();
    } else return;
    event.preventDefault();
  });

  const tint = () => words.forEach((word, n) => {
    const lean = state.tint === 'share' ? word.share / Math.max(...words.map((w) => w.share), 1e-9)
      : Math.min(Math.max(word.shown - word[state.tint], 0) / 3, 1); // 3 nats: twenty times less likely
    spans[n].style.setProperty('--px-lean', lean.toFixed(3));
  });

  const select = (choices, value, change) => {
    const made = element('select', { onchange: () => { change(made.value); } },
      choices.map(([key, text]) => element('option', { value: key, textContent: text, selected: key === value })));
    return made;
  };
  const number = (value, change) => {
    const made = element('input', { type: 'number', min: 0, max: data.layers - 1, value, oninput: () => {
      if (made.validity.valid && made.value !== '') { change(Number(made.value)); later(); }
    } });
    return made;
  };
  const label = (text, ...children) => element('label', {}, [text, ...children]);
  const note = element('p', { className: 'px-note' });
  const low = number(0, (value) => { state.low = value; });
  const high = number(data.layers - 1, (value) => { state.high = value; });
  const heads = data.attention?.heads > 1 ? data.attention.heads : 0;
  const head = select([['', 'all'], ...Array.from({ length: heads }, (_, n) => [String(n), String(n)])], '',
    (value) => { state.head = value; later(); });
  const choose = (value) => {
    state.method = value;
    for (const control of [low, high, head]) control.disabled = value !== 'raw';
    note.textContent = methods[value]?.text ?? (value === 'occlusion'
      ? 'What the word loses when a region of the picture is blank: slow to find out, but causal.' : 'Attention as it was, of the layers (counted from 0) and the head chosen here.');
    later();
  };
  const choices = data.methods.map((m) => [m.name, m.title]);
  if (pictures.every((p) => p.occlusion)) choices.push(['occlusion', 'what a blank region costs']);
  if (raw) choices.push(['raw', 'layers and heads by hand']);
  const controls = element('div', { className: 'px-controls' }, [
    label('heat', select(choices, state.method, choose)),
    ...(raw ? [label('layers', low, '–', high)] : []),
    ...(heads ? [label('head', head)] : []),
    label('compare with', select([['grey', 'a blank picture'], ['dropped', 'no picture'],
      ['share', 'a blank picture; colour by attention']], 'grey', (value) => { state.tint = value; tint(); later(); })),
  ]);
  const how = element('details', { className: 'px-how' },
    [element('summary', { textContent: 'How this was found' }), numbers, controls, note]);
  const remarks = data.notes.map((text) => element('p', { className: 'px-note', textContent: text }));
  const said = element('div', {}, [
    element('p', { className: 'px-question', textContent: data.question }),
    answer,
    element('p', { className: `px-verdict${data.reliance.leans ? '' : ' px-not'}`, textContent: data.reliance.verdict }),
    ...(words.length ? [facts, how] : []), ...remarks,
  ]);
  root.replaceChildren(element('div', { className: 'px-both' },
    [element('div', { className: 'px-pictures' }, pictures.map((p) => p.figure)), said]));
  tint();
  choose(state.method);
  return { show: (word) => { state.hovered = word; draw(); } };
};
