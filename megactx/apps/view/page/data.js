// What the page knows: refocuses, the text behind a node, and how numbers are written.
"use strict";

const REMEMBERED = 400; // refocuses
const TEXTS = 2000; // of nodes

const $ = (id) => document.getElementById(id);
const number = new Intl.NumberFormat("en-US");
const whole = (value) => number.format(Math.round(value));

// The trees of a frame: [name, first token, tokens]; without parts there is the history alone.
function lanesOf(frame) {
  return (frame.lanes || [["", 0, frame.tokens]]).map(([name, first, tokens, licence = ""]) => ({ name, first, tokens, licence }));
}

function laneAt(lanes, token) {
  return lanes.findLast((lane) => lane.first <= token) || lanes[0];
}

// [[lod, count], ...] -> entries that stand one behind the other, each lane from its first token on.
function entriesOf(runs, block, lanes) {
  const total = runs.reduce((sum, [, count]) => sum + count, 0);
  const lod = new Uint8Array(total), start = new Float64Array(total), stop = new Float64Array(total);
  let entry = 0, lane = 0, at = lanes[0].first;
  for (const [level, count] of runs) {
    const width = block ** level;
    for (let i = 0; i < count; i++, entry++) {
      if (lane + 1 < lanes.length && at >= lanes[lane].first + lanes[lane].tokens) at = lanes[++lane].first;
      lod[entry] = level;
      start[entry] = at;
      stop[entry] = at += width;
    }
  }
  return { count: total, lod, start, stop };
}

function nodeOf(entries, entry, block) {
  const lod = entries.lod[entry], width = block ** lod;
  return { lod, index: entries.start[entry] / width, start: entries.start[entry], width };
}

// Which entry holds a token: entries ascend.
function entryAt(entries, token) {
  let low = 0, high = entries.count - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (entries.start[middle] <= token) low = middle;
    else high = middle - 1;
  }
  return low;
}

function nameOf(lod, block) {
  return lod === 0 ? "token" : `gist of ${whole(block ** lod)}`;
}

function placeOf(node, lanes) {
  const lane = laneAt(lanes, node.start), start = node.start - lane.first, licence = lane.licence ? ` (${lane.licence})` : "";
  const of = lane.name ? ` of ${lane.name}${licence}` : "";
  return (node.width === 1 ? `token ${whole(start)}` : `tokens ${whole(start)} to ${whole(start + node.width - 1)}`) + of;
}

// A raw token is read with the block around it; a word alone says little.
const texts = new Map();
async function textOf(node, about, embedded, lanes) {
  const asked = node.lod === 0 ? { lod: 1, index: Math.floor(node.start / about.block) } : node;
  const key = `${asked.lod}/${asked.index}`;
  if (embedded) {
    const lane = laneAt(lanes, node.start);
    if (lane.name) return { text: "(a replay holds the text of the history, not of parts)", rest: "" };
    return embeddedText({ ...asked, index: asked.index - lane.first / about.block ** asked.lod }, about.block, embedded);
  }
  if (!texts.has(key)) {
    if (texts.size >= TEXTS) texts.delete(texts.keys().next().value);
    const answer = await fetch(`/text?lod=${asked.lod}&index=${asked.index}`);
    if (!answer.ok) throw new Error(await answer.text());
    texts.set(key, await answer.json());
  }
  return texts.get(key);
}

function embeddedText(node, block, blocks) {
  const first = node.index * block ** (node.lod - 1), count = block ** (node.lod - 1);
  const here = blocks.slice(first, first + count);
  if (here.length * block <= 208) return { text: here.join(""), rest: "" };
  return { text: here.slice(0, Math.ceil(160 / block)).join(""), rest: here.slice(-Math.ceil(48 / block)).join("") };
}

class Frames {
  constructor() {
    this.all = [];
    this.chosen = null; // null: the newest
  }
  add(frame) {
    this.all.push(frame);
    if (this.all.length > REMEMBERED) {
      this.all.shift();
      if (this.chosen !== null) this.chosen = Math.max(0, this.chosen - 1);
    }
  }
  get place() {
    return this.chosen === null ? this.all.length - 1 : this.chosen;
  }
  get shown() {
    return this.all[this.place];
  }
}
