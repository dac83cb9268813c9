// The notes and titles of the example workflows, in the language of the front end.

import { app } from "../../../scripts/app.js";
import { language } from "./words.js";

const TRANSLATED = ["zh"];
const read = new Map(); // language -> its texts, on their way

function texts(language) {
  if (!read.has(language)) {
    const file = new URL(`../workflows.${language}.json`, import.meta.url);
    read.set(language, fetch(file).then((answer) => (answer.ok ? answer.json() : { titles: {}, notes: {} })));
  }
  return read.get(language);
}

/** Translate a workflow that still has one of our notes, word for word; what people wrote themselves stays. */
async function translate(graph) {
  const { titles, notes } = await texts(language());
  const written = graph.nodes.flatMap((node) => (node.type.endsWith("Note") ? node.widgets?.slice(0, 1) : null) ?? []);
  const ours = written.filter(({ value }) => value in notes);
  if (!ours.length) return;
  for (const note of ours) note.value = notes[note.value];
  for (const titled of [...graph.nodes, ...graph.groups]) titled.title = titles[titled.title] ?? titled.title;
  graph.setDirtyCanvas(true, true);
}

app.registerExtension({
  name: "distill.templates",
  async afterConfigureGraph() {
    if (TRANSLATED.includes(language())) await translate(app.graph);
  },
});
