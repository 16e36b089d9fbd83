/** Shows the view that the address names: `#training`, `#versions` or `#playground`. */

import { byId } from "./elements.js";
import * as playground from "./playground.js";
import { askAgain } from "./token.js";
import * as training from "./training.js";
import * as versions from "./versions.js";

const views = { training, versions, playground };
let leave = () => {};

function show() {
  leave();
  askAgain();
  const [name, parameters = ""] = location.hash.slice(1).split("?", 2);
  const chosen = Object.hasOwn(views, name) ? name : "training";
  for (const each of Object.keys(views)) byId(`view-${each}`).hidden = each !== chosen;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${chosen}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${byId(`${chosen}-title`).textContent} · gptloop`;
  leave = views[chosen].start(new URLSearchParams(parameters));
}

addEventListener("hashchange", () => {
  // A link to a part of the page is not a view.
  if (location.hash === "#main") return;
  show();
  byId("main").focus({ preventScroll: true });
});
show();
