/** What the views on nodes are made of: elements, numbers as text, and the style, in the colours of the page's theme. */

const SVG = "http://www.w3.org/2000/svg";

/** Colours that can be told apart on dark and on light nodes. */
export const COLORS = ["#4e9de0", "#e0883c", "#8f949c", "#4fae7b"];

/** html("div", {class: "a"}, "text", child) is the element. */
export const html = (tag, attributes, ...children) => filled(document.createElement(tag), attributes, children);

/** The same of SVG. */
export const svg = (tag, attributes, ...children) => filled(document.createElementNS(SVG, tag), attributes, children);

function filled(element, attributes = {}, children = []) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** A number in few letters: 12,345, 0.0123, 1.2e-9. */
export function short(value) {
  if (Number.isInteger(value) && Math.abs(value) < 1e9) return value.toLocaleString("en-US");
  const size = Math.abs(value);
  return size && (size < 1e-3 || size >= 1e6) ? value.toExponential(1) : `${Number(value.toPrecision(3))}`;
}

/** Where in an element's own pixels an event is, however far the canvas is zoomed. */
export function place(event, element) {
  const box = element.getBoundingClientRect();
  return [
    ((event.clientX - box.left) * element.clientWidth) / box.width,
    ((event.clientY - box.top) * element.clientHeight) / box.height,
  ];
}

/** How all of it looks; an element of ours holds it beside what it shows. */
export const style = () => html("style", {}, STYLE);

const STYLE = `
  .flux-poke-words { box-sizing: border-box; overflow: auto; color: var(--fg-color, #ddd); font: 11px/15px ui-monospace, monospace;
    padding: 2px 4px; scrollbar-width: thin; user-select: text; cursor: text; }
  .flux-poke-words div { white-space: pre-wrap; overflow-wrap: break-word; }
  .flux-poke-words table { border-spacing: 0; white-space: nowrap; }
  .flux-poke-words td { padding: 0 10px 0 0; }
  .flux-poke-words td:not(:first-child) { text-align: right; }
  .flux-poke-view { box-sizing: border-box; display: flex; flex-direction: column; overflow: hidden; color: var(--fg-color, #ddd);
    font: 11px/15px Inter, sans-serif; user-select: none; min-height: 160px; }
  .flux-poke-view svg, .flux-poke-view .flux-poke-stage { flex: 1 1 0; min-height: 0; width: 100%; display: block; }
  .flux-poke-view svg { touch-action: none; }
  .flux-poke-view text { fill: var(--fg-color, #ddd); font: 10px Inter, sans-serif; }
  .flux-poke-view .flux-poke-faint { stroke: var(--fg-color, #ddd); stroke-opacity: 0.18; }
  .flux-poke-caption { flex: none; height: 30px; padding: 0 4px; overflow: hidden; color: var(--descrip-text, #999); }
  .flux-poke-key { display: inline-block; width: 8px; height: 8px; margin: 0 4px 0 8px; border-radius: 2px; }
  .flux-poke-stage { position: relative; overflow: hidden; }
  .flux-poke-stage img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain;
    object-position: top; pointer-events: none; }
  .flux-poke-stage hr { position: absolute; top: 0; width: 0; margin: 0; border: 0; border-left: 1px solid #fffa;
    pointer-events: none; }
  .flux-poke-bar { flex: none; display: flex; gap: 4px; padding: 0 4px 4px; align-items: center; }
  .flux-poke-bar button { font: inherit; color: inherit; background: var(--comfy-input-bg, #222); border: 1px solid
    var(--border-color, #4e4e4e); border-radius: 4px; padding: 0 8px; cursor: pointer; }
  .flux-poke-bar button[aria-pressed=true] { color: var(--fg-color, #fff); border-color: var(--fg-color, #fff); }
`;
