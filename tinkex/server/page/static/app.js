// The page of a tinkex server. Whatever comes from outside is put in as text, never as HTML.

import { drawCharts } from "/ui/files/charts.js";
import { answer } from "/ui/files/chat.js";

const $ = (id) => document.getElementById(id);
// A page may stay open for days: of a longer curve, every second older point is dropped.
const MOST_POINTS = 4000;

let stream = null;   // the open EventSource
let runId = null;    // the run in view
let points = [];     // its metrics
let details = null;  // its settings and checkpoints
let latest = null;   // the last overview
let chosen = false;  // the user has chosen a run

// Requests.

async function ask(method, path, body) {
  const response = await fetch(path, {
    method,
    headers: body === undefined ? {} : { "Content-Type": "application/json" },
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  const told = await response.json().catch(() => ({}));
  if (response.status === 401) showSignIn();
  if (!response.ok) {
    const error = new Error(told.error?.message ?? told.error ?? `status ${response.status}`);
    error.status = response.status;
    throw error;
  }
  return told;
}

function notice(text) {
  $("notice").textContent = text ?? "";
  $("notice").hidden = !text;
}

// Elements.

function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function fillList(list, entries) {
  list.replaceChildren(...Object.entries(entries).flatMap(
    ([name, value]) => [element("dt", name), element("dd", value)]));
}

function time(text) {
  return new Date(text).toLocaleString();
}

function size(bytes) {
  const units = ["bytes", "kB", "MB", "GB", "TB"];
  let step = 0;
  while (bytes >= 1000 && step < units.length - 1) { bytes /= 1000; step += 1; }
  return `${step ? bytes.toFixed(1) : bytes} ${units[step]}`;
}

function short(id) {
  return id.length > 26 ? `${id.slice(0, 8)} ... ${id.slice(-9)}` : id;
}

// Signing in.

function showSignIn() {
  stream?.close();
  $("page").hidden = true;
  $("sign-in").hidden = false;
  $("sign-out").hidden = true;
  $("health").textContent = "";
  $("key").focus();
}

$("sign-in").addEventListener("submit", async (submitted) => {
  submitted.preventDefault();
  try {
    await ask("POST", "/ui/sign-in", { key: $("key").value });
    $("key").value = "";
    notice();
    begin();
  } catch (error) {
    notice(error.message);
  }
});

$("sign-out").addEventListener("click", async () => {
  await ask("POST", "/ui/sign-out", {});
  showSignIn();
});

// Live updates.

async function begin() {
  try {
    show(await ask("GET", "/ui/state"));
  } catch (error) {
    if ($("sign-in").hidden) { lost = true; notice(error.message); setTimeout(begin, 3000); }
    return;
  }
  $("sign-in").hidden = true;
  $("page").hidden = false;
  $("sign-out").hidden = latest.owner === "local";
  if (runId !== null) refreshDetails();
  listen();
}

function listen() {
  stream?.close();
  const query = runId === null ? "" : `?run=${encodeURIComponent(runId)}&after=${next}`;
  stream = new EventSource(`/ui/events${query}`);
  stream.addEventListener("state", (message) => {
    if (lost) notice();
    lost = false;
    show(JSON.parse(message.data));
  });
  stream.addEventListener("points", (message) => {
    const told = JSON.parse(message.data);
    if (told.run !== runId) return;
    next = told.next;
    addPoints(told.points);
  });
  const mine = stream;
  stream.addEventListener("error", () => {
    if (mine !== stream) return;
    stream.close();
    lost = true;
    notice("The connection to the server is lost; trying again.");
    setTimeout(() => { if (mine === stream) begin(); }, 2000);
  });
}

let lost = false;  // the connection, until the next event
let next = 0;  // where the points of the run in view continue

function addPoints(fresh) {
  points.push(...fresh);
  if (points.length > MOST_POINTS) points = points.filter((_, i) => i % 2 || i > MOST_POINTS / 2);
  drawCharts($("charts"), points);
}

function show(state) {
  const before = latest?.runs.find((run) => run.id === runId);
  latest = state;
  const server = state.server;
  $("health").textContent = server.problem ??
    (server.engine === "starting" ? "The engine is starting." :
      `${server.operations} operations and ${server.samples} samples are running or waiting.`);
  $("health").classList.toggle("danger", Boolean(server.problem));
  showRuns(state.runs);
  fillList($("server"), {
    "Computed now": state.running ?? (server.samples ? "samples" : "nothing"),
    "Memory": size(server.memory_bytes),
    "Threads": server.threads,
    "Running for": `${server.minutes} minutes`,
    "You": state.owner,
    "Your operations": state.usage.operations,
    "Your tokens": `${state.usage.tokens_trained} trained, ${state.usage.tokens_sampled} sampled`,
    "Version": server.version,
  });
  $("sessions").tBodies[0].replaceChildren(...state.sessions.map((session) => {
    const row = element("tr");
    row.append(element("td", short(session.id)), element("td", session.name),
      element("td", time(session.created)), element("td", session.status));
    return row;
  }));
  showModels();
  if (runId === null && state.runs.length && !chosen) view(state.runs[0].id);
  const run = state.runs.find((one) => one.id === runId);
  if (run) {
    showStatus(run);
    if (before && (before.checkpoints !== run.checkpoints || before.samples !== run.samples)) refreshDetails();
  } else if (before) {
    refreshDetails();  // deleted, or not among the newest any more
  }
}

function showRuns(runs) {
  $("no-runs").hidden = runs.length > 0;
  const focused = document.activeElement?.dataset?.run;
  $("runs").replaceChildren(...runs.map((run) => {
    const button = element("button", run.metadata.name ?? short(run.id), { type: "button" });
    button.dataset.run = run.id;
    button.title = run.id;
    button.setAttribute("aria-current", String(run.id === runId));
    const loss = run.latest.loss === undefined ? "" : `, loss ${run.latest.loss.toFixed(3)}`;
    const state = run.waiting ? `${run.waiting} waiting` : "idle";
    button.append(element("small", `${run.base_model}, rank ${run.rank}, ${state}${loss}`));
    button.addEventListener("click", () => { chosen = true; view(run.id); });
    const item = element("li");
    item.append(button);
    return item;
  }));
  if (focused) document.querySelector(`[data-run="${CSS.escape(focused)}"]`)?.focus();
}

// The run in view.

function view(id) {
  runId = id;
  points = [];
  next = 0;
  details = null;
  $("run").hidden = false;
  const run = latest?.runs.find((one) => one.id === id);
  $("run-title").textContent = run?.metadata.name ?? short(id);
  $("run-title").title = id;
  $("charts").replaceChildren();
  refreshDetails();
  if (latest) show(latest);
  listen();
}

// The run in view is gone: no other takes its place before the user chooses one.
function leave() {
  runId = null;
  points = [];
  details = null;
  lost = false;
  $("run").hidden = true;
  chosen = true;
  showModels();
  listen();
}

function showStatus(run) {
  const told = [`base model ${run.base_model}`];
  const { step, tokens_per_second: speed } = run.latest;
  if (step !== undefined) told.push(`step ${step}`);
  if (speed !== undefined) told.push(`${Math.round(speed)} tokens/s`);
  told.push(run.waiting ? `${run.waiting} operations waiting or running` : "idle");
  $("run-status").textContent = told.join(" · ");
}

async function refreshDetails() {
  const id = runId;
  try {
    const told = await ask("GET", `/ui/runs/${encodeURIComponent(id)}`);
    if (id !== runId) return;
    details = told;
  } catch (error) {
    if (id !== runId) return;
    if (error.status === 404) leave();
    notice(error.status === 404 ? "The run in view has been deleted." : error.message);
    return;
  }
  fillList($("settings"), details.settings);
  $("said").hidden = details.samples.length === 0;
  $("samples").tBodies[0].replaceChildren(...details.samples.map((sample) => {
    const row = element("tr");
    row.append(element("td", sample.step), element("td", sample.prompt), element("td", sample.text));
    return row;
  }));
  const rows = details.checkpoints.map(checkpointRow);
  $("checkpoints").tBodies[0].replaceChildren(...rows);
  $("checkpoints").hidden = rows.length === 0;
  $("no-checkpoints").hidden = rows.length > 0;
  showModels();
}

function checkpointRow(checkpoint) {
  const path = `/ui/training_runs/${encodeURIComponent(runId)}/checkpoints/${
    checkpoint.id.split("/").map(encodeURIComponent).join("/")}`;
  const row = element("tr");
  const name = element("td", checkpoint.id);
  name.title = checkpoint.path;
  const actions = element("td");
  const download = element("a", "Download", { href: `${path}/archive`, download: "" });
  const publish = element("button", checkpoint.public ? "Unpublish" : "Publish", { type: "button" });
  publish.addEventListener("click", () => act(
    checkpoint.public ? "DELETE" : "POST", `${path}/publish`));
  const remove = element("button", "Delete", { type: "button", class: "danger" });
  remove.addEventListener("click", async () => {
    if (await confirmed(`Delete ${checkpoint.id}? This cannot be undone.`)) act("DELETE", path);
  });
  actions.append(download, " ", publish, " ", remove);
  row.append(name, element("td", checkpoint.kind === "training" ? "training" : "sampling"),
    element("td", size(checkpoint.bytes)), element("td", time(checkpoint.created)), actions);
  return row;
}

async function act(method, path) {
  try {
    await ask(method, path, method === "POST" ? {} : undefined);
    notice();
  } catch (error) {
    notice(error.message);
  }
  refreshDetails();
}

function confirmed(text) {
  $("confirm-text").textContent = text;
  const dialog = $("confirm");
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener(
    "close", () => resolve(dialog.returnValue === "yes"), { once: true }));
}

// Trying models.

function showModels() {
  const wanted = [];
  for (const checkpoint of details?.checkpoints ?? []) {
    if (checkpoint.kind === "sampler") wanted.unshift([checkpoint.path, `this run: ${checkpoint.id}`]);
  }
  for (const name of latest?.base_models ?? []) wanted.push([name, `base model: ${name}`]);
  const select = $("model");
  const there = [...select.options].map((option) => option.value);
  if (there.join("\n") === wanted.map(([value]) => value).join("\n")) return;
  select.replaceChildren(...wanted.map(([value, text]) => element("option", text, { value })));
  // The newest of this run comes first, until the user picks another.
  if (wanted.some(([value]) => value === picked)) select.value = picked;
}

let picked = null;    // the model that the user has picked

$("model").addEventListener("change", () => { picked = $("model").value; });

let stopping = null;  // aborts the answers on their way

$("stop").addEventListener("click", () => stopping?.abort());
$("prompt").addEventListener("keydown", (key) => {
  if (key.key === "Enter" && (key.ctrlKey || key.metaKey)) $("chat").requestSubmit();
});

$("chat").addEventListener("submit", async (submitted) => {
  submitted.preventDefault();
  stopping?.abort();
  const mine = stopping = new AbortController();
  const model = $("model").value;
  const base = latest.runs.find((run) => model.startsWith(`tinker://${run.id}/`))?.base_model;
  const models = base && $("side-by-side").checked ? [base, model] : [model];
  const settings = {
    temperature: Number($("temperature").value),
    max_tokens: Number($("most-tokens").value),
    plain: $("plain").checked,
    prompt: $("prompt").value,
  };
  $("send").disabled = true;
  $("stop").disabled = false;
  const places = models.map((name) => {
    const place = element("article", undefined, { class: "answer" });
    place.append(element("h3", name === model && base ? "Fine-tuned" : `Base model ${name}`), element("pre"));
    return place;
  });
  $("answers").replaceChildren(...places);
  await Promise.all(models.map((name, i) =>
    answer({ ...settings, model: name }, places[i].querySelector("pre"), mine.signal)));
  if (mine !== stopping) return;
  $("send").disabled = false;
  $("stop").disabled = true;
});

begin();
