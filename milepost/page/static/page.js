// What is chosen, and what is drawn of it.
import { byId, counted, moment } from "./text.js";
import { openSource } from "./source.js";
import { showDamaged, showRuns } from "./table.js";
import { onTheme } from "./chart.js";
import { showCharts, showLegend } from "./charts.js";
import { family, showLineage } from "./lineage.js";
import { showCheckpoints, showResume, showSamples, showSettings } from "./details.js";
import { offerPrompt } from "./prompt.js";

const MOST_CHOSEN = 12;
const source = openSource();
const runs = new Map();
const view = { axis: "step", smoothing: 2, log: false, window: null };
let chosen = [];
let curves = {}, labels = {}, details = {};
let whole = {}; // the curves of the whole runs, which a zoom leaves
let problems = [];
let reachable = true;

// While a button of the mouse or a finger is down, nothing is replaced: the element under it would be gone when it is released, and its click lost.
let pointerDown = false;
const due = new Set();
const whenReleased = (show) => () => (pointerDown ? due.add(show) : show());

function release() {
  pointerDown = false;
  const shows = [...due];
  due.clear();
  for (const show of shows) show();
}

const draw = whenReleased(() => {
  const names = new Map([...runs].map(([id, run]) => [id, labels[id] || run.name]));
  showLegend(runs, labels, chosen, toggle);
  showResume(runs, chosen);
  showCharts(curves, names, chosen, view, zoom);
  const rows = family(runs, chosen);
  showLineage(runs, rows, details, chosen);
  showCheckpoints(runs, rows, details, source.verify);
  showSamples(runs, chosen, details);
  showSettings(runs, chosen, details);
  byId("reset").disabled = view.window === null;
});

const list = whenReleased(() => {
  showRuns(runs, chosen, toggle);
  showDamaged(problems);
  const training = [...runs.values()].filter((run) => run.state === "training").length;
  const figures = source.live ? `${counted(runs.size, "run")}, ${training} training` : `report of ${moment(source.written)}`;
  byId("status").textContent = reachable ? figures : "the server does not answer; trying again";
});

function toggle(id) {
  if (chosen.includes(id)) chosen = chosen.filter((each) => each !== id);
  else chosen = [...chosen, id].slice(-MOST_CHOSEN);
  list();
  refresh();
}

// Asks for everything that is shown of the chosen runs, or for that of `changed` runs, one request at a time.
let asking = null, again = null;
function refresh(changed = null) {
  if (asking) {
    again = changed && again !== "all" ? [...(again ?? []), ...changed] : "all";
    return;
  }
  byId("shown").setAttribute("aria-busy", "true");
  asking = load(changed).catch(() => {}).finally(() => {
    asking = null;
    const next = again;
    again = null;
    if (next) refresh(next === "all" ? null : next);
    else byId("shown").setAttribute("aria-busy", "false");
  });
}

async function load(changed) {
  const ids = changed ? chosen.filter((id) => changed.includes(id)) : chosen;
  const rows = family(runs, chosen).filter((id) => !changed || changed.includes(id));
  const [found, more, seen] = await Promise.all([
    ids.length ? source.curves(ids) : { curves: {}, labels: {} },
    rows.length ? source.details([...new Set([...ids, ...rows])]) : {},
    ids.length && view.window ? source.curves(ids, windowQuery()) : null,
  ]);
  whole = { ...whole, ...found.curves };
  curves = { ...curves, ...(seen ?? found).curves };
  details = { ...details, ...more };
  if (!changed) labels = found.labels;
  draw();
}

function windowQuery() {
  return { axis: view.axis, from: view.window[0], to: view.window[1] };
}

async function zoom(window) {
  view.window = window;
  if (!window) curves = { ...whole };
  draw();
  if (window) refresh(chosen);
}

function merge(found) {
  for (const run of found.runs) runs.set(run.id, run);
  problems = found.damaged;
}

async function everything() {
  const found = await source.runs();
  runs.clear();
  merge(found);
  chosen = chosen.filter((id) => runs.has(id));
  list();
  return found.version;
}

function changed(found) {
  merge(found);
  if (!chosen.length) choose();
  const shown = new Set([...chosen, ...family(runs, chosen)]);
  const own = found.runs.map((run) => run.id).filter((id) => shown.has(id));
  if (runs.size !== found.ids) everything().then(() => refresh()).catch(() => {});
  else list();
  if (own.length) refresh(own);
}

function connected(answers) {
  const returned = answers && !reachable;
  reachable = answers;
  if (returned) everything().then(() => refresh()).catch(() => {});
  else list();
}

// A report shows all its runs, a server the latest with those that it continues.
function choose() {
  const latest = [...runs.values()].sort((one, other) => (other.time ?? 0) - (one.time ?? 0));
  const first = source.live ? latest.slice(0, 1) : latest.slice(0, MOST_CHOSEN);
  chosen = first.map((run) => run.id);
  for (let run = first[0]; source.live && run?.parent?.id && !run.parent.anew; ) {
    run = runs.get(run.parent.id);
    if (!run || chosen.includes(run.id)) break;
    chosen = [...chosen, run.id].slice(0, MOST_CHOSEN);
  }
  if (!source.live) chosen.reverse();
}

function wire() {
  // The menu of a select, a scroll bar and a release outside the window send no pointerup.
  addEventListener("pointerdown", (event) => { pointerDown = !event.target.closest?.("select"); }, true);
  for (const end of ["pointerup", "pointercancel"]) addEventListener(end, () => setTimeout(release), true); // after the click
  addEventListener("pointermove", (event) => { if (pointerDown && !event.buttons) release(); }, true);
  addEventListener("blur", release);
  byId("filter").addEventListener("input", list);
  byId("axis").addEventListener("change", () => {
    view.axis = byId("axis").value;
    view.window = null;
    curves = { ...whole };
    draw();
  });
  byId("smoothing").addEventListener("input", () => {
    view.smoothing = Number(byId("smoothing").value);
    draw();
  });
  byId("log").addEventListener("change", () => {
    view.log = byId("log").checked;
    draw();
  });
  byId("reset").addEventListener("click", () => zoom(null));
  byId("loss").addEventListener("dblclick", () => zoom(null));
  onTheme(draw);
  let width = innerWidth;
  addEventListener("resize", () => {
    if (width !== innerWidth) draw();
    width = innerWidth;
  });
}

async function start() {
  wire();
  const version = await everything();
  choose();
  list();
  refresh();
  source.follow(version, changed, connected);
  if (source.live) await offerPrompt();
}

start().catch((error) => { byId("status").textContent = `the runs could not be read: ${error.message}`; });
