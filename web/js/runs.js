// The runs on the server's disk: a list to choose from, to copy a path from, and to delete from.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { button, html, say, sayBytes } from "./words.js";

export class RunList {
  /** choose: called with a run's name; changed: after one was deleted; ofExperts: whether the node trains experts. */
  constructor({ choose, changed, ofExperts }) {
    Object.assign(this, { choose, changed, ofExperts });
    this.runs = null;
    this.told = html("p", { role: "status" });
    this.rows = html("ul", { "data-capture-wheel": "true" });
    this.newButton = button(say("New run"), () => choose(freeName(this.chosen, this.runs)));
    this.element = html("div", { class: "runs" }, html("div", { class: "row" }, this.newButton, this.told), this.rows);
    this.rows.addEventListener("wheel", (event) => this._scroll(event));
  }

  async load() {
    try {
      this.runs = await (await asked("/distill/runs", { cache: "no-store" })).json();
      this.told.textContent = this.runs.length ? "" : say("No runs yet.");
    } catch (error) {
      this.told.textContent = String(error.message);
    }
    this.draw();
  }

  /** chosen: name of the run that is shown; free: whether another can be chosen here; trains: whether it trains now. */
  show(chosen, free, trains) {
    if (chosen === this.chosen && free === this.free && trains === this.trains) return; // drawn anew, its buttons lose the focus
    Object.assign(this, { chosen, free, trains });
    this.draw();
  }

  draw() {
    const focused = document.activeElement?.getAttribute("aria-label");
    const scrolled = this.rows.scrollTop;
    this.newButton.disabled = !this.free || !this.runs;
    this.newButton.title = this.free ? "" : say("Another node gives the name.");
    this.rows.replaceChildren(...(this.runs ?? []).map((run) => this._row(run)));
    this.rows.scrollTop = scrolled;
    if (focused) [...this.rows.querySelectorAll("button")].find((one) => one.getAttribute("aria-label") === focused)?.focus();
  }

  _row({ run, kind, step, total_steps, bytes, path }) {
    const name = button(run, () => this.choose(run), { class: "name", "aria-label": run, "aria-current": run === this.chosen });
    name.disabled = !this.free || (kind !== "" && (kind === "experts") !== this.ofExperts);
    const done = total_steps ? say("step {0} of {1}", step, total_steps) : say("step {0}", step);
    const facts = [done, say(kind), sayBytes(bytes)].filter(Boolean).join(" · ");
    const copy = button(say("Copy path"), () => this._copy(path), { title: path, "aria-label": `${say("Copy path")}: ${run}` });
    copy.disabled = !path;
    const remove = button(say("Delete"), () => this._delete(run, bytes), { "aria-label": `${say("Delete")}: ${run}` });
    remove.disabled = this.trains && run === this.chosen;
    return html("li", {}, name, html("span", { class: "facts" }, facts), copy, remove);
  }

  /** The list takes a turn of the wheel itself, unless it has nothing to scroll or the graph is to be zoomed. */
  _scroll(event) {
    if (event.ctrlKey || this.rows.scrollHeight <= this.rows.clientHeight) return;
    event.stopPropagation();
    event.preventDefault();
    this.rows.scrollTop += event.deltaY;
  }

  async _copy(path) {
    try {
      await navigator.clipboard.writeText(path);
      this.told.textContent = say("Copied.");
    } catch {
      this.told.textContent = path; // a page without a secure connection may not write to the clipboard
    }
  }

  async _delete(run, bytes) {
    const confirmed = await app.extensionManager.dialog.confirm({
      title: say("Delete run"),
      message: say("Delete run {0} and all its checkpoints ({1})? Models that were saved from it stay.", run, sayBytes(bytes)),
      type: "delete",
    });
    if (!confirmed) return;
    let told;
    try {
      await asked(`/distill/runs/${encodeURIComponent(run)}`, { method: "DELETE" });
      told = say("Deleted {0}.", run);
    } catch (error) {
      told = String(error.message);
    }
    await this.load();
    this.told.textContent = told;
    this.changed(run);
  }
}

/** The server's answer; an error with its reason if it refuses. */
async function asked(route, options) {
  const response = await api.fetchApi(route, options);
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({}));
  throw new Error(error ?? `${response.status} ${response.statusText}`);
}

/** `student-2` for `student`, if that is the first that no run has; upper and lower case are one on some disks. */
function freeName(name, runs) {
  const taken = new Set(runs.map(({ run }) => run.toLowerCase()));
  const base = (name || "student").replace(/-\d\d?$/, "");
  let free = base;
  for (let number = 2; taken.has(free.toLowerCase()); number++) free = `${base}-${number}`;
  return free;
}
