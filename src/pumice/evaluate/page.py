"""Build the HTML and SVG of a report page that loads nothing from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from pumice.webpage import head

STYLE = """
:root { color-scheme: light dark; --back: #fff; --fore: #1b1b1f; --soft: #55565e; --line: #d5d6dc;
  --card: #f5f5f8; --a: #0b57d0; --b: #b3541e; --c: #5b7083; --good: #0f6b36; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --back: #141418; --fore: #e6e6ea; --soft: #a9aab4;
  --line: #3a3b43; --card: #1e1f25; --a: #8ab4f8; --b: #f0a875; --c: #9fb3c4;
  --good: #7fd69f; --bad: #ffb4ab; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 75rem; padding: 1.5rem; background: var(--back); color: var(--fore);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; } h3 { font-size: 1.05rem; }
table { border-collapse: collapse; } caption { text-align: left; color: var(--soft); padding-bottom: .4rem; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
.scroll { overflow-x: auto; } .note, .soft { color: var(--soft); }
.partial { border: 2px solid var(--bad); padding: .5rem 1rem; } .partial, .bad { color: var(--bad); }
.good { color: var(--good); }
.bars { display: grid; grid-template-columns: minmax(8rem, 16rem) 1fr auto;
  gap: .2rem .8rem; align-items: center; }
.bar { background: var(--card); border: 1px solid var(--line); height: 1rem; }
.bar i { display: block; height: 100%; background: var(--a); }
.controls { display: flex; flex-wrap: wrap; gap: .6rem 1.2rem; align-items: center; margin: 1rem 0; }
select, input { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
  padding: .2rem .4rem; }
:focus-visible { outline: 3px solid var(--a); outline-offset: 2px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)); gap: 1rem; padding: 0;
  list-style: none; }
.cards li { background: var(--card); border: 1px solid var(--line); padding: .8rem; }
.cards img { max-width: 100%; max-height: 14rem; display: block; margin-bottom: .5rem; }
.cards dl { margin: 0; } .cards dt { color: var(--soft); font-size: .85rem; } .cards dd { margin: 0 0 .4rem;
  white-space: pre-wrap; }
[hidden] { display: none !important; }
svg text { fill: var(--fore); font: 12px system-ui, sans-serif; }
"""

SCRIPT = """
const show = () => {
  const kind = document.getElementById('kind').value, part = document.getElementById('part').value;
  const words = document.getElementById('words').value.toLowerCase();
  let shown = 0;
  for (const card of document.querySelectorAll('.cards li')) {
    const fits = (!kind || card.dataset.kind === kind) && (!part || card.dataset.part === part) &&
      (!words || card.textContent.toLowerCase().includes(words));
    card.hidden = !fits; shown += fits;
  }
  document.getElementById('count').textContent = shown + ' shown';
};
for (const id of ['kind', 'part', 'words']) document.getElementById(id).addEventListener('input', show);
show();
"""


def document(title: str, body: str, *, script: bool) -> str:
    """Return a whole page. `body` is HTML; `title` is text."""
    end = f"<script>{SCRIPT}</script>" if script else ""
    return f"{head(title, STYLE)}<body><main><h1>{escape(title)}</h1>\n{body}\n</main>{end}</body></html>\n"


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of texts; the first cell of each row is its heading."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    lines = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(c)}</td>" for c in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def bars(cells: Mapping[str, tuple[float, str]], full_scale: float) -> str:
    """Return horizontal bars: name -> (value, text behind the bar). full_scale: the value of a full bar."""
    rows = []
    for name, (value, text) in cells.items():
        width = 0.0 if full_scale <= 0 else max(0.0, min(100.0, 100 * value / full_scale))
        rows.append(
            f'<span>{escape(name)}</span><span class="bar" aria-hidden="true">'
            f'<i style="width:{width:.1f}%"></i>'
            f"</span><span>{escape(text)}</span>"
        )
    return f'<div class="bars">{"".join(rows)}</div>'


def radar(axes: Sequence[str], shapes: Mapping[str, Sequence[float | None]], size: int = 460) -> str:
    """Return an SVG with a polygon per name; values run from 0 (the middle) to 1.

    A value of None leaves a gap in the outline, because it is not a zero. Empty for fewer than three axes.
    """
    if len(axes) < 3:
        return ""
    middle, radius = size / 2, size / 2 - 80  # the margin holds the names of the axes

    def point(number: int, value: float) -> tuple[float, float]:
        angle = 2 * math.pi * number / len(axes) - math.pi / 2
        return middle + radius * value * math.cos(angle), middle + radius * value * math.sin(angle)

    def polygon(values: Sequence[float]) -> str:
        return " ".join("{:.1f},{:.1f}".format(*point(n, value)) for n, value in enumerate(values))

    # 1. Draw rings, axes and the scale.
    parts = [
        f'<polygon points="{polygon([ring] * len(axes))}" fill="none" stroke="var(--line)"/>'
        for ring in (0.25, 0.5, 0.75, 1.0)
    ]
    for number, axis in enumerate(axes):
        x, y = point(number, 1.0)
        parts.append(f'<line x1="{middle}" y1="{middle}" x2="{x:.1f}" y2="{y:.1f}" stroke="var(--line)"/>')
        x, y = point(number, 1.12)
        anchor = "middle" if abs(x - middle) < 20 else "start" if x > middle else "end"
        parts.append(f'<text x="{x:.1f}" y="{y + 4:.1f}" text-anchor="{anchor}">{escape(axis)}</text>')
    parts += [
        f'<text x="{middle + 3}" y="{middle - radius * ring - 3:.1f}" opacity=".6">{100 * ring:.0f}</text>'
        for ring in (0.25, 0.5, 0.75)
    ]
    # 2. Draw each model. Dashes tell the outlines apart without colour.
    dashes = ("", "6 4", "2 3")
    for number, (name, values) in enumerate(shapes.items()):
        known = {n: max(0.0, min(1.0, value)) for n, value in enumerate(values) if value is not None}
        color = f"var(--{'abc'[number % 3]})"
        style = f'stroke="{color}" stroke-width="2" stroke-dasharray="{dashes[number % 3]}"'
        if len(known) == len(axes):
            opacity = 0.15 if number == 0 else 0
            outline = f'<polygon points="{polygon(list(known.values()))}" fill-opacity="{opacity}"/>'
        else:
            pairs = ((n, (n + 1) % len(axes)) for n in known)
            ends = (point(a, known[a]) + point(b, known[b]) for a, b in pairs if b in known)
            lines = " ".join("M{:.1f} {:.1f}L{:.1f} {:.1f}".format(*end) for end in ends)
            dots = (point(n, value) for n, value in known.items())
            outline = f'<path d="{lines}"/>' + "".join(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2"/>' for x, y in dots
            )
        parts.append(f'<g fill="{color}" {style}><title>{escape(name)}</title>{outline}</g>')
        y = 18 + 18 * number
        parts.append(
            f'<line x1="8" y1="{y - 4}" x2="36" y2="{y - 4}" stroke="{color}" stroke-width="2" '
            f'stroke-dasharray="{dashes[number % 3]}"/><text x="42" y="{y}">{escape(name)}</text>'
        )
    # 3. Write all values into the label, for readers who cannot see the drawing.
    description = "; ".join(
        f"{name}: "
        + ", ".join(f"{a} {'-' if v is None else f'{v:.2f}'}" for a, v in zip(axes, vs, strict=True))
        for name, vs in shapes.items()
    )
    return (
        f'<svg viewBox="0 0 {size} {size}" width="{size}" style="max-width:100%" role="img" '
        f'aria-label="Radar of the headlines. {escape(description)}">{"".join(parts)}</svg>'
    )
