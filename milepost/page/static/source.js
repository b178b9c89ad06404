// Where the data comes from: a report holds it, a server is asked for it.
import { byId } from "./text.js";

export function openSource() {
  const held = byId("held");
  return held ? fromReport(JSON.parse(held.textContent)) : fromServer();
}

function fromReport(held) {
  return {
    live: false,
    written: held.written,
    runs: async () => held.runs,
    curves: async () => held.curves,
    details: async () => held.details,
    follow: () => {},
  };
}

function fromServer() {
  const query = (ids) => ids.map((id) => ["run", id]);
  return {
    live: true,
    runs: () => ask("api/runs", []),
    details: (ids) => ask("api/details", query(ids)),
    curves: (ids, window) => ask("api/curves", [...query(ids), ...(window ? Object.entries(window) : [])]),
    verify: (run, checkpoint) => ask("api/verify", [["run", run], ["checkpoint", checkpoint]], "POST"),
    follow,
  };
}

async function ask(path, pairs, method = "GET") {
  const response = await fetch(`${path}?${new URLSearchParams(pairs)}`, { method });
  if (!response.ok) throw new Error(`${path}: ${response.status}`);
  return response.json();
}

const AGAIN = 10000; // milliseconds to wait after an answer that a browser takes as final, such as that too many pages are open

// Calls `changed` with what changed, and `connected` with whether the server answers.
function follow(since, changed, connected) {
  const events = new EventSource(`api/events?since=${since}`);
  events.onmessage = (event) => changed(JSON.parse(event.data));
  events.onopen = () => connected(true);
  events.onerror = () => {
    connected(false);
    if (events.readyState === EventSource.CLOSED) setTimeout(() => follow(since, changed, connected), AGAIN);
  };
}
