// The runs on the server's disk: a list to choose from, to copy a path from, and to delete from.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { button, html, say, sayBytes } from "./words.js";

export class RunList {
  /** choose: called with a run's name; changed: after one was deleted. */
  constructor(choose, changed) {
    this.choose = choose;
    this.changed = changed;
    this.runs = [];
    this.told = html("p", { role: "status" });
    this.rows = html("ul");
    this.newButton = button(say("New run"), () => choose(freeName(this.chosen, this.runs.map(({ run }) => run))));
    this.element = html("div", { class: "runs" }, html("div", { class: "row" }, this.newButton, this.told), this.rows);
  }

  async load() {
    const response = await api.fetchApi("/distill/runs", { cache: "no-store" });
    if (!response.ok) throw new Error(`${response.status} ${response.statusText}`);
    this.runs = await response.json();
    this.draw();
  }

  /** chosen: name of the run that is shown; free: whether another can be chosen here; trains: whether it trains now. */
  show(chosen, free, trains) {
    if (chosen === this.chosen && free === this.free && trains === this.trains) return; // drawn anew, its buttons lose the focus
    Object.assign(this, { chosen, free, trains });
    this.draw();
  }

  /** Whether the list takes a turn of the wheel itself. */
  scrolls(event) {
    return this.rows.contains(event.target) && this.rows.scrollHeight > this.rows.clientHeight;
  }

  draw() {
    this.newButton.disabled = !this.free;
    this.newButton.title = this.free ? "" : say("Another node gives the name.");
    this.rows.replaceChildren(...this.runs.map((run) => this._row(run)));
    this.told.textContent = this.runs.length ? "" : say("No runs yet.");
  }

  _row({ run, kind, step, total_steps, bytes, path }) {
    const name = button(run, () => this.choose(run), { class: "name", "aria-current": run === this.chosen });
    name.disabled = !this.free;
    const done = total_steps ? say("step {0} of {1}", step, total_steps) : say("step {0}", step);
    const facts = [done, say(kind), sayBytes(bytes)].filter(Boolean).join(" · ");
    const copy = button(say("Copy path"), () => this._copy(path), { title: path, "aria-label": `${say("Copy path")}: ${run}` });
    copy.disabled = !path;
    const remove = button(say("Delete"), () => this._delete(run, bytes), { "aria-label": `${say("Delete")}: ${run}` });
    remove.disabled = this.trains && run === this.chosen;
    return html("li", {}, name, html("span", { class: "facts" }, facts), copy, remove);
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
    const response = await api.fetchApi(`/distill/runs/${encodeURIComponent(run)}`, { method: "DELETE" });
    const reason = response.status === 409 ? (await response.json()).error : "";
    await this.load();
    this.told.textContent = reason || say("Deleted {0}.", run);
    this.changed(run);
  }
}

/** `student-2` for `student`, if that is the first that no run has. */
function freeName(name, taken) {
  const base = (name || "student").replace(/-\d+$/, "");
  if (!taken.includes(base)) return base;
  let number = 2;
  while (taken.includes(`${base}-${number}`)) number++;
  return `${base}-${number}`;
}
