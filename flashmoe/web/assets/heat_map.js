// Layers down, experts across: who is in memory, who has just come, who has just left.

import { byId, setText } from "./dom.js";
import { percent, whole } from "./numbers.js";

const FADE_MS = 2500;
const FRAME_MS = 50;
const TALLEST = 250; // pixels
const CELL = { least: 2, most: 11 };

export class HeatMap {
  constructor() {
    this.canvas = byId("heat-map");
    this.place = byId("heat-map-place");
    this.still = matchMedia("(prefers-reduced-motion: reduce)");
    this.layers = [];
    this.experts = 0;
    this.isIn = new Uint8Array(0);
    this.since = new Float64Array(0); // when each came or left; 0: before we looked
    this.drawnAt = 0;
    new ResizeObserver(() => this.fit()).observe(this.canvas.parentElement);
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => setText(this.place, "layers down, experts across"));
    byId("residency-details").addEventListener("toggle", () => this.table());
  }

  /** The cache's figures, as the server gives them. */
  show({ layers, experts, resident, slots, tier }) {
    const isFirst = layers.length !== this.layers.length || experts !== this.experts;
    if (isFirst) this.begin(layers, experts);
    const now = performance.now();
    let came = 0;
    let left = 0;
    resident.forEach((digits, row) => {
      for (let expert = 0; expert < experts; expert++) {
        const place = row * experts + expert;
        const digit = digits[digits.length - 1 - (expert >> 2)]; // of four experts
        const isIn = (parseInt(digit, 16) >> (expert & 3)) & 1;
        if (isIn === this.isIn[place]) continue;
        this.isIn[place] = isIn;
        if (isFirst) continue;
        this.since[place] = now;
        if (isIn) came++;
        else left++;
      }
    });
    if (isFirst) this.fit();
    this.summary(slots, tier, came, left);
    this.table();
    this.draw();
  }

  begin(layers, experts) {
    this.layers = layers;
    this.experts = experts;
    this.isIn = new Uint8Array(layers.length * experts);
    this.since = new Float64Array(layers.length * experts);
  }

  summary(slots, tier, came, left) {
    const resident = this.isIn.reduce((sum, bit) => sum + bit, 0);
    const all = this.layers.length * this.experts;
    const moved = came + left ? ` ${whole(came)} came and ${whole(left)} left since the last look.` : "";
    const text = `${whole(resident)} of ${whole(all)} experts (${percent(all ? resident / all : 0)}) in ${whole(slots)} slots.${moved}`;
    setText(byId("residency-summary"), text);
    setText(byId("tier"), tier ?? "RAM");
    this.canvas.setAttribute("aria-label", `${this.layers.length} layers of ${this.experts} experts: ${text}`);
  }

  table() {
    if (!byId("residency-details").open) return;
    const rows = this.layers.map((layer, row) => {
      const count = this.isIn.subarray(row * this.experts, (row + 1) * this.experts).reduce((sum, bit) => sum + bit, 0);
      return [layer, `${count} of ${this.experts}`, percent(count / this.experts)];
    });
    const body = byId("residency-rows");
    while (body.rows.length < rows.length) for (let i = body.insertRow(), n = 0; n < 3; n++) i.insertCell();
    while (body.rows.length > rows.length) body.deleteRow(-1);
    rows.forEach((cells, row) => cells.forEach((text, cell) => setText(body.rows[row].cells[cell], String(text))));
  }

  /** The room has changed. Cells begin and end at whole device pixels, or they would blur. */
  fit() {
    if (!this.experts) return;
    const scale = window.devicePixelRatio || 1;
    const room = Math.floor(this.canvas.parentElement.clientWidth * scale);
    this.edges = Array.from({ length: this.experts + 1 }, (_, expert) => Math.round((expert * room) / this.experts));
    const least = CELL.least * scale;
    const fitting = Math.floor(Math.min(TALLEST * scale / this.layers.length, CELL.most * scale));
    this.down = Math.max(Math.floor(least), fitting);
    this.gap = Math.min(room / this.experts, this.down) >= 4 * scale ? Math.max(1, Math.round(scale)) : 0;
    this.canvas.width = room;
    this.canvas.height = this.down * this.layers.length;
    this.canvas.style.width = `${this.canvas.width / scale}px`;
    this.canvas.style.height = `${this.canvas.height / scale}px`;
    this.draw();
  }

  /** Draw it, and go on as long as something fades. */
  draw() {
    if (this.frame) return;
    this.frame = requestAnimationFrame((now) => {
      this.frame = 0;
      if (now - this.drawnAt < FRAME_MS) return this.draw();
      this.drawnAt = now;
      if (this.paint(now) && !document.hidden) this.draw();
    });
  }

  paint(now) {
    const paper = this.canvas.getContext("2d");
    const colour = this.colours();
    const height = this.down - this.gap;
    let fades = false;
    paper.clearRect(0, 0, this.canvas.width, this.canvas.height);
    for (let place = 0; place < this.isIn.length; place++) {
      const expert = place % this.experts;
      const x = this.edges[expert];
      const width = Math.max(1, this.edges[expert + 1] - x - this.gap);
      const y = Math.floor(place / this.experts) * this.down;
      const isIn = this.isIn[place];
      paper.fillStyle = isIn ? colour.resident : colour.absent;
      paper.fillRect(x, y, width, height);
      const age = this.since[place] ? (now - this.since[place]) / FADE_MS : 1;
      if (age >= 1) continue;
      fades = true;
      paper.globalAlpha = this.still.matches ? 1 : 1 - Math.max(0, age) ** 2;
      paper.fillStyle = isIn ? colour.arrived : colour.left;
      paper.fillRect(x, y, width, height);
      paper.globalAlpha = 1;
    }
    return fades;
  }

  colours() {
    this.palette ??= Object.fromEntries(
      ["resident", "arrived", "left", "absent"].map((name) => [name, getComputedStyle(byId(`swatch-${name}`)).backgroundColor]),
    );
    return this.palette;
  }

  recolour() {
    this.palette = null;
    if (this.experts) this.draw();
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect();
    const expert = Math.floor(((event.clientX - box.left) / box.width) * this.experts);
    const row = Math.floor(((event.clientY - box.top) / box.height) * this.layers.length);
    if (!(expert >= 0 && expert < this.experts && row >= 0 && row < this.layers.length)) return;
    const state = this.isIn[row * this.experts + expert] ? "in memory" : "on the drive";
    setText(this.place, `layer ${this.layers[row]}, expert ${expert}: ${state}`);
  }
}
