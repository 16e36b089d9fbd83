/** The view of versions: what this server knows of each, and what an operator may ask for. */

import { get, post } from "./api.js";
import { answer, byId, make, say, setOptions, setText } from "./elements.js";
import { repeat } from "./poll.js";
import { VersionRow, stateOf } from "./version_row.js";

const POLL_S = 1;

/** The row of each version, by its number. */
const rows = new Map();
let listed = { versions: [], runs: {}, policy: "" };
let busy = false;

/** Shows the view until the function that it returns is called. */
export function start() {
  byId("follow-best").onclick = followBest;
  byId("roll-back").onclick = rollBack;
  return repeat(look, POLL_S);
}

async function look() {
  listed = await get("api/versions");
  listed.versions ??= [];
  render();
}

const serving = () => listed.versions.find((each) => stateOf(each) === "serving");

function render() {
  const { versions, policy, notices = [], runs } = listed;
  byId("no-version").hidden = versions.length > 0;
  byId("versions-table").hidden = versions.length === 0;
  const now = serving();
  const named = versions.find(({ labels = [] }) => labels.includes(policy));
  const later = named && named !== now ? ` Version ${named.version} has this label.` : "";
  setText(byId("serving"), `${now ? `Version ${now.version} serves` : "No version serves yet"}; the policy is ${policy}.${later}`);
  const shown = [...byId("notices").children].map((item) => item.textContent);
  if (shown.join("\n") !== notices.join("\n")) {
    byId("notices").replaceChildren(...notices.map((text) => make("li", { className: "notice" }, text)));
  }
  for (const [number, row] of rows) {
    if (versions.some(({ version }) => version === number)) continue;
    row.remove();
    rows.delete(number);
  }
  const newest = newestMethod(versions);
  // The newest version first, as a person looks for it.
  let before = null;
  for (const status of versions) {
    if (!rows.has(status.version)) rows.set(status.version, new VersionRow(status.version, act));
    const row = rows.get(status.version);
    row.update(status, runs[status.version] ?? "", newest);
    if (row.element.nextSibling !== before || !row.element.isConnected) byId("versions-rows").insertBefore(row.element, before);
    before = row.element;
  }
  for (const row of rows.values()) row.setBusy(busy);
  byId("roll-back").disabled = busy || !now;
  byId("follow-best").disabled = busy || policy === "best";
}

/** Returns the method of the newest evaluation; figures by another one do not compare. */
function newestMethod(versions) {
  const evaluations = versions.flatMap(({ evaluation }) => evaluation ?? []);
  return evaluations.toSorted((a, b) => a.measured_at.localeCompare(b.measured_at)).at(-1)?.method_digest;
}

/** Asks for something, and says what came of it. `tell` makes a sentence of the answer. */
async function ask(path, body, tell) {
  if (busy) return;
  busy = true;
  say(byId("versions-error"), "");
  say(byId("versions-result"), "");
  render();
  try {
    say(byId("versions-result"), tell(await post(path, body)));
  } catch (error) {
    say(byId("versions-error"), error.message);
  }
  busy = false;
  await look().catch(() => {});
}

/** Does what a button in the row of a version says. */
function act(action, number) {
  const path = `api/versions/${number}/${action}`;
  switch (action) {
    case "load":
      return ask(path, {}, () => `Version ${number} is in memory.`);
    case "unload":
      return ask(path, {}, ({ version }) => (version.streams
        ? `Version ${number} leaves memory when its last stream ends; ${version.streams} run now.`
        : `Version ${number} has left memory.`));
    case "promote":
      return ask(path, {}, () => `Version ${number} is the stable one.`);
    default:
      return ask("api/policy", { label: `pinned:${number}` }, followed);
  }
}

const followBest = () => ask("api/policy", { label: "best" }, followed);

function followed({ serving: now }) {
  return now ? `The policy is set; version ${now.version} serves now.` : "The policy is set; no version serves yet.";
}

async function rollBack() {
  const now = serving();
  if (!now) return;
  const dialog = byId("rollback-dialog");
  const { instead } = dialog.querySelector("form").elements;
  setText(byId("rollback-title"), `Roll back version ${now.version}?`);
  const others = listed.versions.filter((each) => each !== now && stateOf(each) !== "refused").toReversed();
  setOptions(instead, [["", "the next one by the policy"], ...others.map(({ version }) => [version, `version ${version}, and pin it`])]);
  instead.value = "";
  if ((await answer(dialog)) !== "yes") return;
  const body = instead.value ? { version: Number(instead.value) } : {};
  await ask("api/rollback", body, ({ version }) => `Version ${now.version} is rolled back; version ${version.version} serves now.`);
}
