// One prompt on up to four models side by side, each streaming, where a server of models answers.
import { byId, element } from "./text.js";

const MOST = 4;
let key = ""; // stays in memory
let stopped = null;

export async function offerPrompt() {
  const found = await models();
  if (found === "key") byId("prompt-form").replaceChildren(keyField());
  else if (found.length) byId("prompt-form").replaceChildren(...fields(found));
  byId("prompt").hidden = found.length === 0;
}

async function models() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (response.status === 401) return "key";
    const { data } = response.ok ? await response.json() : { data: [] };
    return data.map((each) => String(each.id));
  } catch {
    return [];
  }
}

function headers() {
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

function keyField() {
  const input = element("input", { type: "password", autocomplete: "off" });
  return element("div", { class: "controls" }, element("label", { class: "field" }, "API key ", input),
    element("button", { type: "button", click: () => { key = input.value; offerPrompt(); } }, "Use"));
}

function fields(found) {
  const boxes = found.map((name, at) => {
    const box = element("input", { type: "checkbox", name: "model", value: name });
    box.checked = at < MOST;
    return element("label", { class: "field" }, box, " ", element("span", { class: "name" }, name));
  });
  const number = (id, label, value, more) => element("label", { class: "field" }, `${label} `, element("input", { id, type: "number", value, ...more }));
  byId("prompt-form").onsubmit = (event) => {
    event.preventDefault();
    send();
  };
  byId("prompt-form").onchange = limit;
  queueMicrotask(limit);
  return [
    element("fieldset", {}, element("legend", {}, `Checkpoints (up to ${MOST})`), boxes),
    element("label", { class: "block" }, "Prompt", element("textarea", { id: "prompt-text", rows: 3 })),
    element("div", { class: "controls" },
      element("label", { class: "field" }, "Mode ", element("select", { id: "prompt-mode" }, element("option", { value: "completions" }, "continue the text"), element("option", { value: "chat" }, "answer"))),
      number("prompt-tokens", "Tokens", 100, { min: 1 }), number("prompt-temperature", "Temperature", 0.8, { min: 0, step: 0.1 }), number("prompt-seed", "Seed", 1, { min: 0 }),
      element("button", { type: "submit", id: "prompt-send" }, "Run"),
      element("button", { type: "button", id: "prompt-stop", disabled: true, click: () => stopped?.abort() }, "Stop")),
  ];
}

function limit() {
  const boxes = [...byId("prompt-form").querySelectorAll("[name=model]")];
  const full = boxes.filter((box) => box.checked).length >= MOST;
  for (const box of boxes) box.disabled = full && !box.checked;
}

async function send() {
  const chosen = [...byId("prompt-form").querySelectorAll("[name=model]:checked")].map((box) => box.value);
  const columns = chosen.map((name) => {
    const text = element("pre", { class: "sample", tabindex: 0, role: "region", "aria-label": `Text of ${name}` });
    const state = element("p", { class: "about", role: "status" }, "waiting");
    return { name, text, state, host: element("article", {}, element("h3", { class: "name" }, name), text, state) };
  });
  byId("answers").replaceChildren(...columns.map((column) => column.host));
  stopped?.abort();
  const mine = (stopped = new AbortController());
  byId("prompt-stop").disabled = false;
  await Promise.all(columns.map((column) => stream(column, mine.signal)));
  if (mine === stopped) byId("prompt-stop").disabled = true;
}

function request(model) {
  const prompt = byId("prompt-text").value;
  const chat = byId("prompt-mode").value === "chat";
  const options = {
    model, stream: true, max_tokens: Number(byId("prompt-tokens").value),
    temperature: Number(byId("prompt-temperature").value), seed: Number(byId("prompt-seed").value),
  };
  return chat
    ? ["v1/chat/completions", { ...options, messages: [{ role: "user", content: prompt }] }]
    : ["v1/completions", { ...options, prompt }];
}

async function stream(column, signal) {
  const [path, body] = request(column.name);
  try {
    const response = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
    if (!response.ok) throw new Error(await problem(response));
    column.state.textContent = "writing";
    for await (const piece of pieces(response.body)) column.text.append(piece);
    column.state.textContent = "done";
  } catch (error) {
    column.state.textContent = signal.aborted ? "stopped" : `failed: ${error.message}`;
  }
}

async function problem(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `${response.status} ${text.slice(0, 200)}`;
  }
}

// The texts of a stream of events in OpenAI's form.
async function* pieces(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let { value, done } = await reader.read(); !done; { value, done } = await reader.read()) {
    const events = (rest + value).split(/\r?\n\r?\n/);
    rest = events.pop();
    for (const event of events) {
      const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
      if (!data || data === "[DONE]") continue;
      const { choices, error } = JSON.parse(data);
      if (error) throw new Error(error.message);
      const piece = choices?.[0]?.text ?? choices?.[0]?.delta?.content;
      if (piece) yield piece;
    }
  }
}
