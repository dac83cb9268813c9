// Lines and bars as SVG elements, which take their colours from the style sheet and stay sharp at any zoom.

const MARGIN = { left: 42, right: 8, top: 6, bottom: 16 };
const TICK_DISTANCE_X = 70;
const TICK_DISTANCE_Y = 26;

/** Bias-corrected geometric EMA over about `span` values; null where there is no measurement. */
export function smooth(values, span) {
  const keep = 1 - 1 / Math.max(1, span);
  let average = 0;
  let weight = 0;
  return values.map((value) => {
    if (value == null) return null;
    average = keep * average + (1 - keep) * Math.log(Math.max(value, 1e-12));
    weight = keep * weight + (1 - keep);
    return Math.exp(average / weight);
  });
}

/** Labels of an axis, all in one format. */
function labels(ticks) {
  const sizes = ticks.map(Math.abs).filter((size) => size > 0);
  const [least, most] = [Math.min(...sizes), Math.max(...sizes)];
  if (most >= 1e4) {
    const [unit, letter] = most >= 1e6 ? [1e6, "M"] : [1e3, "k"];
    return ticks.map((tick) => (tick ? `${+(tick / unit).toPrecision(3)}${letter}` : "0"));
  }
  if (least < 1e-3) return ticks.map((tick) => (tick ? tick.toExponential(1) : "0"));
  return ticks.map((tick) => String(+tick.toPrecision(3)));
}

/** `0.0312`, `1.2e-5`, `120k`. */
export function short(value) {
  const size = Math.abs(value);
  if (size >= 1e4) return size >= 1e6 ? `${+(value / 1e6).toPrecision(3)}M` : `${+(value / 1e3).toPrecision(3)}k`;
  if (size >= 1e-3 || size === 0) return String(+value.toPrecision(3));
  return value.toExponential(1);
}

/**
 * Lines over steps: points faint, their EMA bold, and the extremes of points that stand for several steps as a band.
 *
 * series: of `{name, mean, min, max}`, lists as long as `steps`; a class `series-<name>` gives the colour. marks: of
 * `{step, text}`, an upright line each.
 * Returns the elements, and `nearest`: share of the width -> index and x of the nearest point.
 */
export function lines(steps, series, { width, height, log }, marks = []) {
  const measured = series.flatMap(({ min, max }) => [...min, ...max]).filter((value) => value != null && (!log || value > 0));
  if (!measured.length) return { elements: [], nearest: () => null };
  const x = scale([steps[0], steps.at(-1)], [MARGIN.left, width - MARGIN.right], false);
  const axis = vertical(measured, height, log);
  const elements = [...horizontalGrid(axis, width), ...stepLabels(steps, x, width, height)];
  for (const { step, text } of marks.filter(({ step }) => step > steps[0] && step < steps.at(-1))) {
    const at = { x1: px(x(step)), x2: px(x(step)), y1: MARGIN.top, y2: height - MARGIN.bottom };
    elements.push(element("line", { class: "stage", ...at }));
    elements.push(element("text", { class: "stage-name", x: px(x(step) + 3), y: MARGIN.top + 8 }, text));
  }
  for (const { name, mean, min, max } of series) {
    const places = mean.map((_, index) => index).filter((index) => mean[index] != null);
    const path = (values) => "M" + places.map((index) => `${px(x(steps[index]))} ${px(axis.y(values[index]))}`).join("L");
    if (places.some((index) => min[index] < max[index])) {
      const back = places.toReversed().map((index) => `${px(x(steps[index]))} ${px(axis.y(min[index]))}`);
      elements.push(element("path", { class: `band series-${name}`, d: `${path(max)}L${back.join("L")}Z` }));
    }
    elements.push(element("path", { class: `raw series-${name}`, d: path(mean) }));
    elements.push(element("path", { class: `smooth series-${name}`, d: path(smooth(mean, Math.floor(places.length / 40))) }));
    if (places.length < 40) {
      const radius = places.length < 10 ? 2.5 : 1.5;
      for (const index of places) {
        elements.push(element("circle", { class: `series-${name}`, cx: px(x(steps[index])), cy: px(axis.y(mean[index])), r: radius }));
      }
    }
  }
  const nearest = (share) => {
    const distances = steps.map((step) => Math.abs(x(step) - share * width));
    const index = distances.indexOf(Math.min(...distances));
    return { index, x: x(steps[index]), top: MARGIN.top, bottom: height - MARGIN.bottom };
  };
  return { elements, nearest };
}

/** Bars of `{label, value}`, each with its value in a tooltip; those without a value stay empty. */
export function bars(items, { width, height, log }) {
  const measured = items.map(({ value }) => value).filter((value) => value != null && (!log || value > 0));
  if (!measured.length) return { elements: [], nearest: () => null };
  const axis = vertical([log ? Math.min(...measured) / 2 : 0, ...measured], height, log);
  const elements = horizontalGrid(axis, width);
  const room = (width - MARGIN.left - MARGIN.right) / items.length;
  for (const [index, { label, value }] of items.entries()) {
    const left = MARGIN.left + index * room;
    const name = label.split("-")[0];
    if (room >= 24 || index % Math.ceil(24 / room) === 0) {
      elements.push(element("text", { x: px(left + room / 2), y: height - 4, "text-anchor": "middle" }, name));
    }
    if (value == null) continue;
    const top = Math.min(axis.y(value), height - MARGIN.bottom - 1);
    const shape = { class: "bar", x: px(left + 1), y: px(top), width: px(room - 2), height: px(height - MARGIN.bottom - top), rx: 2 };
    elements.push(element("rect", shape, element("title", {}, `${label}: ${short(value)}`)));
  }
  return { elements, nearest: () => null };
}

export function element(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const px = (value) => value.toFixed(1);

function scale([low, high], [from, to], log) {
  const place = log ? Math.log : (value) => value;
  const span = place(high) - place(low) || 1;
  return (value) => from + ((place(Math.max(value, log ? low : -Infinity)) - place(low)) / span) * (to - from);
}

/** The axis of losses: `y` of a value, and where its ticks are. */
function vertical(values, height, log) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  if (log) [low, high] = [low / 1.1, high * 1.1];
  else [low, high] = [low >= 0 ? 0 : low, high * 1.05 || 1];
  const count = Math.max(2, Math.floor((height - MARGIN.top - MARGIN.bottom) / TICK_DISTANCE_Y));
  return {
    y: scale([low, high], [height - MARGIN.bottom, MARGIN.top], log),
    ticks: log ? logTicks(low, high, count) : evenTicks(low, high, count),
  };
}

function evenTicks(low, high, count) {
  const least = (high - low) / count || 1;
  const magnitude = 10 ** Math.floor(Math.log10(least));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * magnitude).find((candidate) => candidate >= least * 0.999);
  const ticks = [];
  for (let number = Math.ceil(low / step); number * step <= high; number++) ticks.push(number * step);
  return ticks;
}

function logTicks(low, high, count) {
  const decades = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) decades.push(10 ** power);
  for (const factors of [[1, 2, 3, 5, 7], [1, 2, 5], [1, 3], [1]]) {
    const ticks = decades.flatMap((decade) => factors.map((factor) => factor * decade)).filter((tick) => tick >= low && tick <= high);
    if (ticks.length <= count) return ticks.length >= 2 ? ticks : evenTicks(low, high, count);
  }
  const every = Math.ceil(decades.length / count);
  return decades.filter((tick, index) => index % every === 0 && tick >= low && tick <= high);
}

function horizontalGrid({ y, ticks }, width) {
  const words = labels(ticks);
  return ticks.flatMap((tick, place) => [
    element("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: px(y(tick)), y2: px(y(tick)) }),
    element("text", { x: MARGIN.left - 4, y: px(y(tick) + 3.5), "text-anchor": "end" }, words[place]),
  ]);
}

function stepLabels(steps, x, width, height) {
  const count = Math.max(1, Math.floor((width - MARGIN.left) / TICK_DISTANCE_X));
  const found = evenTicks(steps[0], steps.at(-1), count).filter(Number.isInteger);
  const ticks = found.length ? found : [steps[0]];
  const words = labels(ticks);
  return ticks.map((tick, place) =>
    element("text", { x: px(x(tick)), y: height - 4, "text-anchor": x(tick) > width - 24 ? "end" : "middle" }, words[place]),
  );
}
