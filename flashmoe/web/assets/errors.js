// What went wrong, for people: a title, what to do next, and perhaps a button that does it.

/** An error the page can explain. `action`: "retry", "key", "settings", "new" or null. */
export class Problem extends Error {
  constructor(title, advice, action = null) {
    super(title);
    this.title = title;
    this.advice = advice;
    this.action = action;
  }

  toJSON() {
    return { title: this.title, advice: this.advice, action: this.action };
  }
}

/** The server could not be reached, or the line broke. */
export function lost(begun) {
  return begun
    ? new Problem("The answer broke off", "The connection ended before the answer did. See whether the server still runs, then try again.", "retry")
    : new Problem("The server cannot be reached", "See whether flashmoe serve still runs, then try again.", "retry");
}

/** An answer with an error status. */
export async function refused(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // not JSON: a proxy's page, say; the status tells enough
  }
  return explain(error, response.status, response.headers.get("Retry-After"));
}

/** OpenAI's error object. `status`: 0 for one that came in the middle of a stream. */
export function explain(error, status = 0, retryAfter = null) {
  const message = sentence(error.message ?? (status ? `HTTP status ${status}` : "no reason was given"));
  if (status === 401) return new Problem("This server wants an API key", "Enter the key that the server was started with.", "key");
  if (status === 403) return new Problem("The server does not take requests from this address", message);
  if (status === 429) {
    const wait = retryAfter ? `Try again in ${retryAfter} s.` : "Try again in a moment.";
    return new Problem("The server has as many requests as it takes", `${message} ${wait}`, "retry");
  }
  if (error.code === "context_length_exceeded") {
    return new Problem("The conversation no longer fits", `${message} A new conversation begins with an empty context.`, "new");
  }
  if (status >= 400 && status < 500) return new Problem("The server did not take the request", message, "settings");
  if (status === 503) return new Problem("The server is not ready", `${message} Try again in a moment.`, "retry");
  return new Problem("The server could not answer", message, "retry");
}

function sentence(text) {
  const trimmed = String(text).trim();
  const upper = trimmed.charAt(0).toUpperCase() + trimmed.slice(1);
  return /[.!?…]$/.test(upper) ? upper : `${upper}.`;
}
