// A row per run, from its first step to its last, with its checkpoints as dots; a child hangs on the step that it began with.
import { byId, counted, drawn, element, figure, loss } from "./text.js";
import { colorOf } from "./table.js";

const ROW = 46, LEFT = 12, RIGHT = 16, TOP = 22;
const MOST_ROWS = 30;

// MOST_ROWS of the chosen runs, their ancestors and their descendants: the chosen ones are never left out. Parents come first.
export function family(runs, chosen) {
  const found = new Set([...relatives(runs, chosen)].slice(0, MOST_ROWS));
  const depth = (id, seen = new Set()) => {
    const above = runs.get(id).parent?.id;
    return !above || !found.has(above) || seen.has(id) ? [] : [...depth(above, seen.add(id)), above];
  };
  const path = (id) => [...depth(id), id].map((each) => `${String(runs.get(each).began ?? 0).padStart(20, "0")} ${each}`).join("/");
  return [...found].sort((one, other) => (path(one) < path(other) ? -1 : 1));
}

function relatives(runs, chosen) {
  const oldest = [...runs.values()].sort((one, other) => (one.began ?? 0) - (other.began ?? 0));
  const found = new Set(chosen.filter((id) => runs.has(id)));
  for (const id of found) {
    const above = runs.get(id).parent?.id;
    if (above && runs.has(above)) found.add(above);
  }
  let before = -1;
  while (before !== found.size && found.size < MOST_ROWS) {
    before = found.size;
    for (const run of oldest) if (found.has(run.parent?.id)) found.add(run.id);
  }
  return found;
}

export function showLineage(runs, ids, details, chosen) {
  const place = byId("tree");
  const width = Math.max(280, place.clientWidth);
  const last = Math.max(1, ...ids.map((id) => runs.get(id).step ?? 0));
  const x = (step) => LEFT + ((width - LEFT - RIGHT) * Math.max(0, Math.min(step, last))) / last;
  const y = (id) => TOP + ids.indexOf(id) * ROW + 12;
  const height = TOP + ids.length * ROW + 24;
  const marks = ids.flatMap((id) => [...connector(runs, ids, id, x, y), ...rowOf(runs.get(id), details[id]?.checkpoints ?? [], chosen, x, y)]);
  const label = `${counted(ids.length, "run")} from step 0 to ${figure(last)}, with their checkpoints; the table below lists them.`;
  place.replaceChildren(drawn("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label },
    scale(last, x, height), marks), ids.length < MOST_ROWS ? "" : element("p", { class: "about" }, `At most ${MOST_ROWS} runs are drawn, the chosen ones among them.`));
}

function scale(last, x, height) {
  return [0, 0.25, 0.5, 0.75, 1].map((part) => drawn("g", { class: "scale" },
    drawn("line", { x1: x(part * last), x2: x(part * last), y1: 4, y2: height - 20 }),
    drawn("text", { x: x(part * last), y: height - 6, "text-anchor": part === 0 ? "start" : part === 1 ? "end" : "middle" }, figure(Math.round(part * last)))));
}

// From the step of the parent's checkpoint to the child's first step; dashed if only weights were taken.
function connector(runs, ids, id, x, y) {
  const { parent, first } = runs.get(id);
  if (!parent?.id || !ids.includes(parent.id)) return [];
  const from = [x(parent.step ?? 0), y(parent.id)];
  const to = [x(parent.anew ? first ?? 0 : parent.step ?? 0), y(id)];
  const middle = (from[1] + to[1]) / 2;
  return [drawn("path", { class: parent.anew ? "taken anew" : "taken", d: `M${from} C${from[0]},${middle} ${to[0]},${middle} ${to}` })];
}

function rowOf(run, checkpoints, chosen, x, y) {
  const own = chosen.includes(run.id) ? `color${colorOf(chosen, run.id)}` : "color-none";
  const start = x(run.parent && !run.parent.anew ? run.parent.step ?? 0 : 0);
  const end = x(run.step ?? 0);
  const name = run.name.length > 60 ? `${run.name.slice(0, 57)}...` : run.name;
  return [
    drawn("text", { class: "name", x: LEFT, y: y(run.id) - 12 }, `${name} (${run.state})`),
    drawn("line", { class: `course ${own}`, x1: start, x2: Math.max(end, start + 1), y1: y(run.id), y2: y(run.id) }),
    ...checkpoints.map((each) => dot(each, own, x(each.step), y(run.id))),
  ];
}

function dot(checkpoint, own, x, y) {
  const words = described(checkpoint).join(", ");
  return drawn("g", {}, drawn("title", {}, `step ${checkpoint.step}: ${words}`),
    checkpoint.best ? drawn("circle", { class: `ring ${own}`, cx: x, cy: y, r: 9 }) : "",
    drawn("circle", { class: `dot ${own} ${checkpoint.resumable ? "" : "weights"}`, cx: x, cy: y, r: 5 }));
}

export function described(checkpoint) {
  return [
    checkpoint.loss === null ? "" : `loss ${loss(checkpoint.loss)}`,
    checkpoint.resumable ? "resumable" : "weights only",
    checkpoint.best ? "best" : "",
    checkpoint.latest ? "latest" : "",
  ].filter(Boolean);
}

export function legendOfDots() {
  return element("p", { class: "about" }, "Filled dots can be resumed, hollow ones hold weights only, a ring marks the best. A dashed line: only weights were taken.");
}
