// The notes and titles of the example workflows, in the language of the front end.

import { app } from "../../../scripts/app.js";
import { language } from "./words.js";

const TRANSLATED = ["zh"];
const NONE = { titles: {}, notes: {} };
const read = new Map(); // language -> its texts, on their way

function texts(language) {
  if (!read.has(language)) {
    const file = new URL(`../workflows.${language}.json`, import.meta.url);
    const answer = fetch(file).then((answer) => (answer.ok ? answer.json() : NONE));
    read.set(language, answer.catch(() => NONE));
    answer.catch(() => read.delete(language)); // a server that was away may come back
  }
  return read.get(language);
}

/** Translate a workflow that still has one of our notes, word for word; what people wrote themselves stays. */
async function translate(graph) {
  const { titles, notes } = await texts(language());
  const written = graph.nodes.flatMap((node) => (node.type.endsWith("Note") ? node.widgets?.slice(0, 1) : null) ?? []);
  const ours = written.filter(({ value }) => Object.hasOwn(notes, value));
  if (!ours.length) return;
  for (const note of ours) note.value = notes[note.value];
  for (const titled of [...graph.nodes, ...graph.groups]) {
    if (Object.hasOwn(titles, titled.title)) titled.title = titles[titled.title];
  }
  graph.setDirtyCanvas(true, true);
}

app.registerExtension({
  name: "distill.templates",
  async afterConfigureGraph() {
    if (TRANSLATED.includes(language())) await translate(app.graph);
  },
});
