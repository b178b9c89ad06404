// One chart: lines of several runs over one axis, with a cursor that the mouse and the keyboard move.
import { element, figure } from "./text.js";

const DARK = matchMedia("(prefers-color-scheme: dark)");
export const onTheme = (redraw) => DARK.addEventListener("change", redraw);

export function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

// A chart is built once; `draw` then shows lines ({label, color, width, dash, dots, pale, xs, ys}) in it.
export function makeChart(title, { height, fromZero, zoom }) {
  const place = element("div", { class: "plot" });
  const readout = element("p", { class: "readout", "aria-live": "polite" });
  const help = "Left and right move along the curves, plus and minus zoom, 0 shows all.";
  const frame = element("div", { class: "chart", tabindex: 0, role: "application", "aria-label": `${title}. ${help}` }, place);
  const host = element("figure", {}, element("figcaption", {}, title), frame, readout);
  const chart = { host, plot: null, key: "", lines: [], axis: "" };
  chart.draw = (lines, view) => drawLines(chart, lines, view, { place, readout, height, fromZero, zoom });
  frame.addEventListener("keydown", (event) => pressed(chart, event, zoom));
  new ResizeObserver(() => {
    if (chart.plot && place.clientWidth) chart.plot.setSize({ width: place.clientWidth, height: heightOf(place, height) });
  }).observe(place);
  return chart;
}

function heightOf(place, height) {
  return Math.round(Math.min(height * 1.8, Math.max(height * 0.75, place.clientWidth * 0.36)));
}

function drawLines(chart, lines, view, parts) {
  const usable = lines.filter((line) => line.xs.length);
  chart.host.hidden = usable.length === 0;
  if (!usable.length) return;
  const data = uPlot.join(usable.map((line) => sortedPairs(line.xs, view.log ? line.ys.map((y) => (y > 0 ? y : null)) : line.ys)));
  const styles = usable.map(({ label, color: own, width, dash, dots, pale }) => [label, own, width, dash, dots, pale]);
  const key = JSON.stringify([styles, view.axis, view.log, color("text")]);
  chart.lines = usable;
  chart.view = view;
  if (key === chart.key) {
    chart.plot.setData(data);
    return;
  }
  chart.plot?.destroy();
  chart.key = key;
  chart.plot = new uPlot(options(chart, parts), data, parts.place);
}

// uPlot joins series by x, which must not fall.
function sortedPairs(xs, ys) {
  const pairs = xs.map((x, at) => [x, ys[at]]).filter(([x]) => x !== null);
  if (pairs.some(([x], at) => at && x < pairs[at - 1][0])) pairs.sort((one, other) => one[0] - other[0]);
  return [pairs.map(([x]) => x), pairs.map(([, y]) => y)];
}

function options(chart, { place, readout, height, fromZero, zoom }) {
  const axis = { stroke: color("text"), font: "12px system-ui, sans-serif", grid: { stroke: color("grid"), width: 1 }, ticks: { stroke: color("grid"), width: 1 } };
  const low = (min) => (fromZero && !chart.view.log ? Math.min(0, min) : min);
  const y = chart.view.log ? { distr: 3 } : { range: (_, min, max) => (min === null ? [0, 1] : uPlot.rangeNum(low(min), max, 0.06, true)) };
  return {
    width: place.clientWidth || 320,
    height: heightOf(place, height),
    legend: { show: false },
    cursor: { sync: { key: "runs" }, drag: { setScale: false }, points: { size: 7 } },
    scales: { x: { time: false, range: (_, min, max) => chart.view.window ?? (min === max ? [min - 1, max + 1] : [min, max]) }, y },
    axes: [
      { ...axis, values: (_, splits) => splits.map((x) => figure(x)), size: 30, space: 55 },
      { ...axis, size: 62, space: 24, values: (_, splits) => splits.map((v) => (v === null ? "" : figure(v))) },
    ],
    series: [{}, ...chart.lines.map(seriesOf)],
    hooks: {
      setCursor: [(plot) => { readout.textContent = valuesAt(chart, plot.cursor.idx); }],
      setSelect: [(plot) => selected(plot, zoom)],
    },
  };
}

function seriesOf(line) {
  return {
    label: line.label,
    stroke: line.color,
    alpha: line.pale ? 0.3 : 1,
    width: line.width,
    dash: line.dash,
    spanGaps: true,
    points: { show: line.dots || line.xs.length < 2, size: 6, fill: line.color },
  };
}

function selected(plot, zoom) {
  const { left, width } = plot.select;
  if (width < 3) return;
  zoom([plot.posToVal(left, "x"), plot.posToVal(left + width, "x")]);
  plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
}

// What the lines hold at the cursor: of each the last value at or before it.
function valuesAt(chart, at) {
  if (at === null || at === undefined) return "";
  const x = chart.plot.data[0][at];
  const values = chart.lines.flatMap((line, number) => {
    const column = chart.plot.data[number + 1];
    let own = at;
    while (own >= 0 && (column[own] === null || column[own] === undefined)) own--;
    return line.pale || own < 0 ? [] : [`${line.label} ${figure(column[own])}`];
  });
  return `${chart.view.unit} ${figure(x)}: ${values.join("; ")}`;
}

function pressed(chart, event, zoom) {
  const plot = chart.plot;
  const xs = plot?.data[0] ?? [];
  if (!xs.length || event.ctrlKey || event.metaKey || event.altKey) return;
  const { min, max } = plot.scales.x;
  const at = plot.cursor.idx ?? xs.length - 1;
  const move = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20, Home: -xs.length, End: xs.length }[event.key];
  if (move) {
    const next = Math.max(0, Math.min(xs.length - 1, at + move));
    plot.setCursor({ left: plot.valToPos(xs[next], "x"), top: plot.over.clientHeight / 2 });
  } else if (event.key === "+" || event.key === "-") {
    const reach = ((max - min) / 2) * (event.key === "+" ? 0.5 : 2);
    zoom([xs[at] - reach, xs[at] + reach]);
  } else if (event.key === "0" || event.key === "Escape") {
    zoom(null);
  } else {
    return;
  }
  event.preventDefault();
}
