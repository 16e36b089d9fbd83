/** The token of the person at the page, if the server needs one: asked for once, and sent with every call from then on. */

import { answer, byId, setText } from "./elements.js";

// In memory only: gone when the page is closed or reloaded.
let token = "";

// Whether the person gave none when asked; asking again at each look would leave no peace.
let declined = null;

// The question that is open: calls that fail together ask once.
let asking = null;

/** Lets the person be asked for the token again. */
export function askAgain() {
  declined = null;
}

/**
 * Makes a call with the headers that carry the token; asks for a token if the server refuses.
 * @param {(headers: Object<string, string>) => Promise<any>} call
 * @param {boolean} insists whether to ask again although the person gave none before
 */
export async function withToken(call, insists) {
  if (declined && !insists) throw declined;
  for (let given = token; ; ) {
    try {
      const result = await call(headersOf(given));
      token = given;
      declined = null;
      return result;
    } catch (error) {
      if (error.status !== 401 && error.status !== 403) throw error;
      given = await ask(why(error.status, given));
      if (given) continue;
      const whose = error.status === 403 ? "an operator’s token" : "a token";
      error.message = `Only people with ${whose} may see or do this; open the view again to give yours.`;
      declined = error;
      throw error;
    }
  }
}

function headersOf(given) {
  return given ? { authorization: `Bearer ${given}` } : {};
}

function why(status, given) {
  if (status === 403) return "This token is a client’s, but this needs an operator’s.";
  return given ? "The server refused this token." : "This server answers only people who have a token.";
}

/** Asks for a token; returns it, empty if the person gives none. */
function ask(reason) {
  asking ??= read(reason).finally(() => {
    asking = null;
  });
  return asking;
}

async function read(reason) {
  const dialog = byId("token-dialog");
  const { token: input } = dialog.querySelector("form").elements;
  setText(byId("token-why"), reason);
  for (;;) {
    input.value = "";
    const given = (await answer(dialog)) === "use" ? input.value : "";
    input.value = "";
    // No header can carry other characters, so no server has such a token.
    if (!/[^ -~]/.test(given)) return given;
    setText(byId("token-why"), "The server refused this token.");
  }
}
