// Answers under way: at most one a conversation, as many conversations as one likes.

import { streamChat } from "./api.js";
import { Problem } from "./errors.js";
import { sampling, systemPrompt } from "./settings.js";

export class Answers {
  /** `changed(conversation, message)` is called with every piece; `ended` when an answer is over. */
  constructor(changed, ended) {
    this.changed = changed;
    this.ended = ended;
    this.controllers = new Map(); // conversation id -> AbortController
  }

  isRunning(conversation) {
    return this.controllers.has(conversation.id);
  }

  get count() {
    return this.controllers.size;
  }

  stop(conversation) {
    this.controllers.get(conversation.id)?.abort();
  }

  /** Have `message`, the conversation's last one, written. */
  async run(conversation, message) {
    const controller = new AbortController();
    this.controllers.set(conversation.id, controller);
    const clock = { begin: performance.now(), first: 0, last: 0, pieces: 0 };
    try {
      for await (const part of streamChat(promptOf(conversation, message), sampling(), controller.signal)) {
        if (part.text || part.reasoning) {
          clock.last = performance.now();
          clock.first ||= clock.last;
          clock.pieces++;
        }
        if (part.text) message.content += part.text;
        if (part.reasoning) message.reasoning = (message.reasoning ?? "") + part.reasoning;
        if (part.finish) message.finish = part.finish;
        message.figures = figures(clock, part.usage);
        this.changed(conversation, message);
      }
      message.state = "done";
    } catch (error) {
      if (error.name === "AbortError") {
        message.state = "stopped";
      } else {
        message.state = "failed";
        message.problem = (error instanceof Problem ? error : new Problem("The page made a mistake", String(error), "retry")).toJSON();
      }
    }
    this.controllers.delete(conversation.id);
    this.ended(conversation, message);
  }
}

/**
 * What the model is given: everything before `answer`. Questions whose answer never came are one with the next: many
 * chat templates refuse two in a row, and both can be read on the page.
 */
function promptOf(conversation, answer) {
  const system = systemPrompt();
  const said = [];
  for (const { role, content } of conversation.messages.slice(0, conversation.messages.indexOf(answer))) {
    if (content === "") continue;
    if (said.at(-1)?.role === role) said.at(-1).content += `\n\n${content}`;
    else said.push({ role, content });
  }
  return system ? [{ role: "system", content: system }, ...said] : said;
}

function figures(clock, usage) {
  const tokens = usage?.completion_tokens ?? clock.pieces;
  const seconds = (clock.last - clock.first) / 1000;
  return {
    tokens,
    perS: tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : 0,
    firstS: clock.first ? (clock.first - clock.begin) / 1000 : 0,
    prompt: usage?.prompt_tokens,
    cached: usage?.prompt_tokens_details?.cached_tokens,
  };
}
