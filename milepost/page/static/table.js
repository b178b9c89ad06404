// The list of runs: newest first, filtered, a part at a time.
import { byId, counted, element, figure, loss, moment, scrolled, show, table } from "./text.js";

const PART = 50;
let visible = PART;

export function showRuns(runs, chosen, toggle) {
  const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const found = [...runs.values()]
    .filter((run) => words.every((word) => searched(run).includes(word)))
    .sort((one, other) => (other.time ?? 0) - (one.time ?? 0) || (one.name < other.name ? 1 : -1));
  const focused = document.activeElement?.dataset?.run;
  const rows = found.slice(0, visible).map((run) => row(run, chosen, toggle));
  const caption = found.length === runs.size ? counted(runs.size, "run") : `${found.length} of ${runs.size} runs`;
  const list = byId("run-list");
  const scroll = list.firstElementChild?.scrollTop ?? 0;
  list.replaceChildren(scrolled("List of runs", table(caption, ["run", "step", element("span", { class: "train" }, "train"), "val"], rows)));
  list.firstElementChild.scrollTop = scroll;
  list.querySelector(`[data-run="${focused}"]`)?.focus({ preventScroll: true });
  byId("more").hidden = found.length <= visible;
  byId("more").onclick = () => {
    visible += PART;
    showRuns(runs, chosen, toggle);
  };
}

function searched(run) {
  return `${run.name} ${run.note} ${run.state}`.toLowerCase();
}

function row(run, chosen, toggle) {
  const box = element("input", { type: "checkbox", "data-run": run.id, change: () => toggle(run.id) });
  box.checked = chosen.includes(run.id);
  const swatch = element("span", { class: `swatch color${box.checked ? colorOf(chosen, run.id) : "-none"}`, "aria-hidden": "true" });
  const about = element("span", { class: "about" },
    element("span", { class: `state ${run.state}` }, run.state), run.note ? ` ${run.note}` : "",
    run.time === null ? "" : " ", run.time === null ? "" : element("span", { class: "moment" }, moment(run.time)));
  return element("tr", {},
    element("th", { scope: "row" }, element("label", { class: "run" }, box, swatch, element("span", { class: "name" }, run.name)), about),
    element("td", { class: "number" }, figure(run.step), run.steps ? element("span", { class: "of" }, `of ${figure(run.steps)}`) : ""),
    element("td", { class: "number train" }, loss(run.loss)),
    element("td", { class: "number" }, loss(run.validation)));
}

export const COLORS = 8;

export function colorOf(chosen, id) {
  return chosen.indexOf(id) % COLORS;
}

export function showDamaged(problems) {
  const open = byId("damaged").querySelector("details")?.open ?? false;
  show(byId("damaged"), problems.length === 0 ? "" :
    element("details", { open }, element("summary", {}, `${counted(problems.length, "checkpoint")} cannot be read`),
      element("ul", {}, problems.map((each) => element("li", {}, `${each.kind}: ${each.problem}`)))));
}
