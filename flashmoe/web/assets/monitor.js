// The cache at work: asks the server for its figures, twice a second while something runs, and shows them.

import { liveStats } from "./api.js";
import { byId, element, setText } from "./dom.js";
import { HeatMap } from "./heat_map.js";
import { amount, bytes, duration, megabytesPerSecond, percent, perSecond, whole } from "./numbers.js";
import { RecentChart } from "./recent_chart.js";

const PACE_MS = { busy: 500, idle: 2500, hidden: 30000, lost: 3000 };

export class Monitor {
  constructor() {
    this.heatMap = new HeatMap();
    this.chart = new RecentChart();
    this.meters = Object.fromEntries(["drive", "memory", "kv"].map((name) => [name, new Meter()]));
    for (const [name, meter] of Object.entries(this.meters)) meter.name(METERS[name]);
    byId("meters").append(...Object.values(this.meters).map((meter) => meter.root));
    this.expected = 0; // answers that this page waits for
    document.addEventListener("visibilitychange", () => this.look());
    this.look();
  }

  /** So many answers are under way here: look soon, and often. */
  expect(count) {
    this.expected = count;
    this.look();
  }

  recolour() {
    this.heatMap.recolour();
    this.chart.draw();
  }

  /** Look now, and from now on at the pace that fits. */
  async look() {
    clearTimeout(this.timer);
    if (this.looking) return;
    this.looking = true;
    let pace = PACE_MS.lost;
    try {
      const figures = await liveStats();
      this.show(figures);
      const isBusy = this.expected || figures.requests.running || figures.requests.waiting;
      pace = document.hidden ? PACE_MS.hidden : isBusy ? PACE_MS.busy : PACE_MS.idle;
      this.tell("");
    } catch (problem) {
      this.tell(problem.title ?? "The figures cannot be shown", problem.advice);
      if (!problem.title) console.error(problem); // our mistake
    }
    this.looking = false;
    this.timer = setTimeout(() => this.look(), pace);
  }

  tell(state, advice = "") {
    const connection = byId("connection");
    setText(connection, state);
    connection.title = advice;
    byId("cache").classList.toggle("stale", state !== "");
  }

  show({ model, policy, uptime_s: uptime, requests, tokens, cache, drive, memory, kv }) {
    setText(byId("model"), model);
    document.title = `${model} – FlashMoE`;
    setText(byId("tokens-per-s"), tokens.per_s ? perSecond(tokens.per_s) : "–");
    setText(byId("hit-rate"), cache.recent.length ? percent(cache.hit_rate) : "–");
    setText(byId("running"), whole(requests.running));
    setText(byId("waiting"), whole(requests.waiting));
    setText(byId("queue-limit"), ` of ${whole(requests.queue_limit)}`);
    this.heatMap.show(cache);
    this.chart.show(cache);
    this.meters.drive.show(drive.mb_per_s, drive.probed_mb_per_s, `${megabytesPerSecond(drive.mb_per_s)} of ${megabytesPerSecond(drive.probed_mb_per_s)}`);
    this.meters.memory.show(memory.rss_bytes, memory.ram_budget_bytes, `${bytes(memory.rss_bytes)} of ${bytes(memory.ram_budget_bytes)}`);
    this.meters.kv.show(kv.tokens_used, kv.tokens_total, `${whole(kv.tokens_used)} of ${whole(kv.tokens_total)} tokens`);
    this.strip(tokens, cache, memory, requests);
    parts(memory);
    const read = `${amount(drive.bytes_read)} read, ${duration(drive.stall_s)} waited for it`;
    const made = tokens.generated ? `${whole(tokens.generated)} tokens written, ` : "";
    setText(byId("totals"), `Policy ${policy}. In ${duration(uptime)}: ${made}${read}.`);
  }

  strip(tokens, cache, memory, requests) {
    const speed = tokens.per_s ? `${perSecond(tokens.per_s)} tokens/s` : "idle";
    const hits = cache.recent.length ? ` · ${percent(cache.hit_rate)} hits` : "";
    const queue = requests.waiting ? ` · ${whole(requests.waiting)} waiting` : "";
    setText(byId("figures-strip"), `${speed}${hits}${queue} · ${bytes(memory.rss_bytes)} of ${bytes(memory.ram_budget_bytes)}`);
  }
}

const METERS = { drive: "Drive, beside its peak", memory: "RAM, beside the budget", kv: "KV cache" };

class Meter {
  constructor() {
    this.label = element("span");
    this.value = element("span", { className: "value" });
    this.fill = element("span", { className: "fill" });
    this.bar = element("div", { className: "bar-track", role: "meter", "aria-valuemin": "0" }, this.fill);
    this.root = element("div", { className: "meter" }, this.label, this.value, this.bar);
  }

  name(text) {
    this.label.textContent = text;
    this.bar.setAttribute("aria-label", text);
  }

  show(value, most, text) {
    const share = most ? Math.min(1, value / most) : 0;
    setText(this.value, text);
    this.fill.style.transform = `scaleX(${share})`;
    this.bar.setAttribute("aria-valuemax", String(Math.round(Math.max(most, value))));
    this.bar.setAttribute("aria-valuenow", String(Math.round(value)));
    this.bar.setAttribute("aria-valuetext", text);
    this.bar.classList.toggle("over", value > most);
  }
}

function parts({ parts, peak_rss_bytes: peak }) {
  const rows = [...parts, ["most in use so far", peak]];
  const body = byId("memory-parts");
  if (body.rows.length !== rows.length) {
    body.replaceChildren(...rows.map(() => element("tr", {}, element("td"), element("td"))));
  }
  rows.forEach(([name, size], row) => {
    setText(body.rows[row].cells[0], name);
    setText(body.rows[row].cells[1], bytes(size));
  });
}
