// The server's two paths that the page needs: chat completions, streamed, and the live figures.

import { Problem, explain, lost, refused } from "./errors.js";
import { apiKey } from "./settings.js";

/**
 * Ask for an answer. Yields {text}, {reasoning}, {finish} and {usage} as they come.
 * Throws a Problem; an AbortError when `signal` ends it.
 */
export async function* streamChat(messages, sampling, signal) {
  const body = { model: "default", messages, ...sampling, stream: true, stream_options: { include_usage: true } };
  const response = await reach("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  for await (const data of events(response.body, signal)) {
    if (data === "[DONE]") return;
    yield* parts(JSON.parse(data));
  }
  throw lost(true);
}

/** What the server is doing now. */
export async function liveStats(signal) {
  return (await reach("v1/stats", { signal, cache: "no-store" })).json();
}

async function reach(path, options) {
  const key = apiKey();
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw lost(false);
  }
  if (!response.ok) throw await refused(response);
  return response;
}

function* parts(chunk) {
  if (chunk.error) throw explain(chunk.error);
  const choice = chunk.choices?.[0];
  if (choice?.delta?.reasoning_content) yield { reasoning: choice.delta.reasoning_content };
  if (choice?.delta?.content) yield { text: choice.delta.content };
  if (choice?.finish_reason) yield { finish: choice.finish_reason };
  if (chunk.usage) yield { usage: chunk.usage };
}

/** The data of server-sent events, one after another. Comments and other fields are passed over. */
async function* events(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } catch (error) {
    if (signal.aborted || error instanceof Problem) throw error;
    throw lost(true);
  } finally {
    reader.cancel().catch(() => {}); // it may have ended already
  }
}
