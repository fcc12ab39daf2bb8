"use strict";
// The console's page. Facts come from /api/events, the chat goes through /v1/ of the same origin.
// Everything from the mesh is shown as text, never as markup: names are chosen by other people's machines.

const $ = (id) => document.getElementById(id);

function element(tag, text = "", className = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

const short = (id) => (id.length > 16 ? `${id.slice(0, 6)}…${id.slice(-6)}` : id);
const gigabytes = (bytes) => (bytes >= 1e9 ? `${(bytes / 1e9).toFixed(1)} GB` : `${(bytes / 1e6).toFixed(1)} MB`);
const ms = (value) => (value === null ? "–" : `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`);

function fillTable(target, headings, rows, empty) {
  if (rows.length === 0) {
    target.replaceChildren(element("p", empty, "empty"));
    return;
  }
  const table = element("table");
  const head = table.createTHead().insertRow();
  headings.forEach((heading) => head.append(element("th", heading)));
  const body = table.createTBody();
  rows.forEach((cells) => {
    const row = body.insertRow();
    cells.forEach((cell) => {
      const place = row.insertCell();
      place.append(cell instanceof Node ? cell : element("span", String(cell)));
    });
  });
  target.replaceChildren(table);
}

function named(id, title) {
  const made = element("span", short(id), "id");
  made.title = title || id;
  return made;
}

const PROCESS_CLASS = { ready: "good", failed: "bad", restarting: "warn", loading: "warn", starting: "warn", stopping: "muted" };
const STATE_CLASS = { alive: "good", suspect: "warn", dead: "bad", left: "muted" };

function showStatus(status) {
  document.title = `${status.node_status} · libmesh`;
  $("node-status").textContent = status.node_status;
  $("notices").replaceChildren(...status.notices.map((notice) => element("li", notice)));
  const facts = [
    ["Node", named(status.node_id)],
    ["Machine", status.my_hostname],
    ["Mesh", named(status.mesh_id)],
    ["May", { client: "use the mesh", worker: "use the mesh, lend memory", invite: "use, lend, invite" }[status.scope] || status.scope],
    ["Memory", status.is_client ? "–" : `${status.my_vram_gb.toFixed(1)} GB for models`],
    ["Requests", `${status.inflight_requests} under way`],
    ["Addresses", status.addresses.join("\n") || "–"],
    ["Version", status.version],
  ];
  $("node").replaceChildren(...facts.flatMap(([name, value]) => {
    const shown = element("dd");
    shown.append(value instanceof Node ? value : element("span", value));
    return [element("dt", name), shown];
  }));
  const hosts = Object.fromEntries(status.peers.map((peer) => [peer.id, peer.hostname || short(peer.id)]));
  fillTable($("models"), ["Name", "Size", "Context", "Asked", "Served by"], status.models.map((model) => [
    model.name, gigabytes(model.size_bytes), model.context_length || "–", model.asked ? Math.round(model.asked) : "–",
    model.servers.map((server) => (server.peer === status.node_id ? "this node" : hosts[server.peer] || short(server.peer))).join(", ") ||
      element("span", model.coming ? "nobody yet" : model.standbys ? "nobody: comes when asked for" : "nobody now", "warn"),
  ]), "No model in this mesh yet. Start a node with --model demo, or join a mesh that has one.");
  fillTable($("peers"), ["Peer", "State", "Path", "Round trip", "Serves"], status.peers.map((peer) => [
    named(peer.hostname || peer.id, `${peer.id}\n${peer.address}`), element("span", peer.state, STATE_CLASS[peer.state] || ""),
    peer.path || "–", ms(peer.rtt_ms), peer.serving_models.join(", ") || peer.role,
  ]), "No other node yet. Invite one below.");
  $("local-section").hidden = status.local_models.length === 0;
  fillTable($("local"), ["Model", "Status", ""], status.local_models.map((model) => [
    model.name, element("span", model.status, PROCESS_CLASS[model.status] || ""), runtimeButton(model),
  ]), "");
  $("process-section").hidden = status.processes.length === 0;
  fillTable($("processes"), ["Process", "Model", "Status", "Restarts"], status.processes.map((process) => {
    const state = element("span", process.status, PROCESS_CLASS[process.status] || "");
    state.title = process.failure;
    return [`${process.name} ${process.pid ?? ""}`, process.model, state, process.restarts];
  }), "");
  $("invite-section").hidden = status.scope !== "invite";
  $("base-url").textContent = `http://localhost:${status.api_port}/v1`;
  showModels(status.models.filter((model) => model.servers.length > 0 || model.coming || model.standbys > 0).map((model) => model.name));
}

function runtimeButton(model) {
  const isHere = !["on disk", "failed"].includes(model.status);
  const button = element("button", isHere ? "Unload" : "Load", "quiet");
  button.type = "button";
  button.disabled = model.status === "unloading";
  button.addEventListener("click", async () => {
    button.disabled = true;
    $("local-error").textContent = "";
    try {
      await command("/api/runtime/models", { model: model.name }, isHere ? "DELETE" : "POST");
    } catch (failure) {
      $("local-error").textContent = failure.message;
      button.disabled = false;
    }
  });
  return button;
}

function showModels(names) {
  const select = $("model");
  if ([...select.options].map((option) => option.value).join("\n") === names.join("\n")) return;
  const chosen = select.value;
  select.replaceChildren(...names.map((name) => new Option(name, name)));
  if (names.includes(chosen)) select.value = chosen;
  $("send").disabled = !answering && names.length === 0;
}

function watch() {
  const events = new EventSource("/api/events");
  events.onopen = () => { $("connection").textContent = "live"; };
  events.onmessage = (event) => showStatus(JSON.parse(event.data));
  events.onerror = () => {
    $("connection").textContent = "the node does not answer; trying again…";
    if (events.readyState === EventSource.CLOSED) setTimeout(watch, 2000);
  };
}

// Commands

async function command(path, body, method = "POST") {
  const response = await fetch(path, { method, headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error || response.statusText);
  return answer;
}

async function submitting(form, error, act) {
  const button = form.querySelector("button");
  button.disabled = true;
  error.textContent = "";
  try {
    await act();
  } catch (failure) {
    error.textContent = failure.message;
  } finally {
    button.disabled = false;
  }
}

$("invite").addEventListener("submit", (event) => {
  event.preventDefault();
  submitting(event.target, $("invite-error"), async () => {
    const made = await command("/api/invite", { scope: $("scope").value, ttl_s: Number($("ttl").value) });
    $("join-command").textContent = `libmesh-node --join ${made.token}`;
    $("invite-until").textContent = `until ${new Date(made.expires_unix * 1000).toLocaleString()}`;
    $("invite-result").hidden = false;
  });
});

$("copy").addEventListener("click", async () => {
  await navigator.clipboard.writeText($("join-command").textContent);
  $("copy").textContent = "Copied";
  setTimeout(() => { $("copy").textContent = "Copy"; }, 1500);
});

$("join").addEventListener("submit", (event) => {
  event.preventDefault();
  submitting(event.target, $("join-error"), async () => {
    await command("/api/join", { token: $("token").value.trim() });
    $("token").value = "";
  });
});

// Chat

let conversation = [];
let answering = null;

function bubble(role, text) {
  const made = element("div", text, `message ${role}`);
  $("messages").append(made);
  made.scrollIntoView({ block: "end" });
  return made;
}

async function* eventData(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: ")) yield line.slice(6);
  }
}

async function answer(model, into, signal) {
  const began = performance.now();
  const response = await fetch("/v1/chat/completions", {
    method: "POST", signal, headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ model, messages: conversation, stream: true, stream_options: { include_usage: true } }),
  });
  if (!response.ok) {
    const refused = await response.json().catch(() => ({}));
    throw new Error(refused.error?.message || `the API answered ${response.status}`);
  }
  const node = response.headers.get("X-Libmesh-Node") || "";
  let text = "", first = null, tokens = null;
  const reply = { role: "assistant", content: "" };
  conversation.push(reply);
  for await (const data of eventData(response.body)) {
    if (data === "[DONE]") break;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    const piece = chunk.choices?.[0]?.delta?.content;
    if (piece) {
      first ??= performance.now() - began;
      text += piece;
      into.textContent = reply.content = text;
      $("messages").scrollTop = $("messages").scrollHeight;
    }
    if (chunk.usage) tokens = chunk.usage.completion_tokens;
  }
  const seconds = (performance.now() - began) / 1000;
  const speed = tokens ? `${tokens} tokens, ${(tokens / seconds).toFixed(1)} per second, ` : "";
  into.append(element("small", `${model} at ${short(node)}: ${speed}first after ${Math.round(first ?? seconds * 1000)} ms`));
}

$("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (answering) {
    answering.abort();
    return;
  }
  const question = $("question").value.trim();
  if (!question || !$("model").value) return;
  $("question").value = "";
  conversation.push({ role: "user", content: question });
  bubble("user", question);
  const into = bubble("assistant", "…");
  answering = new AbortController();
  $("send").textContent = "Stop";
  try {
    await answer($("model").value, into, answering.signal);
  } catch (failure) {
    if (conversation.at(-1)?.role === "user") conversation.pop(); // nothing was answered; a stopped answer stays
    into.classList.add("failed");
    into.append(element("small", answering.signal.aborted ? "Stopped." : failure.message));
  } finally {
    answering = null;
    $("send").textContent = "Send";
    $("question").focus();
  }
});

$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!answering) $("ask").requestSubmit();
  }
});

$("new-chat").addEventListener("click", () => {
  answering?.abort();
  conversation = [];
  $("messages").replaceChildren();
});

watch();
