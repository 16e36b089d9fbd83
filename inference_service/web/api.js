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

/** Returns what a path says, as JSON. `token` is the operator's, empty if none is needed. */
export async function get(path, token = "") {
  return (await call(path, { headers: authorization(token) })).json();
}

/** Sends JSON and returns the answer. */
export async function post(path, body, token = "") {
  const headers = { "content-type": "application/json", ...authorization(token) };
  return (await call(path, { method: "POST", headers, body: JSON.stringify(body) })).json();
}

function authorization(token) {
  // No header can carry such a token, so no server has it.
  if (/[^ -~]/.test(token)) throw new Refusal(401, "This is not the token, which has no such characters.");
  return token ? { authorization: `Bearer ${token}` } : {};
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
