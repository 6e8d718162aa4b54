/**
 * Charts on nodes: lines, bars and a map of many values, each with what is under the pointer written below it.
 *
 * What they are drawn from comes from the server (`charts.py` says how it looks). All of them fill the node, in its colours, and
 * are drawn again when it changes its size.
 */

import { app } from "../../scripts/app.js";
import { COLORS, html, place, short, style, svg } from "./dom.js";

const LEFT = 52;
const RIGHT = 12;
const TOP = 20;
const BOTTOM = 32;

/** Puts a drawing with a caption into `element`; `draw(svg, width, height)` gives what to do with the pointer. */
function chart(element, view, draw, resting) {
  const drawing = svg("svg", { role: "img", "aria-label": view.title });
  const caption = html("div", { class: "flux-poke-caption" });
  const rest = () => caption.replaceChildren(...resting());
  element.fluxPokeWatch?.disconnect();
  element.replaceChildren(drawing, caption, style());
  rest();
  let react = {};
  const redraw = () => {
    const [width, height] = [drawing.clientWidth, drawing.clientHeight];
    if (width < 100 || height < 60) return;
    drawing.replaceChildren(svg("text", { x: width / 2, y: 12, "text-anchor": "middle" }, view.title));
    react = draw(drawing, width, height);
  };
  element.fluxPokeWatch = new ResizeObserver(redraw);
  element.fluxPokeWatch.observe(drawing);
  drawing.onpointermove = (event) => {
    event.stopPropagation();
    const told = react.hover?.(...place(event, drawing), event.buttons & 1);
    told ? caption.replaceChildren(told) : rest();
  };
  drawing.onpointerdown = (event) => {
    if (event.button) return;
    event.stopPropagation();
    if (!react.drag) return;
    drawing.setPointerCapture(event.pointerId);
    drawing.onpointermove(event);
  };
  drawing.onpointerleave = () => {
    react.leave?.();
    rest();
  };
}

/** Names of series with their colours. */
const keys = (series, colors = COLORS) =>
  series.flatMap(({ name }, at) => (name ? [html("span", { class: "flux-poke-key", style: `background: ${colors[at]}` }), name] : []));

/** Round numbers between two, about `count` of them. */
function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * [1, 2, 5, 10].find((times) => times * unit >= rough);
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, n) => Number(((first + n) * step).toPrecision(12)));
}

/** Powers of ten between two. */
function decades(low, high) {
  const [first, last] = [Math.ceil(Math.log10(low) - 1e-9), Math.floor(Math.log10(high) + 1e-9)];
  const step = Math.max(1, Math.ceil((last - first + 1) / 8));
  const found = [];
  for (let power = first; power <= last; power += step) found.push(10 ** power);
  return found.length > 1 ? found : [low, high];
}

const line = (x1, y1, x2, y2, more) => svg("line", { x1, y1, x2, y2, ...more });
const label = (x, y, text, more) => svg("text", { x, y, ...more }, text);

/**
 * Lines: `series` of {name, y} over `x` (numbers, or `labels` of points); `log` of a logarithmic scale; `more` to tell of each
 * point, by name; `mark`, which point is marked; and `drag`, what dragging the mark sets: the number `widget` to `to[unit]` of the
 * point, `unit` being the value of that other widget.
 */
export function lines(element, view, { node }) {
  const { series, x, log, mark, drag } = view;
  let asked;

  const tell = (at) => {
    const parts = [view.labels ? view.labels[at] : `${view.xlabel} ${short(x[at])}`];
    for (const { name, y } of series) if (y[at] != null) parts.push(`${name || view.ylabel} ${short(y[at])}`);
    for (const [name, values] of Object.entries(view.more ?? {})) {
      parts.push(typeof values[at] === "number" ? `${name} ${short(values[at])}` : `${name} ${values[at]}`);
    }
    return parts.join(" · ");
  };
  const resting = () => {
    if (asked != null) return [`Asked for: ${tell(asked)}. Run to plan it.`];
    const shown = [...keys(series)];
    if (mark != null) shown.push(`This plan: ${tell(mark)}${drag ? ". Drag to ask for another." : ""}`);
    return shown;
  };

  const draw = (drawing, width, height) => {
    const all = series.flatMap(({ y }) => y).filter((value) => value != null && (!log || value > 0));
    const low = log ? Math.min(...all) : Math.min(0, ...all);
    const high = Math.max(...all, low * 1.001 + 1e-300);
    const [first, last] = [view.labels ? -0.5 : Math.min(0, x[0]), view.labels ? x.length - 0.5 : x.at(-1)];
    const scale = log ? Math.log10 : Number;
    const across = (value) => LEFT + ((value - first) / (last - first || 1)) * (width - LEFT - RIGHT);
    const up = (value) => height - BOTTOM - ((scale(value) - scale(low)) / (scale(high) - scale(low) || 1)) * (height - BOTTOM - TOP);

    for (const value of log ? decades(low, high) : ticks(low, high, 5)) {
      drawing.append(line(LEFT, up(value), width - RIGHT, up(value), { class: "flux-poke-faint" }));
      drawing.append(label(LEFT - 4, up(value) + 3, short(value), { "text-anchor": "end" }));
    }
    const steps = Math.max(1, Math.ceil(x.length / Math.max(1, Math.floor((width - LEFT) / 60))));
    const below = view.labels ? x.filter((_, at) => at % steps === 0) : ticks(first, last, Math.max(2, Math.floor(width / 80)));
    for (const value of below) {
      const text = view.labels ? view.labels[value] : short(value);
      drawing.append(label(across(value), height - BOTTOM + 12, text, { "text-anchor": "middle" }));
    }
    drawing.append(label((LEFT + width - RIGHT) / 2, height - 6, view.xlabel ?? "", { "text-anchor": "middle" }));
    const size = Math.min(10, (1.9 * (height - TOP)) / view.ylabel.length);
    const upwards = { "text-anchor": "middle", transform: "rotate(-90)", style: `font-size: ${size}px` };
    drawing.append(label(-(TOP + height - BOTTOM) / 2, 10, view.ylabel, upwards));

    series.forEach(({ y }, at) => {
      const points = x.flatMap((value, n) => (y[n] == null || (log && y[n] <= 0) ? [] : [[across(value), up(y[n])]]));
      const style = { fill: "none", stroke: COLORS[at], "stroke-width": 1.5 };
      drawing.append(svg("polyline", { points: points.map((point) => point.join()).join(" "), ...style }));
      if (points.length <= 60) drawing.append(...points.map(([cx, cy]) => svg("circle", { cx, cy, r: 2.5, fill: COLORS[at] })));
    });

    const cursor = (color, more) => {
      const found = svg("g", { visibility: "hidden" });
      found.append(line(0, TOP, 0, height - BOTTOM, { stroke: color, ...more }));
      const dots = series.map((_, at) => svg("circle", { r: 3.5, fill: mark == null ? COLORS[at] : color }));
      found.append(...dots);
      drawing.append(found);
      return (at) => {
        found.setAttribute("visibility", at == null ? "hidden" : "visible");
        if (at == null) return;
        found.setAttribute("transform", `translate(${across(x[at])} 0)`);
        dots.forEach((dot, n) => dot.setAttribute("cy", series[n].y[at] > 0 || !log ? up(series[n].y[at] ?? low) : -9));
      };
    };
    const under = cursor("currentColor", { "stroke-opacity": 0.4 });
    cursor(COLORS[1], {})(mark);
    const wanted = cursor(COLORS[3], { "stroke-dasharray": "4 3" });
    wanted(asked);

    return {
      drag: Boolean(drag),
      hover(px, _, pressed) {
        const at = nearest(x, first + ((px - LEFT) / (width - LEFT - RIGHT)) * (last - first));
        under(at);
        if (drag && pressed && ask(node, drag, at)) {
          asked = at;
          wanted(at);
        }
        return tell(at);
      },
      leave: () => under(null),
    };
  };
  if (drag) element.style.cursor = "ew-resize";
  chart(element, view, draw, resting);
}

/** Sets a node's widget to what a point of a chart stands for; false where that says nothing in the unit that is chosen. */
function ask(node, { widget, unit, to }, at) {
  const found = (name) => node.widgets.find((one) => one.name === name);
  const value = to[found(unit)?.value]?.[at];
  if (!(value > 0) || !found(widget)) return false;
  found(widget).value = value;
  app.canvas.setDirty(true, true);
  return true;
}

function nearest(sorted, value) {
  let [low, high] = [0, sorted.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle;
    else high = middle;
  }
  return value - sorted[low] < sorted[high] - value ? low : high;
}

/** Where names of rows end, and how high a row is. */
function rows(drawing, names, height, top, bottom) {
  const each = (height - top - bottom) / names.length;
  const size = Math.max(5, Math.min(10, each));
  const skip = Math.ceil(8 / each);
  const left = Math.min(100, 12 + Math.max(...names.map((name) => name.length)) * size * 0.55);
  names.forEach((name, at) => {
    if (at % skip) return;
    drawing.append(label(left - 4, top + (at + 0.5) * each + size * 0.35, name, { "text-anchor": "end", style: `font-size: ${size}px` }));
  });
  return [left, each];
}

const rowAt = (y, names, each) => {
  const at = Math.floor((y - TOP) / each);
  return at >= 0 && at < names.length ? at : null;
};

/** Of what is there and what is not. */
const PAIR = [COLORS[0], "#8f949c66"];

/** Bars: `series` of {name, values} one after the other in a row for each of `names`. */
export function bars(element, view) {
  const { names, series } = view;
  const most = Math.max(...names.map((_, at) => series.reduce((sum, { values }) => sum + values[at], 0)));
  const draw = (drawing, width, height) => {
    const [left, each] = rows(drawing, names, height, TOP, BOTTOM);
    const across = (value) => left + (value / most) * (width - left - RIGHT);
    for (const value of ticks(0, most, Math.max(2, Math.floor(width / 90)))) {
      drawing.append(line(across(value), TOP, across(value), height - BOTTOM, { class: "flux-poke-faint" }));
      drawing.append(label(across(value), height - BOTTOM + 12, short(value), { "text-anchor": "middle" }));
    }
    drawing.append(label((left + width) / 2, height - 6, view.xlabel, { "text-anchor": "middle" }));
    names.forEach((_, at) => {
      let from = 0;
      series.forEach(({ values }, n) => {
        const box = { x: across(from), y: TOP + at * each + each * 0.1, width: across(values[at]) - left, height: each * 0.8 };
        drawing.append(svg("rect", { ...box, fill: PAIR[n] }));
        from += values[at];
      });
    });
    return {
      hover(_, y) {
        const at = rowAt(y, names, each);
        return at == null ? "" : [names[at], ...series.map(({ name, values }) => `${name} ${short(values[at])}`)].join(" · ");
      },
    };
  };
  chart(element, view, draw, () => keys(series, PAIR));
}

/** Of 0 to 1: black over violet and orange to pale yellow, dark enough for a dark node and bright enough for a bright one. */
const RAMP = [[12, 8, 38], [66, 15, 109], [120, 28, 109], [176, 50, 90], [221, 81, 58], [246, 125, 21], [252, 181, 25], [240, 249, 160]];

function shade(value) {
  const at = Math.max(0, Math.min(1, value)) * (RAMP.length - 1);
  const [low, high] = [RAMP[Math.floor(at)], RAMP[Math.ceil(at)]];
  return low.map((part, n) => part + (high[n] - part) * (at % 1));
}

const numbers = (text) => new Uint16Array(Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer);

/**
 * A map: a row for each of `names`, `columns` values in it (`values`: shares of 65,535, `neurons`: whose they are, both 16 bits in
 * base64), sorted; beside it, `silent` and `always`, shares of each row's `widths` neurons.
 */
export function map(element, view) {
  const { names, columns, widths, silent, always } = view;
  const [values, neurons] = [numbers(view.values), numbers(view.neurons)];

  const picture = html("canvas", { width: columns, height: names.length });
  const pen = picture.getContext("2d");
  const pixels = pen.createImageData(columns, names.length);
  values.forEach((value, at) => pixels.data.set([...shade(value / 65535), 255], at * 4));
  pen.putImageData(pixels, 0, 0);
  const address = picture.toDataURL();

  const most = Math.max(0.05, ...silent, ...always) * 1.05;
  const percent = (share) => `${short(100 * share)} %`;
  const draw = (drawing, width, height) => {
    const [left, each] = rows(drawing, names, height, TOP, BOTTOM);
    const beside = Math.max(70, (width - left) * 0.2);
    const [mapped, middle] = [width - left - beside - 2 * RIGHT, width - RIGHT - beside / 2];
    const box = { x: left, y: TOP, width: mapped, height: height - TOP - BOTTOM };
    drawing.append(svg("image", { ...box, href: address, preserveAspectRatio: "none", style: "image-rendering: pixelated" }));
    for (const share of [0, 0.5, 1]) {
      drawing.append(label(left + share * mapped, height - BOTTOM + 12, short(100 * share), { "text-anchor": "middle" }));
    }
    drawing.append(label(left + mapped / 2, height - 6, "neurons, most active first (%)", { "text-anchor": "middle" }));
    drawing.append(label(middle - 4, height - 6, "silent", { "text-anchor": "end" }), label(middle + 4, height - 6, "always"));
    names.forEach((_, at) => {
      const [y, high] = [TOP + at * each + each * 0.15, each * 0.7];
      const [less, more] = [silent, always].map((shares) => (shares[at] / most) * (beside / 2));
      drawing.append(svg("rect", { x: middle - less, y, width: less, height: high, fill: COLORS[0] }));
      drawing.append(svg("rect", { x: middle, y, width: more, height: high, fill: COLORS[1] }));
    });
    drawing.append(line(middle, TOP, middle, height - BOTTOM, { stroke: "currentColor", "stroke-opacity": 0.5 }));
    const frame = svg("rect", { fill: "none", stroke: "currentColor", visibility: "hidden", x: left, width: mapped, height: each });
    drawing.append(frame);
    return {
      hover(x, y) {
        const at = rowAt(y, names, each);
        frame.setAttribute("visibility", at == null ? "hidden" : "visible");
        if (at == null) return "";
        frame.setAttribute("y", TOP + at * each);
        const column = Math.floor(((x - left) / mapped) * columns);
        if (column < 0 || column >= columns) {
          return `${names[at]}: ${percent(silent[at])} of ${short(widths[at])} neurons silent, ${percent(always[at])} always on`;
        }
        const [neuron, rate] = [neurons[at * columns + column], values[at * columns + column] / 65535];
        return `${names[at]} · neuron ${short(neuron)} of ${short(widths[at])} · fires at ${percent(rate)} of tokens`;
      },
      leave: () => frame.setAttribute("visibility", "hidden"),
    };
  };
  chart(element, view, draw, () => [view.caption ?? ""]);
}
