/**
 * Flux Poke's nodes in the browser, in both kinds of nodes that the page draws: text keeps its lines, and what a node found is
 * drawn in the colours of the theme, answers to the pointer, and is there once.
 *
 * A node's text comes as ComfyUI's progress_text, and as `flux_poke_text` in its output. What it draws is `flux_poke_view` there:
 * one object, whose `kind` says by which of VIEWS. Pages without this file show the text as ComfyUI does, and the node's picture.
 */

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { followAll, followValues } from "./applies.js";
import { bars, lines, map } from "./charts.js";
import { comparison } from "./comparison.js";
import { graphOf } from "./jpeg.js";
import { wordsElement, write } from "./words.js";

const VIEWS = { lines, bars, map, comparison };

/** What the page calls its own widget of a node's text: where there is one of this name, it writes into that. */
const TEXT = "$$node-text-preview";
const VIEW = "flux_poke_view";
const PICTURE = "$$canvas-image-preview";

/** Of what goes from node to node, beside the page's own colours. */
const SLOTS = { RECORDING: "#4fae7b", PRUNING_PLAN: "#e0883c", BLOCK_TAPS: "#b58be0", RECORD_OPTIONS: "#8fbfa5" };

/** Pixels: the text's before it scrolls, the least of a view, and around a widget. */
const MOST_TEXT = 124;
const LEAST_VIEW = 180;
const MARGIN = 8;
/** How wide a node becomes that had the width of its inputs. */
const WIDTH = 380;

const ours = (node) => node?.comfyClass?.startsWith("FluxPoke");
const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name);

function removeWidget(node, name) {
  const at = node.widgets?.findIndex((widget) => widget.name === name) ?? -1;
  if (at < 0) return;
  node.widgets[at].onRemove?.();
  node.widgets.splice(at, 1);
}

/** A node of the graph or of a graph within it, by what a run calls it ("5", or "3:5" in node 3). */
function nodeOf(id) {
  let graph = app.rootGraph ?? app.graph;
  const path = `${id}`.split(":");
  for (const host of path.slice(0, -1)) graph = graph?.getNodeById(host)?.subgraph;
  return graph?.getNodeById(path.at(-1));
}

/** Makes a node as high as what is on it needs. */
function fit(node) {
  const [width, height] = node.computeSize();
  if (node.size[1] < height || node.size[0] < Math.min(width, 240)) {
    node.setSize([Math.max(node.size[0], Math.min(width, 240)), Math.max(node.size[1], height)]);
  }
  app.canvas?.setDirty(true, true);
}

function addElement(node, name, element, options) {
  const widget = node.addDOMWidget(name, "flux_poke", element, {
    serialize: false,
    hideOnZoom: false,
    hideInPanel: true,
    margin: MARGIN,
    ...options,
  });
  widget.serialize = false;
  letThrough(element);
  return widget;
}

/** In nodes that the canvas draws, the wheel and the middle button are the canvas's over elements too, as over the page's own. */
function letThrough(element) {
  const drawn = () => !element.closest(".lg-node");
  element.addEventListener("wheel", (event) => {
    const scrolls = element.scrollHeight > element.clientHeight + 1 && !event.ctrlKey;
    if (drawn() && !scrolls) app.canvas.processMouseWheel(event);
  });
  const middle = (event) => event.button === 1 || event.buttons & 4;
  for (const [name, handler] of [["pointerdown", "processMouseDown"], ["pointermove", "processMouseMove"], ["pointerup", "processMouseUp"]]) {
    element.addEventListener(name, (event) => drawn() && middle(event) && app.canvas[handler](event), { capture: true });
  }
}

/** The widget of a node's text, in place of the page's own. */
function textWidget(node) {
  const found = widgetOf(node, TEXT);
  if (found?.type === "flux_poke") return found;
  removeWidget(node, TEXT);
  const element = wordsElement();
  let text = "";
  let height = 20;
  const measure = () => {
    const content = [...element.children].reduce((sum, child) => sum + child.offsetHeight, 4);
    const needed = Math.min(MOST_TEXT, Math.max(20, content));
    if (!element.offsetParent || needed === height) return;
    height = needed;
    element.style.height = element.style.minHeight = element.style.maxHeight = `${height}px`;
    fit(node);
  };
  const widget = addElement(node, TEXT, element, {
    getValue: () => text,
    setValue: (value) => {
      text = `${value}`;
      write(element, text);
      requestAnimationFrame(measure);
    },
  });
  // as high as its lines in both kinds of nodes, while pictures take what is left
  widget.computeLayoutSize = undefined;
  widget.computeSize = (width) => [width ?? 0, height + 2 * MARGIN];
  new ResizeObserver(measure).observe(element);
  // the text comes before what is drawn
  const drawn = widgetOf(node, VIEW);
  if (drawn) node.widgets.push(...node.widgets.splice(node.widgets.indexOf(drawn), 1));
  return widget;
}

/** Live previews are of no use any more when a node has drawn what it found. */
function endPreview(node) {
  const name = node.graph?.isRootGraph === false ? `${node.graph.id}:${node.id}` : `${node.id}`;
  const stores = app.extensionManager?._p?._s; // the page offers no other way
  stores?.get("nodeOutput")?.revokePreviewsByLocatorId?.(name);
}

/** The widget of what a node drew; a node that was small has room for it afterwards. */
function viewWidget(node) {
  const widget = addElement(node, VIEW, document.createElement("div"), { getMinHeight: () => LEAST_VIEW });
  if (node.size[0] < WIDTH) node.setSize([WIDTH, Math.max(node.size[1], node.computeSize()[1] + 60)]);
  return widget;
}

/** Draws what a node found in the place of its picture. */
function show(node, output) {
  const view = output?.[VIEW]?.[0];
  const [text] = output?.flux_poke_text ?? [];
  if (text != null) textWidget(node).value = text;
  if (output?.images) endPreview(node);
  if (!view || !VIEWS[view.kind]) return;
  node.hideOutputImages = true; // Nodes 2.0
  node.onDrawBackground = () => {}; // the others
  removeWidget(node, PICTURE);
  node.imgs = undefined;
  const picture = new Image(); // for "Open Image" and "Save Image" in the node's menu
  picture.onload = () => {
    node.imgs = [picture];
    node.imageIndex = 0;
  };
  const [file] = output.images ?? [];
  if (file) picture.src = addressOf(file);
  const { element } = widgetOf(node, VIEW) ?? viewWidget(node);
  element.className = "flux-poke-view h-full w-full";
  VIEWS[view.kind](element, view, { node, picture: file && addressOf(file), addressOf });
  fit(node);
}

function addressOf(file) {
  return api.apiURL(`/view?${new URLSearchParams(file)}&rand=${Math.random()}`);
}

/** Of our own types, where nobody has given them any. A theme that is chosen forgets them until the next graph is opened. */
function colorSlots() {
  const { default_connection_color_byType: slots, constructor } = app.canvas;
  const page = document.documentElement.style; // Nodes 2.0
  for (const [type, color] of Object.entries(SLOTS)) {
    slots[type] ||= color;
    constructor.link_type_colors[type] ||= color;
    page.setProperty(`--color-datatype-${type}`, slots[type]);
  }
}

app.registerExtension({
  name: "fluxpoke.nodes",

  setup() {
    api.addEventListener("progress_text", ({ detail }) => {
      const node = nodeOf(detail.nodeId);
      if (ours(node)) textWidget(node).value = detail.text;
    });
    api.addEventListener("b_preview_with_metadata", ({ detail }) => {
      const node = nodeOf(detail.displayNodeId ?? detail.nodeId);
      if (ours(node)) delete node.onDrawBackground; // what is at work is shown while it is
    });
    readPictures();
    colorSlots();
  },

  afterConfigureGraph() {
    colorSlots();
    followAll(app.rootGraph ?? app.graph);
  },

  nodeCreated(node) {
    if (!ours(node)) return;
    followValues(node);
    const before = node.onExecuted;
    node.onExecuted = function (output) {
      before?.call(this, output);
      show(this, output);
    };
  },

  /** Another graph's outputs, or those of an older run, take the place of what was there. */
  onNodeOutputsUpdated(outputs) {
    for (const [name, output] of Object.entries(outputs)) {
      const [graph, id] = name.includes(":") ? name.split(":") : [null, name];
      const node = (graph ? app.rootGraph?.subgraphs?.get(graph) : app.rootGraph ?? app.graph)?.getNodeById(id);
      if (ours(node)) show(node, output);
    }
  },
});

/** Graphs of JPEGs, which the page itself does not look for: in those that are dropped on the canvas, or opened from the menu. */
function readPictures() {
  app.canvas.canvas.addEventListener("drop", (event) => {
    const [file, another] = event.dataTransfer?.files ?? [];
    if (file?.type !== "image/jpeg" || another || app.dragOverNode) return;
    event.preventDefault(); // the page leaves alone what somebody has taken
    openPicture(file, "file_drop");
  });
  const input = document.getElementById("comfy-file-input");
  const change = (event) => {
    const [file] = input.files;
    if (file?.type !== "image/jpeg") return;
    event.stopImmediatePropagation();
    openPicture(file, "file_button");
    input.value = "";
  };
  input?.addEventListener("change", change, { capture: true });
}

async function openPicture(file, source) {
  const { workflow, prompt } = await graphOf(file);
  const name = file.name.replace(/\.\w+$/, "");
  if (workflow) await app.loadGraphData(workflow, true, true, name);
  else if (prompt) await app.loadApiJson(prompt, name);
  else await app.handleFile(file, source);
}
