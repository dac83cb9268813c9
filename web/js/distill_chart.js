// The live view on the nodes that train: losses, loss by timestep, sample images, speed, and the runs there are.
//
// The server sends the progress of each training in `distill.progress` events, and serves its history at /distill/runs/NAME and a
// list of all at /distill/runs. The chart of a node shows the run that its widget run_name names. A graph saves nothing of it.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { after, executionIds, inputInPlaceOf, isLeftBehind, outside } from "./graph.js";
import { bars, element, lines, short } from "./plot.js";
import { RunList } from "./runs.js";
import { button, html, say, toggle } from "./words.js";

const DRAWS_SAMPLES = { DistillTrainStep: true, DistillSharedBaseLoRA: true, DistillTrainExperts: false };
// What the chart draws, and in which colour; the last named lies below. total has the colour of text.
const TERMS = {
  total: null,
  task: "#3f7fe8",
  output: "#e0651a",
  feature: "#1f9d55",
  local: "#b5179e",
  consistency: "#17a2a2",
  dmd: "#e45756",
  diversity: "#c9a227",
  fake: "#9d755d",
  cosine_distance: "#ff9da6",
  validation: "#9560e8",
};
const SAY_NOTHING = ["total", "dmd"]; // of a run by dmd; they are hidden until asked for
const MAX_POINTS = 1500; // above this, the chart reloads fewer points from the server
const NEWEST_POINTS = 50; // the loss by timestep is the mean over these
const HEIGHT = 240;

const STYLE = `
.distill-chart { box-sizing: border-box; display: flex; flex-direction: column; gap: 3px; min-height: ${HEIGHT - 20}px; height: 100%;
  padding: 5px; overflow: hidden; border: 1px solid var(--border-color); border-radius: 6px; background: var(--comfy-input-bg);
  color: var(--input-text); font: 11px/1.35 Inter, Arial, sans-serif; user-select: none; }
.distill-chart[hidden], .distill-chart [hidden] { display: none !important; }
.distill-chart .row { display: flex; flex-wrap: wrap; gap: 2px; flex: none; }
.distill-chart .row .space { flex: 1; }
.distill-chart button { all: unset; box-sizing: border-box; padding: 1px 6px; border: 1px solid transparent; border-radius: 4px;
  color: var(--input-text); opacity: 0.75; cursor: pointer; white-space: nowrap; font: inherit; }
.distill-chart button:hover { opacity: 1; }
.distill-chart button:disabled { opacity: 0.35; cursor: default; }
.distill-chart button[aria-pressed="true"] { opacity: 1; border-color: var(--border-color); background: var(--comfy-menu-bg); }
.distill-chart .legend button { border-color: transparent; background: none; }
.distill-chart .legend button[aria-pressed="false"] { opacity: 0.55; text-decoration: line-through; }
.distill-chart button:focus-visible { outline: 2px solid var(--input-text); outline-offset: -1px; opacity: 1; }
.distill-chart .swatch { display: inline-block; width: 10px; height: 3px; margin-right: 4px; vertical-align: middle;
  border-radius: 2px; background: var(--series); }
.distill-chart .panel { position: relative; flex: 1; min-height: 90px; }
.distill-chart .panel > * { position: absolute; inset: 0; width: 100%; height: 100%; }
.distill-chart .runs { display: flex; flex-direction: column; gap: 3px; }
.distill-chart .runs p { margin: 0; overflow: hidden; text-overflow: ellipsis; user-select: text; }
.distill-chart .runs ul { flex: 1; min-height: 0; margin: 0; padding: 0; overflow-y: auto; list-style: none; }
.distill-chart .runs li { display: flex; flex-wrap: wrap; align-items: center; padding: 2px 0;
  border-top: 1px solid var(--border-color); }
.distill-chart .runs .name { flex: 1 0 100%; overflow: hidden; text-overflow: ellipsis; opacity: 1; }
.distill-chart .runs .name[aria-current="true"] { font-weight: bold; background: var(--comfy-menu-bg); }
.distill-chart .runs .facts { flex: 1; padding-left: 7px; opacity: 0.75; font-variant-numeric: tabular-nums; }
.distill-chart .panel > img { object-fit: contain; background: none; }
.distill-chart .panel > p { display: flex; align-items: center; justify-content: center; margin: 0; padding: 0 12px;
  box-sizing: border-box; text-align: center; white-space: normal; }
.distill-chart .foot { flex: none; display: flex; align-items: center; }
.distill-chart .foot button { border-color: var(--border-color); background: var(--comfy-menu-bg); }
.distill-chart .status { flex: 1; min-width: 0; min-height: 1.35em; white-space: nowrap; overflow: hidden; text-overflow: ellipsis;
  font-variant-numeric: tabular-nums; }
.distill-chart svg text { fill: var(--input-text); opacity: 0.75; font-size: 10px; }
.distill-chart svg .grid { stroke: var(--border-color); stroke-width: 1; }
.distill-chart svg path { fill: none; stroke: var(--series); stroke-linejoin: round; }
.distill-chart svg path.raw { opacity: 0.35; stroke-width: 0.8; }
.distill-chart svg path.band { opacity: 0.15; stroke: none; fill: var(--series); }
.distill-chart svg path.smooth { stroke-width: 1.8; }
.distill-chart svg path.smooth.series-total { stroke-width: 2.4; }
.distill-chart svg circle { fill: var(--series); }
.distill-chart svg .bar { fill: color-mix(in srgb, #3f7fe8 75%, var(--input-text)); }
.distill-chart svg .stage { stroke: var(--input-text); stroke-dasharray: 2 3; opacity: 0.6; }
.distill-chart svg .cursor { stroke: var(--input-text); opacity: 0.5; }
.distill-chart .series-total { --series: var(--input-text); }
${Object.entries(TERMS)
  .filter(([, colour]) => colour)
  .map(([term, colour]) => `.distill-chart .series-${term} { --series: color-mix(in srgb, ${colour} 75%, var(--input-text)); }`)
  .join("\n")}
`;

/** The current stage of a training of several experts, from the server's text. */
function sayStage(stage) {
  const range = /^range (\d+), timesteps (\d+) to (\d+)$/.exec(stage);
  return range ? say("range {0}, timesteps {1} to {2}", ...range.slice(1)) : say(stage);
}

function sayDuration(seconds) {
  const units = [["{0} d", 86400], ["{0} h", 3600], ["{0} min", 60], ["{0} s", 1]];
  const rounded = Math.round(seconds);
  const first = Math.max(0, units.findIndex(([, size]) => rounded >= size));
  if (rounded < 1) return say("{0} s", 0);
  const parts = units.slice(first, first + 2).map(([text, size], place) => {
    const of = place ? rounded % units[first][1] : rounded;
    return [text, Math.floor(of / size)];
  });
  return parts.filter(([, count], place) => !place || count).map(([text, count]) => say(text, count)).join(" ");
}

class Chart {
  constructor(node, drawsSamples) {
    this.node = node;
    this.views = ["Loss", "By timestep", ...(drawsSamples ? ["Samples"] : []), "Runs"];
    this.view = "Loss";
    this.log = true;
    this.pointer = null; // where it is over the lines, as a share of the width
    this.toggled = new Set(); // terms that were clicked an odd number of times
    this.loading = false;
    this._build();
    this.clear();
  }

  _build() {
    this.tabs = html("div", { class: "row", role: "group", "aria-label": say("Chart view") });
    this.legend = html("div", { class: "row legend", role: "group", "aria-label": say("Visible losses") });
    this.svg = element("svg", { role: "img" });
    this.picture = html("img", { draggable: "false" });
    this.hint = html("p");
    this.list = new RunList({
      choose: (name) => this._choose(name),
      changed: () => charts.forEach((chart) => chart.load()),
      ofExperts: this.node.comfyClass === "DistillTrainExperts",
    });
    this.panel = html("div", { class: "panel" }, this.svg, this.picture, this.list.element, this.hint);
    this.status = html("div", { class: "status" });
    this.foot = html("div", { class: "foot" }, this.status);
    this.element = html("div", { class: "distill-chart" }, this.tabs, this.panel, this.legend, this.foot);
    this.resized = new ResizeObserver(() => this.draw());
    this.viewButtons = this.views.map((view) => toggle(say(view), false, () => this._look(view)));
    this.logButton = toggle(say("Log scale"), true, () => this._set({ log: !this.log }));
    const words = { title: say("Stops what is running now, after the current step; every finished step is kept.") };
    this.stopButton = button(say("Stop and keep"), () => this._stopTraining(), words);
    this.foot.append(this.stopButton);
    this.tabs.append(...this.viewButtons, html("span", { class: "space" }), this.logButton);
    this.termButtons = new Map(
      Object.keys(TERMS).map((term) => {
        const swatch = html("span", { class: `swatch series-${term}` });
        const value = html("span");
        const button = toggle(` ${say(term)} `, true, () => this._toggleTerm(term), { "aria-label": say(term) }, swatch);
        button.append(value);
        this.legend.append(button);
        return [term, { button, value }];
      }),
    );
    this.svg.addEventListener("pointermove", (event) => {
      const box = this.svg.getBoundingClientRect();
      this._point((event.clientX - box.left) / box.width);
    });
    this.svg.addEventListener("pointerleave", () => this._point(null));
    this.element.addEventListener("keydown", (event) => {
      if (event.key === " " || event.key === "Enter") event.stopPropagation(); // the canvas uses these keys itself
    });
    this.element.addEventListener("wheel", (event) => this._passToCanvas(event, "processMouseWheel"), { passive: false });
    for (const [type, method] of [["pointerdown", "processMouseDown"], ["pointermove", "processMouseMove"], ["pointerup", "processMouseUp"]]) {
      this.element.addEventListener(type, (event) => {
        if (event.button === 1 || event.buttons & 4) this._passToCanvas(event, method);
      });
    }
  }

  /** Zooming and moving the graph works over the chart as it does beside it. */
  _passToCanvas(event, method) {
    if (window.LiteGraph?.vueNodesMode) return; // Vue nodes pass it on themselves
    event.preventDefault();
    app.canvas[method](event);
  }

  _set(changes) {
    Object.assign(this, changes);
    this.draw();
  }

  _look(view) {
    this._set({ view });
    if (view === "Runs") this.list.load();
  }

  /** Let the node train and show another run. */
  _choose(name) {
    const widget = this._nameWidget;
    widget.value = name;
    widget.callback?.(name);
    this.loadSoon();
    this._set({ view: "Loss" });
    this.viewButtons[0].focus();
    this.node.graph?.change?.();
  }

  async _stopTraining() {
    this._set({ stopping: true });
    await api.interrupt(this.progress.prompt);
  }

  _toggleTerm(term) {
    if (!this.toggled.delete(term)) this.toggled.add(term);
    this.draw();
  }

  _isLeftOut(term) {
    const saysNothing = SAY_NOTHING.includes(term) && Boolean(this.columns.mean.cosine_distance);
    return this.toggled.has(term) !== saysNothing;
  }

  // --- data

  /** Clear all data: there is no run. */
  clear() {
    this.steps = [];
    this.stages = [];
    this.columns = { mean: {}, min: {}, max: {} };
    this.missed = [];
    this.progress = null;
    this.running = this.stopping = false;
    this.totalSteps = null;
    this.setPicture(null);
    this._show(false);
  }

  get step() {
    return this.steps.at(-1) ?? 0;
  }

  get _runWidget() {
    return this.node.widgets?.find((widget) => widget.name === "run_name");
  }

  /** The widget that gives the name: the node's own, or that of the subgraph it is in; undefined if another node gives it. */
  get _nameWidget() {
    const input = inputInPlaceOf(this.node, "run_name");
    if (!input) return this._runWidget;
    const { host, name } = outside(this.node, input) ?? {};
    return host && !inputInPlaceOf(host, name) ? host.widgets.find((widget) => widget.name === name) : undefined;
  }

  /** Whether another node gives the name; then only the training's own events show it. */
  get _isNamedElsewhere() {
    return !this._nameWidget;
  }

  get runName() {
    return this._isNamedElsewhere ? this.toldName : this._nameWidget.value;
  }

  isOf(message) {
    if (!this._isNamedElsewhere) return message.run === this.runName;
    return message.prompt === ownPrompt && executionIds(this.node).includes(String(message.node));
  }

  _follow(name) {
    if (name === this.loadedName) return;
    this.clear();
    this.loadedName = name;
  }

  /** Load the run soon: the settings of the node may change several times at once. */
  loadSoon() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.load(), 50);
  }

  async load() {
    this._follow(this.runName);
    this.wanted = true;
    if (this.loading) return;
    this.loading = true;
    try {
      while (this.wanted && this.isOpen) {
        this.wanted = false;
        await this._load(this.loadedName);
      }
    } catch (error) {
      console.warn("the chart of a training could not be loaded:", error); // the shown data is still correct
    } finally {
      this.loading = false;
    }
  }

  async _load(name) {
    this.missed = [];
    if (!name) return;
    const response = await api.fetchApi(`/distill/runs/${encodeURIComponent(name)}`, { cache: "no-store" });
    if (!response.ok && response.status !== 404) throw new Error(`${response.status} ${response.statusText}`);
    const history = response.status === 200 ? await response.json() : null; // 204: no such run yet, 404: not a valid name
    if (name !== this.loadedName || !this.isOpen) return;
    if (!history) {
      if (!this.running) this.clear();
      return;
    }
    this.steps = history.points.step;
    this.columns = history.points;
    this.stages = history.stages;
    for (const points of this.missed) this._append(points);
    this.totalSteps = this.progress?.total_steps ?? history.total_steps;
    this.setPicture(history.sample);
    this._show(true);
  }

  /** Take in an event of the training. */
  tell(message) {
    if (message.ended) {
      this.stop();
      return;
    }
    this.toldName = message.run;
    this._follow(this.runName);
    this.progress = message;
    this.running = true;
    this.totalSteps = message.total_steps;
    if (message.after === null) this.load(); // the run may have gone back to an earlier step
    else if (this.loading) this.missed.push(message.points);
    else if (message.after > this.step || this.steps.length > MAX_POINTS) this.load();
    else this._append(message.points);
    if (message.sample) this.setPicture(message.sample);
    this._show(true);
  }

  _append(points) {
    const start = points.step.findIndex((step) => step > this.step);
    if (start < 0) return;
    const before = this.steps.length;
    this.steps.push(...points.step.slice(start));
    for (const [kind, columns] of Object.entries(this.columns).filter(([kind]) => kind !== "step")) {
      for (const name of new Set([...Object.keys(columns), ...Object.keys(points[kind])])) {
        columns[name] ??= Array(before).fill(null);
        columns[name].push(...(points[kind][name] ?? Array(points.step.length).fill(null)).slice(start));
      }
    }
  }

  /** The training has ended, whichever way. */
  stop() {
    if (!this.running) return;
    this.running = this.stopping = false;
    this.load();
    if (this.view === "Runs") this.list.load();
  }

  setPicture(sample) {
    const url = sample ? api.apiURL(`/view?${new URLSearchParams(sample)}`) : "";
    if (url === this.pictureUrl) return;
    this.pictureUrl = url;
    if (!url) this.picture.removeAttribute("src");
    else {
      this.picture.src = url;
      this.picture.alt = say("Teacher above, student below, step {0}", Number.parseInt(sample.filename, 10));
    }
  }

  // --- drawing

  _show(isRun) {
    this.isRun = isRun;
    this.element.toggleAttribute("data-run", isRun);
    this.draw();
  }

  draw() {
    if (!this.isOpen) return;
    if (this.runName !== this.loadedName) this.loadSoon(); // the widget of a subgraph does not tell its changes
    for (const [place, tab] of this.viewButtons.entries()) tab.setAttribute("aria-pressed", this.view === this.views[place]);
    const plots = this.view === "Loss" || this.view === "By timestep";
    const samples = this.view === "Samples";
    const lists = this.view === "Runs";
    this.logButton.setAttribute("aria-pressed", this.log);
    this.logButton.hidden = !plots || !this.isRun;
    this.stopButton.hidden = !this.running || !this.progress.seconds_left; // other nodes are running
    this.stopButton.disabled = this.stopping;
    this.legend.hidden = this.view !== "Loss";
    this.picture.hidden = !samples || !this.pictureUrl;
    this.svg.toggleAttribute("hidden", !plots);
    this.list.element.hidden = !lists;
    if (lists) this.list.show(this.runName, !this._isNamedElsewhere, this.running);
    this.nearest = null;
    let empty = samples && !this.pictureUrl;
    if (plots) {
      const size = { width: this.panel.clientWidth || 300, height: this.panel.clientHeight || 110, log: this.log };
      const plot = this.view === "Loss" ? lines(this.steps, this._series(), size, this._marks()) : bars(this._bins(), size);
      this.svg.setAttribute("viewBox", `0 0 ${size.width} ${size.height}`);
      this.svg.replaceChildren(...plot.elements);
      this.nearest = plot.nearest;
      empty = !plot.elements.length;
    }
    this.hint.hidden = !empty;
    this.hint.textContent = this._whyEmpty(samples);
    this._point(this.pointer);
    const newest = this.columns.mean.total?.at(-1);
    const about = `${say(this.view)}${newest == null ? "" : ` ${short(newest)}`}`;
    this.svg.setAttribute("aria-label", say("Run {0}: {1}", this.loadedName ?? "", about));
  }

  _whyEmpty(samples) {
    if (!this.isRun && this._isNamedElsewhere) return say("The chart appears when the training begins.");
    if (!this.isRun) return say("No run of this name yet. Queue to start it, or choose another under Runs.");
    if (samples) return say("No samples yet. They need a VAE, null_caption and, with a recipe, its sample_every_steps.");
    return say("No measurements yet.");
  }

  /** Where the stages of several experts begin, but for the first. */
  _marks() {
    return this.stages.slice(1).map(({ name, after }) => {
      const [, number] = /^range_(\d+)$/.exec(name) ?? [];
      return { step: after, text: number ? say("range {0}", number) : say("all timesteps") };
    });
  }

  _series() {
    const { mean, min, max } = this.columns;
    return Object.keys(TERMS)
      .toReversed()
      .filter((name) => mean[name] && !this._isLeftOut(name))
      .map((name) => ({ name, mean: mean[name], min: min[name], max: max[name] }));
  }

  /** The newest loss of each range of timesteps. */
  _bins() {
    const names = Object.keys(this.columns.mean).filter((name) => name.startsWith("timesteps/"));
    const start = (name) => Number.parseInt(name.slice("timesteps/".length), 10);
    return names
      .sort((one, other) => start(one) - start(other))
      .map((name) => {
        const newest = this.columns.mean[name].filter((value) => value != null).slice(-NEWEST_POINTS);
        const value = newest.length ? newest.reduce((sum, each) => sum + each, 0) / newest.length : null;
        return { label: name.slice("timesteps/".length), value };
      });
  }

  _drawLegend(index) {
    for (const [term, { button, value }] of this.termButtons) {
      const values = this.columns.mean[term];
      button.hidden = !values;
      button.setAttribute("aria-pressed", !this._isLeftOut(term));
      let place = index;
      while (place > 0 && values?.[place] == null) place--;
      value.textContent = values?.[place] == null ? "" : short(values[place]);
    }
  }

  _drawStatus(step = null) {
    const parts = [];
    if (step !== null) parts.push(say("step {0}", step));
    else if (this.isRun) {
      const done = Math.max(this.step, this.running ? this.progress.step : 0);
      parts.push(this.totalSteps ? say("step {0} of {1}", done, this.totalSteps) : say("step {0}", done));
      if (this.stopping) parts.push(say("stopping"));
      else if (this.running) parts.push(...this._pace());
    }
    this.status.textContent = parts.join(" · ");
    this.status.title = this.status.textContent;
  }

  /** Speed, time left, memory and stage, while it trains. After its last step, other nodes may still be running. */
  _pace() {
    const { seconds_per_step: seconds, seconds_left: left, memory, stage } = this.progress;
    if (!left) return [];
    const [used, total] = memory.map((bytes) => (bytes / 2 ** 30).toFixed(1));
    return [
      seconds < 1 ? say("{0} steps/s", short(1 / seconds)) : say("{0} s/step", short(seconds)),
      say("{0} left", sayDuration(left)),
      say("{0} of {1} GiB", used, total),
      ...(stage ? [sayStage(stage)] : []),
    ];
  }

  /** Show the values of the step under the pointer in the legend; share: of the width, null without a pointer. */
  _point(share) {
    this.pointer = share;
    this.svg.querySelector(".cursor")?.remove();
    const at = share === null ? null : this.nearest?.(share);
    this._drawLegend(at ? at.index : this.steps.length - 1);
    this._drawStatus(at ? this.steps[at.index] : null);
    if (at) this.svg.append(element("line", { class: "cursor", x1: at.x, x2: at.x, y1: at.top, y2: at.bottom }));
  }

  // --- on the node

  open() {
    this.isOpen = true;
    charts.add(this);
    this.resized.observe(this.panel);
    this.loadSoon();
  }

  close() {
    this.isOpen = false;
    charts.delete(this);
    clearTimeout(this.timer);
    this.resized.disconnect();
  }
}

const charts = new Set();
let ownPrompt = null; // what of this page's own runs on the server, which tells it to no other page

for (const begins of ["execution_start", "progress_state"]) {
  // the second alone comes after a reload
  api.addEventListener(begins, ({ detail }) => (ownPrompt = detail.prompt_id));
}
api.addEventListener("distill.progress", ({ detail }) => {
  for (const chart of charts) if (chart.isOf(detail)) chart.tell(detail);
});
for (const end of ["execution_success", "execution_error", "execution_interrupted", "reconnected"]) {
  api.addEventListener(end, () => charts.forEach((chart) => chart.stop()));
}

function closeLeftBehind() {
  for (const chart of charts) if (isLeftBehind(chart.node)) chart.close();
}
api.addEventListener("graphChanged", closeLeftBehind);

app.registerExtension({
  name: "distill.chart",

  init() {
    document.head.append(html("style", {}, STYLE));
  },

  nodeCreated(node) {
    const drawsSamples = DRAWS_SAMPLES[node.comfyClass];
    if (drawsSamples === undefined) return;
    const chart = new Chart(node, drawsSamples);
    const options = { serialize: false, hideOnZoom: false, getMinHeight: () => HEIGHT };
    chart.widget = node.addDOMWidget("distill_chart", "distill_chart", chart.element, options);
    chart.widget.serialize = false; // keeps it out of the graph; the option above keeps it out of the prompt
    node.hideOutputImages = true; // the image of the curve is for users of the API
    node.onDrawBackground = () => {};
    after(node, "onAdded", () => chart.open());
    after(node, "onRemoved", () => chart.close());
    after(node, "onConfigure", () => chart.loadSoon());
    after(chart._runWidget, "callback", () => chart.loadSoon());
  },

  afterConfigureGraph: closeLeftBehind,
});
