// The charts of the chosen runs: both losses in one, every other field in one of its own.
import { byId, element, show } from "./text.js";
import { color, makeChart } from "./chart.js";
import { COLORS, colorOf } from "./table.js";

const TITLES = { lr: "learning rate", tok_s: "tokens per second", grad_norm: "gradient norm" };
const FROM_ZERO = ["lr", "tok_s"];
const UNITS = { step: "step", tokens: "tokens", time: "hours" };
const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3]];
const charts = new Map();

export function showCharts(curves, names, chosen, view, zoom) {
  const full = { ...view, unit: UNITS[view.axis] };
  if (!charts.has("loss")) charts.set("loss", placed(makeChart("Loss in nats per token: training thin, validation thick with dots", { height: 340, zoom }), "loss"));
  charts.get("loss").draw(chosen.flatMap((id) => lossLines(curves[id] ?? {}, names.get(id), styleOf(chosen, id), view)), full);
  const fields = new Set(chosen.flatMap((id) => Object.keys(curves[id]?.train ?? {})).filter((name) => name !== "loss"));
  for (const name of fields)
    if (!charts.has(`train ${name}`))
      charts.set(`train ${name}`, placed(makeChart(TITLES[name] ?? name, { height: 190, fromZero: FROM_ZERO.includes(name), zoom }), "others"));
  for (const [key, chart] of charts)
    if (key !== "loss") {
      const field = key.slice("train ".length);
      chart.draw(chosen.flatMap((id) => lines(curves[id]?.train?.[field], names.get(id), styleOf(chosen, id), view)), full);
    }
}

function placed(chart, place) {
  byId(place).append(chart.host);
  return chart;
}

export function styleOf(chosen, id) {
  const at = chosen.indexOf(id);
  return { color: color(`c${colorOf(chosen, id)}`), dash: DASHES[Math.floor(at / COLORS) % DASHES.length] };
}

function lossLines(splits, name, style, view) {
  const validation = splits.validation?.loss?.shown;
  return [
    ...lines(splits.train?.loss, `${name} training`, style, view),
    ...(validation ? [{ label: `${name} validation`, ...style, width: 2.5, dots: validation.y.length <= 200, xs: validation[view.axis], ys: validation.y }] : []),
  ];
}

// A series as it was written, pale behind its smoothed form where that differs.
function lines(series, label, style, view) {
  if (!series) return [];
  const { shown } = series;
  const means = series.mean ?? shown;
  const reach = Math.floor((means.y.length * view.smoothing) / 200);
  const plain = { label, ...style, width: 1.25, xs: shown[view.axis], ys: shown.y };
  if (!reach) return [plain];
  return [{ ...plain, width: 1, pale: true }, { ...plain, width: 1.5, xs: means[view.axis], ys: smoothed(means.y, reach) }];
}

export function smoothed(values, reach) {
  const sums = [0];
  for (const value of values) sums.push(sums[sums.length - 1] + value);
  return values.map((_, at) => {
    const low = Math.max(0, at - reach);
    const high = Math.min(values.length, at + reach + 1);
    return (sums[high] - sums[low]) / (high - low);
  });
}

export function showLegend(runs, labels, chosen, drop) {
  show(byId("legend"), ...chosen.filter((id) => runs.has(id)).map((id) => {
    const run = runs.get(id);
    const about = [labels[id], run.note].filter(Boolean).join(", ");
    return element("li", {},
      element("span", { class: `swatch color${colorOf(chosen, id)}`, "aria-hidden": "true" }),
      element("span", { class: "name" }, run.name), about ? element("span", { class: "about" }, about) : "",
      element("button", { type: "button", class: "drop", "aria-label": `Hide ${run.name}`, click: () => drop(id) }, "×"));
  }));
}
