// The two side panels: beside the chat where there is room, over it where there is not.

import { byId } from "./dom.js";

const NARROW = { conversations: "(max-width: 1079px)", cache: "(max-width: 819px)" };

class Panel {
  constructor(name, buttons, backdrop) {
    this.panel = byId(name);
    this.buttons = buttons;
    this.backdrop = backdrop;
    this.narrow = matchMedia(NARROW[name]);
    this.isOpen = !this.narrow.matches;
    this.narrow.addEventListener("change", () => this.set(!this.narrow.matches));
    for (const button of buttons) button.addEventListener("click", () => this.toggle(button));
    this.set(this.isOpen);
  }

  get covers() {
    return this.isOpen && this.narrow.matches;
  }

  toggle(button) {
    this.opener = button;
    this.set(!this.isOpen);
    if (this.covers) this.panel.querySelector("button, summary, [tabindex]")?.focus();
  }

  set(isOpen) {
    this.isOpen = isOpen;
    this.panel.classList.toggle("open", isOpen);
    this.panel.inert = !isOpen;
    for (const button of this.buttons) button.setAttribute("aria-expanded", String(isOpen));
    this.backdrop();
  }

  close() {
    if (!this.covers) return false;
    this.set(false);
    this.opener?.focus();
    return true;
  }
}

/** Wire the panels; `close()` closes one that covers the chat and says whether there was one. */
export function bindPanels() {
  const panels = [];
  const backdrop = byId("backdrop");
  const behind = [document.querySelector("main"), document.querySelector("header")];
  const update = () => {
    const covered = panels.some((panel) => panel.covers);
    backdrop.hidden = !covered;
    for (const part of behind) part.inert = covered;
  };
  panels.push(new Panel("conversations", [byId("toggle-conversations")], update));
  panels.push(new Panel("cache", [byId("toggle-cache"), byId("figures-strip")], update));
  const close = () => panels.some((panel) => panel.close());
  for (const button of [backdrop, ...document.querySelectorAll(".close")]) button.addEventListener("click", close);
  return { close };
}
