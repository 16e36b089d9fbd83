/** Sends what an operator asks for, with the operator's token if the server needs one. */

import { Refusal, get, post } from "./api.js";
import { byId, setText } from "./elements.js";

// In memory only: gone when the page is closed or reloaded.
let token = "";

/** Sends a call and returns its answer, or null if the person gives no token. */
export async function operate(path, body = {}) {
  const { needs_token: needed } = await get("api/server");
  if (needed && !token && !(await ask("This server changes versions only for people who know its token."))) return null;
  for (;;) {
    try {
      return await post(path, body, token);
    } catch (error) {
      if (!(error instanceof Refusal && error.status === 401)) throw error;
      token = "";
      if (!(await ask("The server refused this token."))) return null;
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
