/** Reads and sends what an operator asks for, with the operator's token if the server needs one. */

import { Refusal, get, post } from "./api.js";
import { byId, setText } from "./elements.js";

// In memory only: gone when the page is closed or reloaded.
let token = "";

// Whether the person gave none when asked; asking again at each look would leave no peace.
let declined = false;

/** Lets the person be asked for the token again. */
export function askAgain() {
  declined = false;
}

/** Returns what a path says to operators. */
export async function read(path) {
  const answer = declined && !token ? null : await withToken((given) => get(path, given));
  declined = answer === null;
  if (declined) throw new Refusal(401, "Versions are shown only to people who know the operator’s token; open this view again to give it.");
  return answer;
}

/** Sends a call and returns its answer, or null if the person gives no token. */
export function operate(path, body = {}) {
  return withToken((given) => post(path, body, given));
}

async function withToken(call) {
  for (;;) {
    try {
      return await call(token);
    } catch (error) {
      if (!(error instanceof Refusal && error.status === 401)) throw error;
      const why = token ? "The server refused this token." : "This server shows and changes versions only for people who know its token.";
      token = "";
      if (!(await ask(why))) return null;
    }
  }
}

/** Asks for the token; returns whether there is one. */
async function ask(why) {
  const dialog = byId("token-dialog");
  const { token: input } = dialog.querySelector("form").elements;
  input.value = "";
  setText(byId("token-why"), why);
  token = (await answer(dialog)) === "use" ? input.value : "";
  input.value = "";
  return token !== "";
}

/** Shows a dialog; returns the value of the button that closes it, empty for Escape. */
export function answer(dialog) {
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true });
  });
}
