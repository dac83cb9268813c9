// The lists of presets on the nodes that prune and measure: each is marked with the models it is for; if the model is known, only
// presets that fit are offered.
//
// The server tells what each preset is for at /distill/presets, and which of them fit a file that a loader names.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { after, inputInPlaceOf, isLeftBehind, outside } from "./graph.js";

const PRUNES = ["DistillPruneUNetBlocks", "DistillPruneTransformerBlocks"];
const MEASURES = "DistillBenchmarkPresets";
// Widgets by which loaders name a file, and the folder of models it is in.
const LOADS = { ckpt_name: "checkpoints", unet_name: "diffusion_models" };
const DEMO = "DistillLoadDemoTeacher";
const MOST_NODES = 100; // between a node and the loader of its model

const lists = new Map(); // node -> all its presets, and the list it offers, which is changed in place: Nodes 2.0 keep it
const answers = new Map(); // question -> promise of an answer
let about = {}; // preset -> family and title

function ask(query = "") {
  if (!answers.has(query)) {
    const answer = api.fetchApi(`/distill/presets${query}`).then((response) => (response.ok ? response.json() : {}));
    answers.set(query, answer.catch(() => ({})));
    answer.catch(() => answers.delete(query)); // a server that was away may come back
  }
  return answers.get(query);
}

function widgetOf(node, name) {
  return node.widgets?.find((widget) => widget.name === name);
}

/** The value of a widget; undefined if another node gives it. */
function valueOf(node, name) {
  return inputInPlaceOf(node, name) ? undefined : widgetOf(node, name)?.value;
}

/** The node that gives an input its value. */
function before(node, place) {
  const found = outside(node, node.inputs[place]);
  if (!found) return node.getInputNode(place);
  const { host, slot } = found;
  return host.inputs[slot]?.link == null ? null : before(host, slot);
}

/** What to ask the server about the MODEL that comes into a node; empty if its loader is not found. */
function sourceOf(node) {
  for (let count = 0; node && count < MOST_NODES; count++) {
    if (node.comfyClass === DEMO) {
      const network = valueOf(node, "network");
      return network ? `?demo=${encodeURIComponent(network)}` : "";
    }
    for (const [name, folder] of Object.entries(LOADS)) {
      const file = valueOf(node, name);
      if (typeof file === "string") return `?folder=${folder}&file=${encodeURIComponent(file)}`;
    }
    const place = node.inputs?.findIndex(({ type, link }) => link != null && (type === "MODEL" || type === "*")) ?? -1;
    node = place < 0 ? null : before(node, place);
  }
  return "";
}

function getOptionLabel(name) {
  return about[name] ? `${name} (${about[name].title})` : (name ?? "");
}

/** The list of presets on the subgraph that a node is in; undefined if it has none. */
function promoted(node) {
  const input = inputInPlaceOf(node, "preset");
  const { host, name } = (input && outside(node, input)) ?? {};
  return host && widgetOf(host, name);
}

async function refresh(node) {
  about = (await ask()).presets ?? {};
  const measures = node.comfyClass === MEASURES;
  const source = measures ? valueOf(node, "family") : sourceOf(node);
  let fit = null; // not known
  if (source && measures) fit = Object.keys(about).filter((name) => about[name].family === source);
  else if (source) {
    fit = (await ask(source)).fit;
    if (sourceOf(node) !== source) return; // it was changed meanwhile, which brings an answer of its own
  }
  const widgets = [widgetOf(node, "preset"), promoted(node)].filter((widget) => widget?.options);
  const { all, offered } = lists.get(node) ?? {};
  if (!all) return; // it was removed meanwhile
  const fits = (name) => !fit?.length || fit.includes(name) || !about[name] || widgets.some(({ value }) => name === value);
  offered.splice(0, offered.length, ...all.filter(fits));
  for (const { options } of widgets) Object.assign(options, { values: offered, getOptionLabel }); // ComfyUI puts all of them back
  node.setDirtyCanvas?.(true);
}

/** All lists anew; those of nodes that are in no graph any more are forgotten. */
function refreshAll() {
  for (const node of lists.keys()) if (isLeftBehind(node)) lists.delete(node);
  return Promise.all([...lists.keys()].map(refresh));
}

app.registerExtension({
  name: "distill.presets",

  setup() {
    api.addEventListener("graphChanged", refreshAll);
  },

  nodeCreated(node) {
    if (![...PRUNES, MEASURES].includes(node.comfyClass)) return;
    const { options } = widgetOf(node, "preset");
    const all = [...options.values];
    options.values = [...all];
    options.getOptionLabel = getOptionLabel;
    const offered = options.values;
    after(node, "onAdded", () => {
      lists.set(node, { all, offered });
      refresh(node);
    });
    after(node, "onRemoved", () => lists.delete(node));
  },

  afterConfigureGraph: refreshAll,

  refreshComboInNodes() {
    answers.clear(); // files may have changed
    return refreshAll();
  },
});
