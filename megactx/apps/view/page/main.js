// Puts the parts together: what comes from the server, what a person points at, and what is shown.
"use strict";

const frames = new Frames(), pictures = { timeline, window: grid, scores };
let about = null, embedded = null, state = { doing: "connecting" }, hover = null, due = false, steps = 0;

// All drawing at once, at most once per frame of the screen.
function redraw() {
  if (due) return;
  due = true;
  requestAnimationFrame(() => {
    due = false;
    if (about) show();
  });
}

function show() {
  const frame = frames.shown;
  $("scored").hidden = !frame || !frame.scores;
  if (!frame) {
    $("timeline-note").textContent = `no working context yet: it takes ${about.block} tokens`;
    return;
  }
  $("timeline-note").textContent = `refocus ${whole(frame.number)}, ${whole(frame.tokens)} tokens`;
  timeline.draw(frame, about, hover);
  grid.draw(frame, about, hover);
  if (frame.scores) {
    scores.draw(frame, about, hover);
    const price = frame.price === null ? "" : `, price ${frame.price.toFixed(4)} nat`;
    $("scores-note").textContent = `LensNet's, before the edits${price}`;
  } else scores.known = null;
  past.draw(frames, about);
  $("history-note").textContent = about.kind === "focus" ? `up to ${past.known.most}; grey: to make room` : "no LensNet: the newest text has the detail";
  $("which").max = frames.all.length - 1;
  $("which").value = frames.place;
  $("live").disabled = frames.chosen === null;
  figures(frame);
  legend(frame);
  edits(frame);
}

function figures(frame) {
  const entries = frame.window.reduce((sum, [, count]) => sum + count, 0), ms = frame.ms || {};
  const parts = lanesOf(frame).slice(0, -1), tokens = parts.reduce((sum, lane) => sum + lane.tokens, frame.tokens);
  const spent = ["gist", "room", "score", "allocate", "read"].reduce((sum, name) => sum + (ms[name] || 0), 0);
  const share = (value) => (value === null || value === undefined ? "–" : `${Math.round(100 * value)} %`);
  const rows = [
    ["History", whole(frame.tokens), "tokens"],
    ...(parts.length ? [["Parts", whole(tokens - frame.tokens), `tokens of ${parts.length}`]] : []),
    ["Window", whole(entries), `of ${whole(frame.budget)}`],
    ["Compression", (tokens / Math.max(1, entries)).toFixed(1), "tokens per entry"],
    ["Swap rate", frame.swap === undefined || frame.swap === null ? "–" : frame.swap.toFixed(2), "healthy 0.05–0.20"],
    ["KV reuse", share(frame.reuse), "of keys and values"],
    ["Refocus", frame.ms ? whole(spent) : "–", "ms"],
    ["Speed", frame.decoded ? whole(frame.new / ((spent + ms.decode) / 1000)) : "–", "tokens per second"],
  ];
  fill($("figures"), rows, ([name, value, unit]) => {
    const box = document.createElement("div"), small = document.createElement("small");
    box.append(element("dt", name), element("dd", `${value} `));
    small.textContent = unit;
    box.lastChild.append(small);
    return box;
  });
}

function legend(frame) {
  const levels = new Set(frame.window.map(([lod]) => lod));
  for (let lod = 1; about.block ** lod <= frame.tokens; lod++) levels.add(lod);
  const key = [...levels].join();
  if ($("legend").dataset.key === key) return;
  $("legend").dataset.key = key;
  fill($("legend"), [...levels].sort((a, b) => a - b), (lod) => {
    const item = document.createElement("li"), space = "http://www.w3.org/2000/svg";
    const svg = document.createElementNS(space, "svg"), box = document.createElementNS(space, "rect");
    box.setAttribute("width", "100%");
    box.setAttribute("height", "100%");
    box.setAttribute("fill", colourOf(about, lod));
    svg.append(box);
    item.append(svg, lod ? `LOD${lod}, ${nameOf(lod, about.block)} tokens` : "LOD0, token");
    return item;
  });
}

function edits(frame) {
  const all = [...frame.edits, ...frame.room.map((edit) => [...edit, true])];
  $("edits-note").textContent = all.length ? `of refocus ${whole(frame.number)}` : "none in this refocus";
  fill($("edits"), all, ([expand, lod, index, room]) => {
    const item = document.createElement("li"), node = { lod, index, width: about.block ** lod, start: index * about.block ** lod };
    item.tabIndex = 0;
    item.append(element("b", expand ? "▲ expand" : room ? "▼ room" : "▼ collapse"), element("span", `${nameOf(lod, about.block)} tokens, ${placeOf(node, lanesOf(frame))}`));
    const point = () => {
      const box = item.getBoundingClientRect();
      tell(node, box.left, box.bottom);
    };
    item.addEventListener("mouseenter", point);
    item.addEventListener("focus", point);
    item.addEventListener("mouseleave", quiet);
    item.addEventListener("blur", quiet);
    return item;
  });
}

function written() {
  const box = $("written"), low = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  fill(box, state.written || [], ([kind, text]) => {
    const part = element("span", text);
    part.className = kind;
    return part;
  });
  if (low) box.scrollTop = box.scrollHeight;
  const busy = state.doing === "reading" || state.doing === "writing";
  $("doing").textContent = state.doing;
  $("doing").dataset.busy = busy ? "yes" : state.doing.startsWith("connection") ? "lost" : "no";
  $("go").disabled = busy;
  $("stop").disabled = !busy;
  $("text-note").textContent = state.tokens === undefined ? "" : `${whole(state.tokens)} tokens; what the model wrote stands out`;
  $("error").hidden = !state.error;
  $("error").textContent = state.error || "";
}

// Text is only ever set as text: nothing that a model writes becomes markup.
function element(name, text) {
  const out = document.createElement(name);
  out.textContent = text;
  return out;
}

function fill(parent, rows, make) {
  parent.replaceChildren(...rows.map(make));
}

async function tell(node, x, y) {
  const mine = ++steps, tip = $("tip"), lanes = lanesOf(frames.shown);
  hover = node;
  redraw();
  const told = ["score", "cosine"].filter((name) => node[name] !== undefined).map((name) => ` · ${name} ${node[name].toFixed(2)}`).join("");
  $("tip-name").textContent = `${nameOf(node.lod, about.block)}${node.lod ? " tokens" : ""} · ${placeOf(node, lanes)}${told}`;
  const put = () => {
    tip.hidden = false;
    tip.style.left = `${Math.max(4, Math.min(x + 12, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${y + 16 + tip.offsetHeight > innerHeight ? Math.max(4, y - tip.offsetHeight - 12) : y + 16}px`;
  };
  let found;
  try {
    found = await textOf(node, about, embedded, lanes);
  } catch (error) {
    found = { text: `(${error.message})`, rest: "" };
  }
  if (mine !== steps) return; // something else is pointed at by now
  $("tip-text").textContent = found.rest ? `${found.text}\n […]\n${found.rest}` : found.text;
  put();
}

function quiet() {
  steps++;
  hover = null;
  $("tip").hidden = true;
  redraw();
}

function point(id) {
  const canvas = $(id), picture = pictures[id];
  let entry = -1;
  canvas.addEventListener("pointermove", (event) => {
    const node = picture.at(event.offsetX, event.offsetY);
    if (!node) quiet();
    else if (!hover || node.start !== hover.start || node.lod !== hover.lod) tell(node, event.clientX, event.clientY);
  });
  canvas.addEventListener("pointerleave", quiet);
  canvas.addEventListener("blur", quiet);
  canvas.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (!way || !picture.known || !picture.known.entries.count) return;
    event.preventDefault();
    entry = Math.max(0, Math.min(picture.known.entries.count - 1, entry + way));
    const box = canvas.getBoundingClientRect(), node = nodeOf(picture.known.entries, entry, about.block);
    if (picture.known.score) node.score = picture.known.score[entry];
    tell(node, box.left, box.bottom);
  });
}

async function send(path, body) {
  try {
    const answer = await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
    if (!answer.ok) throw new Error(await answer.text());
  } catch (error) {
    state = { ...state, error: error.message };
    written();
  }
}

function listen() {
  const source = new EventSource("/events");
  source.addEventListener("frame", (event) => {
    frames.add(JSON.parse(event.data));
    redraw();
  });
  source.addEventListener("state", (event) => {
    state = JSON.parse(event.data);
    written();
  });
  source.onerror = () => {
    state = { ...state, doing: "connection lost" };
    written();
  };
}

async function begin() {
  const inside = $("replay");
  for (const id of Object.keys(pictures)) point(id);
  $("history").addEventListener("click", (event) => {
    const place = past.at(event.offsetX);
    if (place !== null) frames.chosen = place === frames.all.length - 1 ? null : place;
    redraw();
  });
  $("which").addEventListener("input", (event) => {
    const place = Number(event.target.value);
    frames.chosen = place === frames.all.length - 1 ? null : place;
    redraw();
  });
  $("live").addEventListener("click", () => {
    frames.chosen = null;
    redraw();
  });
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    send("/say", { text: $("say").value, tokens: Number($("tokens").value) });
    $("say").value = "";
  });
  $("stop").addEventListener("click", () => send("/stop", {}));
  addEventListener("resize", redraw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  if (inside) {
    const replay = JSON.parse(inside.textContent);
    ({ about, texts: embedded, state } = replay);
    frames.all = replay.frames;
    $("form").hidden = $("save").hidden = true;
  } else {
    history.replaceState(null, "", "/"); // the token is in a cookie by now
    about = await (await fetch("/about")).json();
    listen();
  }
  $("model").textContent = `${about.model} · ${about.kind} · blocks of ${about.block}`;
  written();
  redraw();
}

begin();
