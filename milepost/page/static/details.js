// Checkpoints, samples and settings of the chosen runs, as tables and texts.
import { amount, byId, counted, element, figure, loss, scrolled, show, table } from "./text.js";
import { legendOfDots } from "./lineage.js";
import { colorOf } from "./table.js";

const picked = new Map(); // run -> the step of the sample that was picked; the newest where none was
const reading = new Set(); // checkpoints that are being verified

export function showResume(runs, chosen) {
  show(byId("resume"), ...chosen.map((id) => runs.get(id)).filter((run) => run?.state === "interrupted").map((run) =>
    element("div", { class: "resume" },
      element("p", {}, `${run.name} was interrupted at step ${figure(run.step)} of ${figure(run.steps)}. `, run.resume ? "This command resumes it:" : "It has no checkpoint to resume from here."),
      run.resume ? element("pre", { tabindex: 0, "aria-label": `Command that resumes ${run.name}` }, run.resume) : "",
      run.resume && navigator.clipboard ? element("button", { type: "button", click: () => navigator.clipboard.writeText(run.resume) }, "Copy") : "")));
}

export function showCheckpoints(runs, ids, details, verify) {
  const rows = ids.flatMap((id) => (details[id]?.checkpoints ?? []).toReversed().map((each) => element("tr", {},
    element("th", { scope: "row" }, runs.get(id).name),
    element("td", { class: "number" }, figure(each.step)),
    element("td", { class: "number" }, loss(each.loss)),
    element("td", { class: "number" }, amount(each.bytes, "B")),
    element("td", {}, each.resumable ? "yes" : "no"),
    element("td", {}, verified(id, each, verify)),
    element("td", { class: "number" }, [each.best ? "best" : "", each.latest ? "latest" : ""].filter(Boolean).join(", ")),
    element("td", { class: "number" }, each.saved_at.slice(0, 16).replace("T", " ")),
    element("td", { class: "path" }, each.path))));
  const parents = ids.map((id) => runs.get(id)).filter((run) => run.parent).map((run) => element("li", {}, beginning(run)));
  const head = ["run", "step", "loss", "size", "resumable", "verified", "marks", "saved (UTC)", "path"];
  const open = byId("checkpoints").querySelector("details")?.open ?? rows.length <= 12;
  keepFocus(() => show(byId("checkpoints"), ...(rows.length
    ? [legendOfDots(), element("details", { open }, element("summary", {}, counted(rows.length, "checkpoint")), scrolled("Table of checkpoints", table("newest of each run first", head, rows)))]
    : [element("p", { class: "about" }, "No checkpoint of these runs is in the checkpoint folder.")]),
    parents.length ? element("ul", { class: "plain" }, parents) : ""));
}

// What reading every byte said, or a button that reads; a report has none.
function verified(run, checkpoint, verify) {
  if (checkpoint.problems) return checkpoint.problems.length ? element("strong", {}, checkpoint.problems.join("; ")) : "intact";
  if (!verify) return "";
  const disabled = reading.has(checkpoint.id);
  const button = element("button", { type: "button", disabled, id: `verify-${checkpoint.id}`, "aria-label": `Verify step ${checkpoint.step}`, click: () => {
    reading.add(checkpoint.id);
    button.disabled = true;
    button.textContent = "reading";
    verify(run, checkpoint.id).catch((error) => { button.textContent = error.message; }).finally(() => reading.delete(checkpoint.id));
  } }, disabled ? "reading" : "verify");
  return button;
}

function beginning({ name, parent }) {
  const from = `${parent.name}${parent.step === null ? "" : ` at step ${figure(parent.step)}`}`;
  const changed = parent.changed.length ? `, changed ${parent.changed.join(", ")}` : "";
  return `${name} ${parent.anew ? "began with the weights of" : "resumed"} ${from}${changed}`;
}

export function showSamples(runs, chosen, details) {
  const figures = chosen.filter((id) => details[id]?.samples.length).map((id) => sampleOf(runs.get(id), details[id].samples, chosen));
  byId("samples").hidden = figures.length === 0;
  keepFocus(() => show(byId("sample-list"), ...figures));
}

function sampleOf(run, samples, chosen) {
  const current = samples.find((each) => each.step === picked.get(run.id)) ?? samples[samples.length - 1];
  const text = element("pre", { class: "sample", tabindex: 0, role: "region", "aria-label": `Sample of ${run.name}` }, current.text);
  const choice = element("select", { id: `sample-${run.id}`, change: () => {
    const found = samples.find((each) => each.step === Number(choice.value));
    if (found === samples[samples.length - 1]) picked.delete(run.id);
    else picked.set(run.id, found.step);
    text.textContent = found.text;
  } }, samples.toReversed().map((each) => element("option", { value: each.step }, `step ${each.step}`)));
  choice.value = String(current.step);
  return element("figure", {}, element("figcaption", {},
    element("span", { class: `swatch color${colorOf(chosen, run.id)}`, "aria-hidden": "true" }),
    element("label", { class: "field" }, element("span", { class: "name" }, run.name), choice)), text);
}

function keepFocus(change) {
  const id = document.activeElement?.id;
  change();
  if (id && document.activeElement?.id !== id) byId(id)?.focus({ preventScroll: true });
}

export function showSettings(runs, chosen, details) {
  const shown = chosen.filter((id) => details[id]);
  const names = [...new Set(shown.flatMap((id) => Object.keys(details[id].settings)))];
  const values = (name) => shown.map((id) => details[id].settings[name] ?? "");
  const differs = (name) => new Set(values(name)).size > 1;
  const row = (name) => element("tr", { class: differs(name) ? "differs" : false }, element("th", { scope: "row" }, name), values(name).map((value) => element("td", {}, value)));
  const sorted = [...names.filter(differs), ...names.filter((name) => !differs(name))];
  const count = names.filter(differs).length;
  byId("settings").hidden = names.length === 0;
  const words = shown.length > 1 ? `${count} of ${names.length} settings differ, and stand first` : `${names.length} settings`;
  const open = byId("settings-table").querySelector("details")?.open ?? false;
  show(byId("settings-table"), element("details", { open }, element("summary", {}, words),
    scrolled("Table of settings", table("settings that decide the weights", ["setting", ...shown.map((id) => runs.get(id).name)], sorted.map(row)))));
}

