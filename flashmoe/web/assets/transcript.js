// The turns of one conversation as they are shown. Knows nothing about the server or about storage.

import { byId, element } from "./dom.js";
import { MarkdownView, copyText } from "./markdown.js";
import { duration, perSecond, whole } from "./numbers.js";

const TOLD_MS = 20000; // then what was announced goes: it can be read where it stands
const NEAR_END = 80; // pixels: whoever is that near wants to follow

const ACTIONS = { retry: "Try again", key: "Enter the key", settings: "Open settings", new: "New conversation" };

export class Transcript {
  /** `act(name, message)` is called for "regenerate" and the actions of problems. */
  constructor(act) {
    this.act = act;
    this.scroller = byId("transcript");
    this.turns = byId("turns");
    this.toNewest = byId("to-newest");
    this.views = new Map(); // message -> view
    this.scroller.addEventListener("scroll", () => this.offerNewest(), { passive: true });
    this.toNewest.addEventListener("click", () => this.scrollToEnd());
  }

  /** Show another conversation. */
  show(conversation) {
    this.turns.replaceChildren();
    this.views.clear();
    byId("welcome").hidden = conversation.messages.length > 0;
    for (const message of conversation.messages) this.add(message);
    this.scrollToEnd();
  }

  /** A new turn, at the end. */
  add(message) {
    byId("welcome").hidden = true;
    const view = message.role === "user" ? userTurn(message) : answerTurn(message);
    this.views.set(message, view);
    this.turns.append(view.root);
    this.update(message);
    this.scrollToEnd();
  }

  remove(message) {
    this.views.get(message)?.root.remove();
    this.views.delete(message);
  }

  /** An answer has changed; drawn before the next frame, however many pieces come until then. */
  update(message) {
    const view = this.views.get(message);
    if (!view || view.awaited) return;
    view.awaited = true;
    requestAnimationFrame(() => {
      view.awaited = false;
      const follow = this.isAtEnd();
      view.draw?.(message);
      if (view.foot) this.drawFoot(view, message);
      if (follow) this.scrollToEnd();
      this.offerNewest();
    });
  }

  drawFoot(view, message) {
    if (message.state === "running" || view.foot.hasChildNodes()) return;
    view.foot.replaceChildren(...footOf(message, this.act));
  }

  isAtEnd() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    return scrollHeight - scrollTop - clientHeight < NEAR_END;
  }

  scrollToEnd() {
    this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  offerNewest() {
    this.toNewest.hidden = this.isAtEnd();
  }
}

function userTurn(message) {
  const body = element("div", { className: "body", textContent: message.content });
  return { root: element("article", { className: "turn user" }, element("h2", { className: "unseen", textContent: "You" }), body) };
}

function answerTurn(message) {
  const body = element("div", { className: "body" });
  const thoughts = element("p");
  const thinking = element("details", { className: "thinking", hidden: true }, element("summary", { textContent: "Thoughts" }), thoughts);
  const waiting = element("p", { className: "waiting", textContent: "Reading the prompt" });
  const foot = element("footer");
  const root = element("article", { className: "turn answer" }, element("h2", { className: "unseen", textContent: "Answer" }), thinking, body, waiting, foot);
  // Only an answer that comes now is announced, block by block; an old one is read when one goes there.
  const announcer = byId("announcer");
  const isNew = message.state === "running";
  if (isNew) announcer.replaceChildren();
  const view = new MarkdownView(body, (text) => isNew && announce(announcer, text));
  const draw = () => {
    const isOver = message.state !== "running";
    root.classList.toggle("running", !isOver);
    waiting.hidden = isOver || message.content !== "" || Boolean(message.reasoning);
    thinking.hidden = !message.reasoning;
    thoughts.textContent = message.reasoning ?? "";
    view.show(message.content, isOver);
  };
  return { root, foot, draw };
}

function announce(announcer, text) {
  const told = element("p", { textContent: text });
  announcer.append(told);
  setTimeout(() => told.remove(), TOLD_MS);
}

function footOf(message, act) {
  const parts = [];
  if (message.problem) parts.push(problemBox(message, act));
  const buttons = element("div", { className: "actions" });
  if (message.content) {
    const copy = element("button", { type: "button", textContent: "Copy" });
    copy.addEventListener("click", () => copyText(message.content, copy));
    buttons.append(copy);
  }
  if (message.problem?.action !== "retry") {
    const again = element("button", { type: "button", textContent: "Regenerate" });
    again.addEventListener("click", () => act("regenerate", message));
    buttons.append(again);
  }
  buttons.append(element("span", { className: "figures", textContent: figuresOf(message) }));
  parts.push(buttons);
  return parts;
}

function problemBox(message, act) {
  const { title, advice, action } = message.problem;
  const box = element("div", { className: "problem", role: "alert" }, element("strong", { textContent: title }), element("p", { textContent: advice }));
  if (action) {
    const button = element("button", { type: "button", textContent: ACTIONS[action] });
    button.addEventListener("click", () => act(action, message));
    box.append(button);
  }
  return box;
}

function figuresOf({ state, finish, figures = {} }) {
  const { tokens, perS, firstS, prompt, cached } = figures;
  const parts = [];
  if (state === "stopped") parts.push("stopped");
  else if (finish === "length") parts.push("ended at the length limit");
  if (tokens) parts.push(`${whole(tokens)} tokens`);
  if (perS) parts.push(`${perSecond(perS)} tokens/s`);
  if (firstS >= 0.05) parts.push(`first after ${duration(firstS)}`);
  if (cached) parts.push(`${whole(cached)} of ${whole(prompt)} prompt tokens reused`);
  return parts.join(" · ");
}
