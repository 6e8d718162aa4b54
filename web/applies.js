/**
 * Inputs that do not apply are out of sight: what another choice on the same node, or a link into it, leaves without effect.
 *
 * They keep their values, and what is sent to the server stays as it was. An input with a link of its own is always there.
 */

import { app } from "../../scripts/app.js";

const valueOf = (node, name) => node.widgets?.find((widget) => widget.name === name)?.value;
const inputOf = (node, name) => node.inputs?.find((input) => input.name === name);

/** What is linked to an input: its type, "" where nothing is. */
function linked(node, name) {
  const link = inputOf(node, name)?.link;
  return link == null ? "" : `${node.graph?.getLink?.(link)?.type ?? "*"}`;
}

/** A value that comes through a link is not known: whatever depends on it applies. */
const is = (node, name, ...values) => !linked(node, name) && values.includes(valueOf(node, name));

const NOT_NAMED = { name: (node) => !linked(node, "recording") };

/** By node and input: whether it applies. */
const APPLIES = {
  FluxPokeFluxTimer: {
    static_shift: (node) => linked(node, "shift") || is(node, "shift", "static"),
    width: (node) => !linked(node, "latent") && !is(node, "shift", "static"),
    height: (node) => !linked(node, "latent") && !is(node, "shift", "static"),
  },
  FluxPokeCalibrate: { file: (node) => linked(node, "own_prompts") || !`${valueOf(node, "own_prompts") ?? ""}`.trim() },
  FluxPokePrompts: { seed: (node) => linked(node, "index") || valueOf(node, "index") < 0 },
  FluxPokeRecord: NOT_NAMED,
  FluxPokeRecordInternals: NOT_NAMED,
  FluxPokeRecordBlockStates: NOT_NAMED,
  FluxPokeRecordTrajectories: NOT_NAMED,
  FluxPokeRecordLensRows: NOT_NAMED,
  FluxPokeSavePrunedFlux: Object.fromEntries(
    ["repair", "fold", "precision"].map((name) => [name, (node) => linked(node, "plan_or_model") !== "MODEL"]),
  ),
  FluxPokeRetrainLayers: {
    // refused with distill unless they are what they are at first: then they stay in sight
    layers: (node) => !is(node, "method", "distill") || !is(node, "layers", "all"),
    train_on: (node) => !is(node, "method", "distill") || !is(node, "train_on", "auto"),
    thickness: (node) => !is(node, "method", "distill") || !is(node, "thickness", 1),
    sequential: (node) => !is(node, "method", "distill") || !is(node, "sequential", false),
    ...Object.fromEntries(
      ["steps", "learning_rate", "batch", "mixed_precision"].map((name) => [name, (node) => !is(node, "method", "closed form")]),
    ),
  },
};

/** Both kinds of nodes: the canvas asks the widget, Nodes 2.0 what the page's store holds of it. */
function hide(widget, hidden) {
  if (!!widget.hidden === hidden) return false;
  widget.hidden = hidden;
  const known = app.extensionManager?._p?._s?.get("widgetValue")?.getWidget?.(widget.widgetId); // the page offers no other way
  const options = known?.options ?? (widget.options ??= {});
  options.hidden = hidden;
  return true;
}

function update(node) {
  let changed = false;
  for (const [name, applies] of Object.entries(APPLIES[node.comfyClass])) {
    const at = node.widgets?.findIndex((widget) => widget.name === name) ?? -1;
    if (at < 0) continue;
    const hidden = !linked(node, name) && !applies(node);
    changed = hide(node.widgets[at], hidden) || changed;
    // what becomes of a seed after a run goes with it
    for (const other of node.widgets[at].linkedWidgets ?? []) changed = hide(other, hidden) || changed;
  }
  if (changed) app.canvas?.setDirty(true, true);
}

/** Keeps the inputs of a new node in step with its values and links. */
export function followValues(node) {
  if (!APPLIES[node.comfyClass]) return;
  const before = node.onConnectionsChange;
  node.onConnectionsChange = function (...given) {
    const result = before?.apply(this, given);
    queueMicrotask(() => update(this)); // the link is there by then
    return result;
  };
  for (const widget of node.widgets ?? []) {
    const { callback } = widget;
    widget.callback = function (...given) {
      const result = callback?.apply(this, given);
      update(node);
      return result;
    };
  }
  queueMicrotask(() => update(node));
}

/** After a graph is opened, which sets values without a word. */
export function followAll(graph) {
  for (const node of graph?.nodes ?? []) {
    if (APPLIES[node.comfyClass]) update(node);
    if (node.subgraph) followAll(node.subgraph);
  }
}
