// Joins the page's parts: conversations, answers, panels and the cache at work.

import { Answers } from "./answers.js";
import { ConversationList } from "./conversation_list.js";
import { ConversationStore, cutOff, newConversation, titleOf } from "./conversation_store.js";
import { byId, element } from "./dom.js";
import { Monitor } from "./monitor.js";
import { OtherTabs } from "./other_tabs.js";
import { bindPanels } from "./panels.js";
import { bindSettings } from "./settings.js";
import { bindTheme } from "./theme_toggle.js";
import { Transcript } from "./transcript.js";

const SAVE_MS = 1000; // while an answer comes: a reload loses no more than this
const CURRENT = "flashmoe.current";

const savedAt = new WeakMap(); // conversation -> when
const store = await ConversationStore.open();
let conversations = await store.all();
let current = conversations.find(({ id }) => id === remembered()) ?? conversations[0] ?? newConversation();

const monitor = new Monitor();
const panels = bindPanels();
bindTheme(() => monitor.recolour());
const openSettings = bindSettings(byId("settings"), () => monitor.look());
const transcript = new Transcript(act);
const list = new ConversationList({ open, rename, remove });
const answers = new Answers(pieceCame, answerEnded);
const otherTabs = new OtherTabs(changedElsewhere, () => conversations.filter((each) => answers.isRunning(each)));
const message = byId("message");

byId("storage-note").hidden = store.keeps;
byId("open-settings").addEventListener("click", () => openSettings());
byId("new-conversation").addEventListener("click", startAfresh);
byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send(message.value);
});
byId("stop").addEventListener("click", () => answers.stop(current));
for (const button of document.querySelectorAll(".suggestion")) button.addEventListener("click", () => send(button.textContent));
message.addEventListener("input", fitMessage);
message.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send(message.value);
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing || byId("settings").open) return;
  if (!panels.close()) answers.stop(current);
});

for (const waiting of document.querySelectorAll("main :disabled")) waiting.disabled = false; // until here nobody listened
open(current);

// Sending and answers

function send(text) {
  if (!text.trim() || answers.isRunning(current) || isAnsweredElsewhere()) return;
  const conversation = current;
  if (!conversations.includes(conversation)) conversations.unshift(conversation);
  const question = { role: "user", content: text.trim(), state: "done" };
  conversation.messages.push(question);
  transcript.add(question);
  message.value = "";
  fitMessage();
  answer(conversation);
}

function answer(conversation) {
  const reply = { role: "assistant", content: "", state: "running" };
  conversation.messages.push(reply);
  conversation.changed = Date.now();
  transcript.add(reply);
  notice("");
  const running = answers.run(conversation, reply);
  save(conversation);
  refresh();
  monitor.expect(answers.count);
  return running;
}

function pieceCame(conversation, reply) {
  if (conversation === current) transcript.update(reply);
  if (performance.now() - (savedAt.get(conversation) ?? 0) > SAVE_MS) keep(conversation);
}

function answerEnded(conversation, reply) {
  if (conversation === current) transcript.update(reply);
  save(conversation);
  refresh();
  monitor.expect(answers.count);
}

/** What a button under an answer asks for. */
function act(name, reply) {
  if (name === "key" || name === "settings") return openSettings(name === "key" ? "key" : "system");
  if (name === "new") return startAfresh();
  if (answers.isRunning(current) || isAnsweredElsewhere()) return;
  const place = current.messages.indexOf(reply);
  for (const each of current.messages.splice(place)) transcript.remove(each);
  answer(current);
  focusMessage();
}

// Conversations

function open(conversation) {
  current = conversation;
  try {
    localStorage.setItem(CURRENT, conversation.id);
  } catch {
    // then a reload opens the last one that changed
  }
  transcript.show(conversation);
  refresh();
  panels.close();
  focusMessage();
}

function startAfresh() {
  open(current.messages.length ? newConversation() : current);
}

function rename(conversation, name) {
  if (name && name !== titleOf(conversation)) {
    conversation.title = name;
    save(conversation);
  }
  refresh();
}

async function remove(conversation) {
  answers.stop(conversation);
  const place = conversations.indexOf(conversation);
  conversations = conversations.filter((each) => each !== conversation);
  await store.remove(conversation.id);
  otherTabs.tell(conversation);
  if (conversation === current) open(conversations[Math.min(place, conversations.length - 1)] ?? newConversation());
  refresh();
  notice(`“${titleOf(conversation)}” is deleted.`, "Undo", () => {
    conversations.splice(place, 0, conversation);
    save(conversation);
    open(conversation);
  });
}

/** Keep it in the browser, and have other tabs show it so. */
async function save(conversation) {
  await keep(conversation);
  otherTabs.tell(conversation);
}

async function keep(conversation) {
  if (!conversations.includes(conversation)) return; // deleted, though pieces of its answer still come
  savedAt.set(conversation, performance.now());
  try {
    await store.put(conversation);
  } catch (error) {
    notice(`This conversation could not be kept in the browser: ${error.message || error.name}.`);
  }
}

/** Another tab has changed a conversation: what it keeps now is what is shown. Two copies would overwrite each other. */
async function changedElsewhere(id, isCutOff) {
  const found = await store.get(id);
  const mine = conversations.find((each) => each.id === id);
  if (mine && answers.isRunning(mine)) return; // it is told from here when it ends
  if (found && isCutOff) cutOff(found);
  conversations = conversations.filter((each) => each !== mine);
  if (found) conversations = [...conversations, found].sort((a, b) => b.changed - a.changed);
  if (id === current.id && found) {
    current = found;
    transcript.show(found);
  } else if (mine && mine === current) {
    open(conversations[0] ?? newConversation());
  }
  refresh();
}

function isAnsweredElsewhere() {
  if (current.messages.at(-1)?.state !== "running") return false;
  notice("Another tab has an answer to this conversation under way; wait for it, or stop it there.");
  return true;
}

function remembered() {
  try {
    return localStorage.getItem(CURRENT);
  } catch {
    return null;
  }
}

// What is shown around them

function refresh() {
  const isRunning = answers.isRunning(current);
  const hadFocus = [byId("send"), byId("stop")].includes(document.activeElement);
  byId("send").hidden = isRunning;
  byId("stop").hidden = !isRunning;
  if (hadFocus) focusMessage();
  list.show(conversations, current, (each) => answers.isRunning(each));
}

function notice(text, action, run) {
  const parts = text ? [element("span", { textContent: text })] : [];
  if (action) {
    const button = element("button", { type: "button", textContent: action });
    button.addEventListener("click", () => {
      notice("");
      run();
    });
    parts.push(button);
  }
  if (text) {
    const dismiss = element("button", { type: "button", textContent: "Dismiss" });
    dismiss.addEventListener("click", () => notice(""));
    parts.push(dismiss);
  }
  byId("notice").replaceChildren(...parts);
}

/** Not with a finger: the keyboard would cover half of the screen. */
function focusMessage() {
  if (matchMedia("(pointer: fine)").matches) message.focus({ preventScroll: true });
}

function fitMessage() {
  message.style.height = "auto";
  message.style.height = `${message.scrollHeight}px`; // up to the style sheet's max-height
}
