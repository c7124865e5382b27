"""The style sheet of the page, and the script that shows a token's card. Neither depends on any text."""

from collections.abc import Iterable

from midskip.report import heat_style, kinds_style, palette


def style(layers: Iterable[int]) -> str:
    """For runs of these numbers of layers."""
    shades = "".join(
        f".l{num_layers} .d{blocks}{{background:{shade.background};color:{shade.ink}}}\n"
        for num_layers in sorted(set(layers))
        for blocks, shade in enumerate(palette(num_layers))
    )
    return _SHEET + heat_style() + kinds_style() + shades


_SHEET = """
.gradio-container{--font:system-ui,sans-serif;--ms-soft:#5d5d68;max-width:100rem!important}
.dark .gradio-container,.gradio-container.dark,.dark{--ms-soft:#a9a9b6}
.ms-text{white-space:pre-wrap;tab-size:4;font-size:1.05rem;line-height:1.8;overflow-wrap:anywhere;
padding:.3rem;max-height:60vh;overflow-y:auto;border:1px solid var(--border-color-primary);border-radius:8px;
unicode-bidi:isolate}
.ms-window{content-visibility:auto;contain-intrinsic-size:auto 20rem}
.ms-window[data-from]::before{content:attr(data-from);display:block;font:.75rem/1.4 system-ui,sans-serif;
color:var(--ms-soft);border-top:1px dashed;margin-top:.5rem}
.ms b{font-weight:400;padding:.12em 0;border-radius:3px;box-shadow:inset 0 0 0 .5px var(--background-fill-primary);
-webkit-box-decoration-break:clone;box-decoration-break:clone;cursor:pointer}
.ms b:hover,.ms b:focus,.ms b.ms-on{outline:2px solid var(--body-text-color);outline-offset:1px}
.ms u,.ms s{text-decoration:none;opacity:.6;color:inherit!important}
.ms u::before{content:"↵"}
.ms s::before{content:"·"}
.ms h4,.ms-picked h4{margin:1rem 0 .3rem;font-weight:600}
.ms-note,.ms-hint{color:var(--ms-soft);font-size:.85rem;margin:.2rem 0}
.ms-facts{display:flex;flex-wrap:wrap;gap:.4rem 1.6rem;margin:.2rem 0 .6rem}
.ms-facts dt{font-size:.8rem;color:var(--ms-soft)}
.ms-facts dd{margin:0;font-weight:600}
.ms-facts dd+dd{font-weight:400;font-size:.8rem;color:var(--ms-soft)}
.ms-legend{display:flex;flex-wrap:wrap;gap:2px;list-style:none;margin:.5rem 0;padding:0}
.ms-legend li{flex:1;min-width:2rem;text-align:center;font-size:.75rem;color:var(--ms-soft)}
.ms-legend span{display:block;font-weight:600;font-size:.85rem}
.ms-heat{overflow-x:auto}
.heat{display:block;width:100%;height:8rem}
.heat path{fill:none;stroke-width:1;shape-rendering:crispEdges}
.heat .line{stroke:#fff;stroke-width:2;vector-effect:non-scaling-stroke}
.kinds,.ms-picked table{border-collapse:collapse;font-size:.85rem;width:100%;border:0!important;
color:var(--body-text-color)}
.kinds tr,.ms-picked tr,.kinds :is(thead,tbody),.ms-picked :is(thead,tbody){border:0!important}
.kinds th,.kinds td,.ms-picked th,.ms-picked td{text-align:right;padding:.15rem .5rem;font-weight:400;
border:0!important;border-bottom:1px solid var(--border-color-primary)!important;white-space:nowrap;
color:var(--body-text-color)}
.kinds th:first-child,.ms-picked th:first-child{text-align:left}
.kinds th[title]{text-decoration:underline dotted;cursor:help}
.kinds .bar{width:40%}
.kinds svg{display:block;width:100%;height:.9rem;background:var(--background-fill-secondary)}
.ms-wide{overflow-x:auto;margin:.4rem 0}
.ms-picked q,.ms-card q{quotes:none;font-family:ui-monospace,monospace;white-space:pre-wrap;unicode-bidi:isolate;
border:1px solid var(--border-color-primary);border-radius:4px;padding:0 .25em}
.ms-card{position:fixed;z-index:1000;pointer-events:none;max-width:min(24rem,100vw - 2rem);padding:.5rem .8rem;
font:.85rem/1.45 system-ui,sans-serif;background:var(--background-fill-primary);color:var(--body-text-color);
border:1px solid var(--border-color-primary);border-radius:8px;box-shadow:0 4px 18px #0006}
.ms-card{--ms-soft:#5d5d68}
.dark .ms-card{--ms-soft:#a9a9b6}
.ms-card p{margin:.1rem 0}
.ms-card small{color:var(--ms-soft)}
.ms-card svg{display:block;background:var(--background-fill-secondary);margin:.15rem 0}
"""

# Runs once for each pane, with `element`, its root, and `trigger`. Texts are only ever put in by textContent.
SCRIPT = """
let raw = null, data = null, card = null, current = -1;
const SPACES = {' ': '\\u2423', '\\n': '\\u21b5', '\\t': '\\u21e5'};
function look() {
  const root = element.querySelector('.ms');
  const now = root ? root.dataset.look : undefined;
  if (now !== raw) { raw = now; data = now ? JSON.parse(now) : null; }
  return data;
}
function token(i) { return element.querySelector('b[data-i="' + i + '"]'); }
function line(text, tag) {
  const made = document.createElement(tag || 'p');
  made.textContent = text;
  card.append(made);
  return made;
}
function bars(values, top, title, mark) {
  const wide = Math.max(3, Math.min(14, Math.floor(260 / values.length))), high = 36;
  const ns = 'http://www.w3.org/2000/svg', svg = document.createElementNS(ns, 'svg');
  svg.setAttribute('width', wide * values.length);
  svg.setAttribute('height', high);
  values.forEach((value, at) => {
    const rect = document.createElementNS(ns, 'rect'), size = high * Math.min(value, top) / top;
    for (const [name, given] of [['x', at * wide], ['y', high - size], ['width', wide - 1], ['height', size],
      ['fill', '#21908c']]) rect.setAttribute(name, given);
    svg.append(rect);
  });
  if (mark) {
    const path = document.createElementNS(ns, 'path');
    path.setAttribute('d', 'M0 ' + high / 2 + 'h' + wide * values.length);
    path.setAttribute('stroke', 'currentColor');
    svg.append(path);
  }
  card.append(svg);
  line(title, 'small');
}
function shown(text) { return text.replace(/[ \\n\\t]/g, (one) => SPACES[one]) || '\\u2205'; }
function show(i, place) {
  const all = look();
  hide();
  if (!all || !(i in all.blocks)) return;
  card = document.createElement('div');
  card.className = 'ms-card';
  card.id = 'ms-card-' + (element.closest('[id]') || {}).id;
  card.setAttribute('role', 'tooltip');
  line(shown(all.text[i]), 'q');
  line((all.part[i] ? 'token ' + all.part[i] + ' of its text, ' : '') + all.blocks[i] + ' of ' + all.layers
    + ' blocks');
  if (all.loss[i] !== null) line('was predicted with ' + all.loss[i] + ' nats');
  if (all.next[i] !== null) line('predicts ' + shown(all.text[i + 1]) + ' with ' + all.next[i] + ' nats, rank '
    + all.rank[i] + ' of ' + all.vocabulary);
  line(all.flops[i] + ' FLOPs, about ' + all.time[i]);
  line('the time is the share, by FLOPs, of the pass that was measured', 'small');
  if (all.gates[i].length) bars(all.gates[i], 1, 'gate by layer, 0 to ' + (all.layers - 1), false);
  if (all.scores[i].length) bars(all.scores[i], 2, 'score by layer; from 1 (the line) on, the layer is skipped', true);
  document.body.append(card);
  const box = card.getBoundingClientRect();
  const below = place.bottom + 8 + box.height < window.innerHeight;
  card.style.top = Math.max(4, below ? place.bottom + 8 : place.top - box.height - 8) + 'px';
  card.style.left = Math.max(4, Math.min(place.left, window.innerWidth - box.width - 12)) + 'px';
}
function hide() { if (card) card.remove(); card = null; }
function at(event) {
  const found = event.target.closest ? event.target.closest('b[data-i]') : null;
  return found && element.contains(found) ? found : null;
}
function point(found) {
  current = Number(found.dataset.i);
  show(current, found.getClientRects()[0] || found.getBoundingClientRect());
}
element.addEventListener('pointerover', (event) => {
  const found = at(event);
  if (found) point(found);
});
element.addEventListener('pointerout', (event) => { if (at(event)) hide(); });
element.addEventListener('pointermove', (event) => {
  const heat = event.target.closest ? event.target.closest('.heat') : null, all = look();
  if (!heat || !all) return;
  const box = heat.getBoundingClientRect();
  const i = Math.min(all.blocks.length - 1, Math.max(0,
    Math.floor((event.clientX - box.left) / box.width * all.blocks.length)));
  show(i, {left: event.clientX, top: box.top, bottom: box.bottom});
});
element.addEventListener('pointerleave', hide);
element.addEventListener('mouseleave', hide);
document.addEventListener('scroll', () => {
  if (!card) return;
  const held = element.querySelector('.ms-text b:focus, .ms-text b:hover');
  if (held) point(held);
  else hide();
}, true);
element.addEventListener('click', (event) => {
  const found = at(event);
  if (!found || !look()) return;
  point(found);
  trigger('select', {index: current, value: current});
});
element.addEventListener('focusin', (event) => {
  const found = at(event);
  if (found) point(found);
  else if (event.target.classList.contains('ms-text') && event.target.matches(':focus-visible')) move(current);
});
element.addEventListener('focusout', hide);
function move(i) {
  const all = look();
  if (!all) return;
  i = Math.max(0, Math.min(all.blocks.length - 1, i));
  const found = token(i);
  if (!found) return;
  found.tabIndex = -1;
  found.focus();
  if (card) found.setAttribute('aria-describedby', card.id);
}
element.addEventListener('keydown', (event) => {
  if (!event.target.closest || !event.target.closest('.ms-text')) return;
  const steps = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -1e9, End: 1e9};
  if (event.key in steps) {
    event.preventDefault();
    move(current + steps[event.key]);
  } else if (event.key === 'Enter' && current >= 0 && look()) {
    event.preventDefault();
    trigger('select', {index: current, value: current});
  } else if (event.key === 'Escape') hide();
});
watch('value', () => { hide(); });
"""
