// Votes between the images of the first model and of each other model, from the same seed; names are shown at the end only.
(() => {
  const { title, id, models, seeds, images } = JSON.parse(document.getElementById("votes-images").textContent);
  const Z = 1.959964; // of a 95 % interval
  const page = document.getElementById("votes");
  const key = `distill-votes-${id}`;
  let state = kept() ?? begun();

  // Votes that are not finished; the next voter on a browser begins anew.
  function kept() {
    try {
      const found = JSON.parse(localStorage.getItem(key));
      return found?.ended ? null : found;
    } catch {
      return null; // a browser that keeps nothing for files
    }
  }

  function keep() {
    try {
      localStorage.setItem(key, JSON.stringify(state));
    } catch {
      // The votes last as long as the page.
    }
  }

  function begun() {
    const pairs = [];
    for (let model = 1; model < models.length; model++)
      seeds.forEach((_, seed) => pairs.push({ model, seed, firstIsLeft: Math.random() < 0.5 }));
    for (let place = pairs.length - 1; place > 0; place--) {
      const other = Math.floor(Math.random() * (place + 1));
      [pairs[place], pairs[other]] = [pairs[other], pairs[place]];
    }
    return { pairs, votes: [], ended: false };
  }

  function vote(side) {
    const { firstIsLeft } = state.pairs[state.votes.length];
    state.votes.push(side === "equal" ? "equal" : (side === "left") === firstIsLeft ? "first" : "other");
    state.ended = state.votes.length === state.pairs.length;
    show();
  }

  // Wilson 1927, with equal votes as half a vote for each.
  function interval(share, count) {
    const center = share + (Z * Z) / (2 * count);
    const reach = Z * Math.sqrt((share * (1 - share)) / count + (Z * Z) / (4 * count * count));
    return [(center - reach) / (1 + (Z * Z) / count), (center + reach) / (1 + (Z * Z) / count)];
  }

  function counted(model) {
    const found = { other: 0, first: 0, equal: 0 };
    state.votes.forEach((winner, place) => state.pairs[place].model === model && found[winner]++);
    const count = found.other + found.first + found.equal;
    const share = count ? (found.other + found.equal / 2) / count : null;
    return { model: models[model], ...found, count, share, interval: count ? interval(share, count) : null };
  }

  function add(parent, tag, text = "", properties = {}) {
    const element = Object.assign(document.createElement(tag), properties);
    element.textContent = text;
    parent.append(element);
    return element;
  }

  function button(parent, text, act, disabled = false) {
    return add(parent, "button", text, { type: "button", onclick: act, disabled });
  }

  function show() {
    keep();
    page.replaceChildren();
    (state.ended ? showResult : showPair)();
  }

  function showPair() {
    const place = state.votes.length;
    const { model, seed, firstIsLeft } = state.pairs[place];
    add(page, "p", `Pair ${place + 1} of ${state.pairs.length}: which image is better?`);
    const both = add(page, "div", "", { className: "pair" });
    for (const [side, isFirst] of [["left", firstIsLeft], ["right", !firstIsLeft]]) {
      const choice = button(both, "", () => vote(side));
      choice.title = `The ${side} one is better`;
      add(choice, "img", "", { src: images[isFirst ? 0 : model][seed], alt: `The ${side} image` });
    }
    const row = add(page, "p", "", { className: "choices" });
    button(row, "← Left", () => vote("left"));
    button(row, "↓ Equal", () => vote("equal"));
    button(row, "Right →", () => vote("right"));
    button(row, "Back", back, !place);
    button(row, "Finish", end, !place);
  }

  function back() {
    state.votes.pop();
    show();
  }

  function end() {
    state.ended = true;
    show();
  }

  const percent = (share) => `${Math.round(100 * share)} %`;

  function said({ model, share, interval: [low, high], count }) {
    const measured = `${percent(share)} of ${count} vote${count === 1 ? "" : "s"} (95 % interval ${percent(low)} to ${percent(high)})`;
    const verdict = low > 0.5 ? `${model} is preferred` : high < 0.5 ? `${models[0]} is preferred` : "no clear difference";
    return `${model} against ${models[0]}: ${verdict}. ${model} has ${measured}; a tie counts as half a vote.`;
  }

  function showResult() {
    const found = models.slice(1).map((_, number) => counted(number + 1));
    const judged = found.filter(({ count }) => count);
    judged.forEach((one) => add(page, "p", said(one)));
    const table = add(page, "table");
    const head = add(add(table, "thead"), "tr");
    for (const name of ["model", "better", `${models[0]} better`, "equal"]) add(head, "th", name);
    const body = add(table, "tbody");
    for (const one of judged) {
      const row = add(body, "tr");
      for (const cell of [one.model, one.other, one.first, one.equal]) add(row, "td", String(cell));
    }
    const row = add(page, "p", "", { className: "choices" });
    const told = JSON.stringify({ title, models: found, pairs: state.pairs.slice(0, state.votes.length).map(
      ({ model, seed, firstIsLeft }, place) => ({ model: models[model], seed: seeds[seed], firstIsLeft, vote: state.votes[place] })) }, null, 1);
    const link = add(row, "a", "Save the votes", { download: "votes.json" });
    link.href = `data:application/json,${encodeURIComponent(told)}`;
    button(row, "Start again", () => { state = begun(); show(); });
  }

  const KEYS = { ArrowLeft: "left", ArrowDown: "equal", ArrowRight: "right" };
  document.addEventListener("keydown", (event) => {
    const changed = event.altKey || event.ctrlKey || event.metaKey || event.shiftKey; // such as Alt and ←, which goes back a page
    if (!state.ended && KEYS[event.key] && !event.repeat && !changed) {
      event.preventDefault();
      vote(KEYS[event.key]);
    }
  });
  show();
})();
