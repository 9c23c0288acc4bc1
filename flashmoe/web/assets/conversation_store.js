// Conversations, kept in this browser (IndexedDB); where it keeps nothing, as long as the page is open.

const DATABASE = "flashmoe";
const STORE = "conversations";

export class ConversationStore {
  /** Opens the database; `keeps` says whether there is one. */
  static async open() {
    try {
      const opening = indexedDB.open(DATABASE, 1);
      opening.onupgradeneeded = () => opening.result.createObjectStore(STORE, { keyPath: "id" });
      return new ConversationStore(await finished(opening));
    } catch {
      return new ConversationStore(null);
    }
  }

  constructor(database) {
    this.database = database;
  }

  get keeps() {
    return this.database !== null;
  }

  /** All conversations, the last changed first. An answer that was cut off by the end of the page says so. */
  async all() {
    if (!this.keeps) return [];
    const found = await finished(this.store("readonly").getAll());
    found.forEach(cutOff);
    return found.sort((a, b) => b.changed - a.changed);
  }

  /** One of them as it is, or undefined. */
  async get(id) {
    return this.keeps ? finished(this.store("readonly").get(id)) : undefined;
  }

  async put(conversation) {
    // A plain copy: what runs meanwhile goes on changing the messages.
    if (this.keeps) await finished(this.store("readwrite").put(JSON.parse(JSON.stringify(conversation))));
  }

  async remove(id) {
    if (this.keeps) await finished(this.store("readwrite").delete(id));
  }

  store(mode) {
    return this.database.transaction(STORE, mode).objectStore(STORE);
  }
}

/** Nobody writes its answer any more. */
export function cutOff({ messages }) {
  for (const message of messages) if (message.state === "running") message.state = "stopped";
}

/** A conversation without messages yet. */
export function newConversation() {
  return { id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`, title: "", named: false, changed: Date.now(), messages: [] };
}

/** A title from the first message, unless the user chose one. */
export function titleOf(conversation) {
  if (conversation.title) return conversation.title;
  const first = conversation.messages.find((message) => message.role === "user")?.content ?? "";
  const line = first.trim().split("\n")[0];
  return line.length > 60 ? `${line.slice(0, 59)}…` : line || "New conversation";
}

function finished(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
