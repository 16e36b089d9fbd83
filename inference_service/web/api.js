/** Talks to the server. Every failure becomes an error whose message is a sentence for people. */

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
  return (await call(path)).json();
}

/** Sends JSON and returns the answer. `token` is the operator's, empty if none is needed. */
export async function post(path, body, token = "") {
  const headers = { "content-type": "application/json" };
  if (token) headers.authorization = `Bearer ${token}`;
  return (await call(path, { method: "POST", headers, body: JSON.stringify(body) })).json();
}

/**
 * Yields the events of a completion as they arrive.
 * @param {object} request the body of `POST /v1/completions`
 * @param {AbortSignal} signal ends it; the server then frees its slot
 */
export async function* complete(request, signal) {
  const headers = { "content-type": "application/json" };
  const body = JSON.stringify({ ...request, stream: true });
  const response = await call("v1/completions", { method: "POST", headers, body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
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
