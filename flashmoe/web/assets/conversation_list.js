// The list of conversations: switch, rename, delete.

import { byId, element } from "./dom.js";
import { titleOf } from "./conversation_store.js";

export class ConversationList {
  /** `act`: {open, rename, remove}, each called with a conversation. */
  constructor(act) {
    this.act = act;
    this.list = byId("conversation-list");
  }

  /** Draw all of them; `isRunning(conversation)` marks those being answered. */
  show(conversations, current, isRunning) {
    if (this.list.querySelector("input")) return; // someone is typing a name
    const focused = document.activeElement?.dataset?.key;
    this.list.replaceChildren(...conversations.map((each) => this.item(each, each === current, isRunning(each))));
    if (focused) this.list.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus();
  }

  item(conversation, isCurrent, isRunning) {
    const title = titleOf(conversation);
    const open = element("button", { type: "button", className: "open", textContent: title, title });
    if (isCurrent) open.setAttribute("aria-current", "true");
    const rename = element("button", { type: "button", className: "small", textContent: "Rename", "aria-label": `Rename ${title}` });
    const remove = element("button", { type: "button", className: "small", textContent: "Delete", "aria-label": `Delete ${title}` });
    open.dataset.key = `open ${conversation.id}`;
    rename.dataset.key = `rename ${conversation.id}`;
    const item = element("li", { className: isCurrent ? "current" : "" }, open);
    if (isRunning) item.append(element("span", { className: "busy", title: "being answered" }, element("span", { className: "unseen", textContent: "being answered" })));
    item.append(element("span", { className: "tools" }, rename, remove));
    open.addEventListener("click", () => this.act.open(conversation));
    rename.addEventListener("click", () => this.edit(item, conversation));
    remove.addEventListener("click", () => this.act.remove(conversation));
    return item;
  }

  edit(item, conversation) {
    const input = element("input", { type: "text", value: titleOf(conversation), maxLength: 120, "aria-label": "Name of the conversation" });
    let isOver = false;
    const end = (name, refocus) => {
      if (isOver) return;
      isOver = true;
      input.remove();
      this.act.rename(conversation, name);
      if (refocus) this.list.querySelector(`[data-key="${CSS.escape(`rename ${conversation.id}`)}"]`)?.focus();
    };
    input.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Enter") end(input.value.trim(), true);
      if (event.key === "Escape") {
        event.stopPropagation();
        end(conversation.title, true);
      }
    });
    input.addEventListener("blur", () => end(input.value.trim(), false));
    item.replaceChildren(input);
    input.focus();
    input.select();
  }
}
