// Canvases. Each draws a frame and says which node is at a point. Everywhere the history goes from left to right.
"use strict";

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const LABEL = 52; // pixels in front of the rows of the timeline

// Ready to draw in CSS pixels, sharp on any screen.
function canvasOf(id, height) {
  const canvas = $(id), width = canvas.clientWidth, scale = window.devicePixelRatio || 1;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  pen.font = '12px system-ui, "Segoe UI", "DejaVu Sans", sans-serif';
  pen.textBaseline = "middle";
  return { pen, width, height };
}

const colourOf = (about, lod) => about.colours[Math.min(lod, about.colours.length - 1)];

function triangle(pen, x, y, up) {
  const side = up ? 1 : -1;
  pen.beginPath();
  pen.moveTo(x, y - 3.5 * side);
  pen.lineTo(x + 4, y + 3.5 * side);
  pen.lineTo(x - 4, y + 3.5 * side);
  pen.fill();
}

// Levels of the history's tree, the coarsest on top, then what the model sees of it, then, with a readout, the past blocks
// that are like what it expects next, then the edits of this refocus; below it a lane for each part.
const timeline = {
  draw(frame, about, hover) {
    const block = about.block, lanes = lanesOf(frame), own = lanes[lanes.length - 1], levels = [];
    const entries = entriesOf(frame.window, block, lanes), edits = [...frame.edits, ...frame.room];
    for (let lod = 1; block ** lod <= frame.tokens; lod++) levels.unshift(lod);
    const row = 15, tall = 34, low = 20, top = levels.length * row, foot = about.expects ? row : 0, base = top + tall + foot + 38;
    const { pen, width } = canvasOf("timeline", base + (lanes.length - 1) * (low + 18));
    const xOf = (lane, total) => (token) => LABEL + ((width - LABEL) * (token - lane.first)) / Math.max(total, 1);
    const total = Math.max(frame.tokens, 1), x = xOf(own, total);
    levels.forEach((lod, place) => {
      const span = block ** lod, count = Math.floor(frame.tokens / span), wide = x(own.first + span) - LABEL;
      pen.fillStyle = css("--soft");
      pen.fillText(`LOD${lod}`, 0, place * row + row / 2);
      pen.fillStyle = colourOf(about, lod);
      pen.globalAlpha = 0.38;
      const seam = wide > 4 ? 1 : 0; // gists are told apart where they are wide enough
      if (seam) for (let i = 0; i < count; i++) pen.fillRect(LABEL + i * wide, place * row + 3, wide - seam, row - 5);
      else pen.fillRect(LABEL, place * row + 3, count * wide, row - 5);
      pen.globalAlpha = 1;
    });
    pen.fillStyle = css("--soft");
    pen.fillText("sees", 0, top + tall / 2);
    const strips = lanes.slice(0, -1).map((lane, place) => ({ lane, x: xOf(lane, lane.tokens), top: base + place * (low + 18), tall: low, foot: 0 }));
    strips.push({ lane: own, x, top, tall, foot });
    const marks = (frame.near || []).map(([index, cosine]) => {
      const start = index * block, left = x(start);
      return { lod: 1, index, start, width: block, cosine, left, right: Math.max(left + 3, x(start + block) - 1) };
    });
    if (foot) pen.fillText("expects", 0, top + tall + row / 2 + 1);
    this.marks(pen, marks, top + tall + 3, row - 4);
    for (const strip of strips) {
      pen.fillStyle = css("--soft");
      pen.textAlign = "left";
      if (strip.lane.name) pen.fillText(strip.lane.name, 0, strip.top + low / 2, LABEL - 6);
      this.strip(pen, entries, about, strip);
      pen.fillStyle = css("--ink");
      for (const [expand, lod, index] of edits) {
        const centre = (index + 0.5) * block ** lod;
        if (laneAt(lanes, centre) === strip.lane) triangle(pen, strip.x(centre), strip.top + strip.tall + strip.foot + 9, expand);
      }
      if (hover && laneAt(lanes, hover.start) === strip.lane) {
        const from = strip.lane === own ? 1 : strip.top, wide = strip.x(hover.start + hover.width) - strip.x(hover.start);
        pen.strokeStyle = css("--ink");
        pen.lineWidth = 2;
        pen.strokeRect(strip.x(hover.start) - 1, from, Math.max(3, wide + 1), strip.top + strip.tall + strip.foot - from);
      }
    }
    pen.fillStyle = css("--soft");
    const steps = width < 500 ? 2 : 4;
    for (let i = 0; i <= steps; i++) {
      pen.textAlign = i === 0 ? "left" : i === steps ? "right" : "center";
      pen.fillText(whole((total * i) / steps), LABEL + ((width - LABEL) * i) / steps, base - 8);
    }
    this.known = { entries, total, width, strips, top, block, levels, row, own, marks, foot };
  },
  marks(pen, marks, top, tall) {
    // The stronger the nearer. All gists are alike, so a cosine is told from those beside it.
    const cosines = marks.map((mark) => mark.cosine), least = Math.min(...cosines), most = Math.max(...cosines);
    pen.fillStyle = css("--accent");
    for (const mark of [...marks].reverse()) {
      pen.globalAlpha = most > least ? 0.25 + (0.75 * (mark.cosine - least)) / (most - least) : 1;
      pen.fillRect(mark.left, top, mark.right - mark.left, tall);
    }
    pen.globalAlpha = 1;
  },
  strip(pen, entries, about, { lane, x, top, tall }) {
    // Joined runs of one level, with a seam where entries are wide enough to be seen.
    const end = lane.first + lane.tokens;
    let first = entries.count ? entryAt(entries, lane.first) : 0;
    if (entries.start[first] < lane.first) first++; // the lane is empty
    for (let entry = first; entry < entries.count && entries.start[entry] < end; ) {
      const lod = entries.lod[entry];
      let last = entry;
      while (last + 1 < entries.count && entries.lod[last + 1] === lod && entries.start[last + 1] < end) last++;
      const one = x(entries.stop[entry]) - x(entries.start[entry]);
      pen.fillStyle = colourOf(about, lod);
      if (one > 4) for (let e = entry; e <= last; e++) pen.fillRect(x(entries.start[e]), top, one - 1, tall);
      else pen.fillRect(x(entries.start[entry]), top, x(entries.stop[last]) - x(entries.start[entry]), tall);
      entry = last + 1;
    }
  },
  at(px, py) {
    const k = this.known;
    if (!k || px < LABEL || k.entries.count === 0) return null;
    const share = (px - LABEL) / (k.width - LABEL), strip = k.strips.find((s) => py >= s.top && py <= s.top + s.tall);
    if (strip) {
      const tokens = strip.lane === k.own ? k.total : strip.lane.tokens;
      const token = Math.min(tokens - 1, Math.floor(share * tokens));
      if (token >= strip.lane.tokens) return null;
      return nodeOf(k.entries, entryAt(k.entries, strip.lane.first + token), k.block);
    }
    const under = py - k.strips.at(-1).top - k.strips.at(-1).tall;
    if (under > 0 && under <= k.foot) return k.marks.find((mark) => px >= mark.left - 2 && px <= mark.right + 2) || null;
    if (py >= k.top) return null;
    const token = Math.min(k.total - 1, Math.floor(share * k.total));
    const lod = k.levels[Math.floor(py / k.row)], span = k.block ** lod, index = Math.floor(token / span);
    if ((index + 1) * span > k.total) return null;
    return { lod, index: index + k.own.first / span, start: k.own.first + index * span, width: span };
  },
};

// The working context as cells in rows, like text.
const grid = {
  draw(frame, about, hover) {
    const entries = entriesOf(frame.window, about.block, lanesOf(frame)), wide = $("window").clientWidth;
    const cell = entries.count > 3000 ? 5 : entries.count > 900 ? 7 : entries.count > 300 ? 10 : 14, tall = Math.round(cell * 1.7);
    const columns = Math.max(1, Math.floor(wide / cell)), rows = Math.max(1, Math.ceil(entries.count / columns));
    const { pen } = canvasOf("window", rows * (tall + 1) + 2);
    for (let entry = 0; entry < entries.count; entry++) {
      pen.fillStyle = colourOf(about, entries.lod[entry]);
      pen.fillRect((entry % columns) * cell, Math.floor(entry / columns) * (tall + 1) + 1, cell - 1, tall);
    }
    if (hover && entries.count) {
      pen.strokeStyle = css("--ink");
      pen.lineWidth = 2;
      const first = entryAt(entries, hover.start), last = entryAt(entries, hover.start + hover.width - 1);
      for (let entry = first; entry <= last; entry++) {
        pen.strokeRect((entry % columns) * cell - 0.5, Math.floor(entry / columns) * (tall + 1) + 0.5, cell, tall + 1);
      }
    }
    this.known = { entries, columns, cell, tall, block: about.block };
  },
  at(px, py) {
    const k = this.known, column = k ? Math.floor(px / k.cell) : 0;
    if (!k || column >= k.columns) return null;
    const entry = Math.floor(py / (k.tall + 1)) * k.columns + column;
    return entry < k.entries.count ? nodeOf(k.entries, entry, k.block) : null;
  },
};

// LensNet's scores of the window before the edits, one bar per entry, with what was then done.
const scores = {
  draw(frame, about, hover) {
    const { pen, width, height } = canvasOf("scores", 150), middle = 70, reach = 52;
    const entries = entriesOf(frame.scored, about.block, lanesOf(frame));
    const x = (entry) => LABEL + ((width - LABEL) * entry) / Math.max(1, entries.count);
    const thick = Math.max(1, (width - LABEL) / Math.max(1, entries.count) - (entries.count < 200 ? 1 : 0));
    frame.scores.forEach((score, entry) => {
      pen.fillStyle = colourOf(about, entries.lod[entry]);
      pen.fillRect(x(entry), score > 0 ? middle - reach * score : middle, thick, Math.max(reach * Math.abs(score), 0.5));
    });
    pen.fillStyle = css("--soft");
    pen.strokeStyle = css("--soft");
    pen.fillText("expand", 0, middle - reach + 8);
    pen.fillText("collapse", 0, middle + reach - 8);
    pen.setLineDash([3, 4]);
    for (const score of [-frame.threshold, 0, frame.threshold]) {
      pen.beginPath();
      pen.moveTo(LABEL, middle - reach * score + 0.5);
      pen.lineTo(width, middle - reach * score + 0.5);
      pen.globalAlpha = score ? 0.8 : 0.4;
      pen.stroke();
    }
    pen.globalAlpha = 1;
    pen.setLineDash([]);
    pen.fillStyle = css("--ink");
    for (const [expand, lod, index] of frame.edits) {
      const start = index * about.block ** lod, first = entryAt(entries, start);
      const last = entryAt(entries, start + about.block ** lod - 1);
      triangle(pen, x((first + last + 1) / 2), expand ? middle - reach - 9 : middle + reach + 9, expand);
    }
    pen.fillStyle = css("--soft");
    pen.fillText("entries", LABEL, height - 8);
    pen.textAlign = "right";
    pen.fillText(whole(entries.count), width, height - 8);
    if (hover) {
      const first = entryAt(entries, hover.start), last = entryAt(entries, hover.start + hover.width - 1);
      pen.globalAlpha = 0.16;
      pen.fillStyle = css("--ink");
      pen.fillRect(x(first) - 1, middle - reach, x(last + 1) - x(first) + 2, 2 * reach);
      pen.globalAlpha = 1;
    }
    this.known = { entries, width, block: about.block, score: frame.scores };
  },
  at(px) {
    const k = this.known;
    if (!k || px < LABEL || !k.entries.count) return null;
    const entry = Math.min(k.entries.count - 1, Math.floor(((px - LABEL) / (k.width - LABEL)) * k.entries.count));
    return { ...nodeOf(k.entries, entry, k.block), score: k.score[entry] };
  },
};

// Expands upwards, collapses downwards, those that only made room in grey below them; one bar per refocus.
const past = {
  draw(frames, about) {
    const { pen, width, height } = canvasOf("history", 120), all = frames.all, middle = 56, reach = 44;
    const up = (frame) => frame.edits.filter(([expand]) => expand).length, down = (frame) => frame.edits.length - up(frame);
    const most = Math.max(2, ...all.map((frame) => Math.max(up(frame), down(frame) + frame.room.length)));
    const step = Math.min(22, (width - LABEL) / Math.max(1, all.length)), thick = Math.max(1, step - (step > 4 ? 2 : 0));
    const y = (count) => (reach * count) / most;
    all.forEach((frame, place) => {
      const x = LABEL + place * step;
      if (place === frames.place) {
        pen.fillStyle = css("--line");
        pen.fillRect(x - 1, 4, Math.max(3, thick + 2), 2 * middle - 8);
      }
      pen.fillStyle = css("--expand");
      pen.fillRect(x, middle - y(up(frame)), thick, y(up(frame)));
      pen.fillStyle = css("--collapse");
      pen.fillRect(x, middle, thick, y(down(frame)));
      pen.fillStyle = css("--soft");
      pen.fillRect(x, middle + y(down(frame)), thick, y(frame.room.length));
    });
    pen.fillStyle = css("--soft");
    pen.fillRect(LABEL, middle, width - LABEL, 0.5);
    pen.fillText("expand", 0, middle - reach + 8);
    pen.fillText("collapse", 0, middle + reach - 8);
    this.known = { step, count: all.length, most };
  },
  at(px) {
    const k = this.known, place = k ? Math.floor((px - LABEL) / k.step) : -1;
    return place >= 0 && place < k.count ? place : null;
  },
};
