// One bar a step: the share of its experts that were found in memory.

import { byId, setText } from "./dom.js";
import { amount, percent, whole } from "./numbers.js";

const BARS = 120;
const HEIGHT = 48;

export class RecentChart {
  constructor() {
    this.canvas = byId("recent-chart");
    this.steps = [];
    new ResizeObserver(() => this.draw()).observe(this.canvas.parentElement);
  }

  show({ recent, hit_rate: hitRate }) {
    this.steps = recent;
    const last = recent.at(-1);
    const text = last
      ? `Last step: ${whole(last.hits)} hits, ${whole(last.misses)} misses, ${amount(last.bytes)} read.`
      : "No step yet.";
    setText(byId("recent-summary"), text);
    this.canvas.setAttribute("aria-label", `Hits and misses of ${whole(recent.length)} steps: ${percent(hitRate)} hits. ${text}`);
    this.draw();
  }

  draw() {
    const scale = window.devicePixelRatio || 1;
    this.canvas.width = Math.floor(this.canvas.parentElement.clientWidth * scale);
    this.canvas.height = Math.round(HEIGHT * scale);
    this.canvas.style.width = `${this.canvas.width / scale}px`;
    this.canvas.style.height = `${HEIGHT}px`;
    const paper = this.canvas.getContext("2d");
    const [resident, arrived, absent] = ["resident", "arrived", "absent"].map((name) => getComputedStyle(byId(`swatch-${name}`)).backgroundColor);
    const edge = (bar) => Math.round((bar * this.canvas.width) / BARS);
    const gap = this.canvas.width >= 3 * BARS ? 1 : 0;
    const first = BARS - this.steps.length; // the newest is at the right
    for (let bar = 0; bar < BARS; bar++) {
      const step = this.steps[bar - first];
      const asked = step ? step.hits + step.misses : 0;
      const misses = asked ? Math.round((this.canvas.height * step.misses) / asked) : 0;
      paper.fillStyle = asked ? resident : absent;
      paper.fillRect(edge(bar), 0, edge(bar + 1) - edge(bar) - gap, this.canvas.height);
      paper.fillStyle = arrived;
      paper.fillRect(edge(bar), 0, edge(bar + 1) - edge(bar) - gap, misses);
    }
  }
}
