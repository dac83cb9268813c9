// The lists of presets on the nodes that prune and measure: each is marked with the models it is for, and where the model is known,
// only those that fit are offered.
//
// The server tells what each preset is for at /distill/presets, and which of them fit a file that a loader names.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

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

/** What to ask the server about the MODEL that comes into a node; empty if its loader is not found. */
function sourceOf(node) {
  for (let count = 0; node && count < MOST_NODES; count++) {
    if (node.comfyClass === DEMO) return `?demo=${encodeURIComponent(widgetOf(node, "network")?.value ?? "unet")}`;
    for (const [name, folder] of Object.entries(LOADS)) {
      const file = widgetOf(node, name)?.value;
      if (typeof file === "string") return `?folder=${folder}&file=${encodeURIComponent(file)}`;
    }
    const place = node.inputs?.findIndex(({ type, link }) => link != null && (type === "MODEL" || type === "*")) ?? -1;
    node = place < 0 ? null : node.getInputNode(place);
  }
  return "";
}

/** The presets that fit, or null if that is not known. */
async function fitting(node) {
  if (node.comfyClass === MEASURES) {
    const family = widgetOf(node, "family")?.value;
    return Object.keys(about).filter((name) => about[name].family === family);
  }
  const source = sourceOf(node);
  return source ? (await ask(source)).fit : null;
}

async function refresh(node) {
  about = (await ask()).presets ?? {};
  const fit = await fitting(node);
  const widget = widgetOf(node, "preset");
  const { all, offered } = lists.get(node) ?? {};
  if (!all) return; // it was removed meanwhile
  const fits = (name) => !fit?.length || fit.includes(name) || !about[name] || name === widget.value;
  offered.splice(0, offered.length, ...all.filter(fits));
  widget.options.values = offered; // ComfyUI puts all of them back when it looks for new files
  node.setDirtyCanvas?.(true);
}

function refreshAll() {
  lists.forEach((_, node) => refresh(node));
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
    options.getOptionLabel = (name) => (about[name] ? `${name} (${about[name].title})` : (name ?? ""));
    lists.set(node, { all, offered: options.values });
    const { onRemoved } = node;
    node.onRemoved = function (...values) {
      lists.delete(node);
      return onRemoved?.apply(this, values);
    };
    refresh(node);
  },

  afterConfigureGraph: refreshAll,

  refreshComboInNodes() {
    answers.clear(); // files may have changed
    refreshAll();
  },
});
