/** Talks to the server. Every failure becomes an error whose message is a sentence for people. */

import { withToken } from "./token.js";

/** An error of the server, with its HTTP status. */
export class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function call(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, "The server does not answer; `gptloop status` shows whether it runs.");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new Refusal(response.status, body?.error?.message ?? `The server answered with the status ${response.status}.`);
}

/** Returns what a path says, as JSON. */
export async function get(path) {
  return (await withToken((headers) => call(path, { headers }), false)).json();
}

/** Sends JSON and returns the answer. */
export async function post(path, body) {
  return (await send(path, body)).json();
}

function send(path, body, signal) {
  const content = { method: "POST", body: JSON.stringify(body), signal };
  const type = { "content-type": "application/json" };
  return withToken((headers) => call(path, { ...content, headers: { ...type, ...headers } }), true);
}

/**
 * Yields the events of a completion as they arrive.
 * @param {object} request the body of `POST /v1/completions`
 * @param {AbortSignal} signal ends it; the server then frees its slot
 */
export async function* complete(request, signal) {
  const response = await send("v1/completions", { ...request, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      return { done: true };
    });
    if (done) throw new Refusal(0, "The stream broke off: the server may have ended.");
    text += value;
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      const data = event.slice("data: ".length);
      if (data === "[DONE]") return;
      const parsed = JSON.parse(data);
      if (parsed.error) throw new Refusal(0, parsed.error.message);
      yield parsed;
    }
  }
}
