/** The view in which versions write: one or two side by side, with the same seed. */

import { get } from "./api.js";
import { byId, make, say, setOptions } from "./elements.js";
import { Lane } from "./lane.js";
import { check, fragment, read } from "./link.js";
import { repeat } from "./poll.js";

const POLL_S = 3;

const form = byId("playground-form");
const fields = form.elements;
let versions = [];
let lanes = [];
let running = null;

/** Shows the view until the function that it returns is called; a link fills the form. */
export function start(parameters) {
  if (!fields.seed.value) fields.seed.value = newSeed();
  let link = parameters.size ? parameters : null;
  form.onsubmit = (event) => {
    event.preventDefault();
    generate();
  };
  fields.stop.onclick = () => running?.abort();
  fields.again.onclick = () => {
    fields.seed.value = newSeed();
    form.requestSubmit();
  };
  fields.link.onclick = copyLink;
  const end = repeat(async () => {
    await offerVersions();
    if (!link) return;
    read(link, fields);
    say(byId("playground-error"), check(link, versions, fields));
    link = null;
  }, POLL_S);
  return () => {
    running?.abort();
    end();
  };
}

function newSeed() {
  return crypto.getRandomValues(new Uint32Array(1))[0];
}

async function offerVersions() {
  // For everyone who may generate, unlike what operators see.
  const { data } = await get("v1/models");
  const numbered = data.filter(({ id, root }) => id === root);
  const labels = (number) => data.filter(({ id, root }) => root === number && id !== root).map(({ id }) => id);
  versions = numbered.map(({ id, system_fingerprint: digest }) => ({ version: id, digest }));
  const options = versions.map(({ version }) => {
    const names = labels(version).join(", ");
    return [version, names ? `${version} · ${names}` : version];
  });
  setOptions(fields.version, [["", "serving"], ...options]);
  setOptions(fields.other, [["none", "none"], ["", "serving"], ...options]);
}

/** Lets the chosen versions write; a generation under way is stopped first. */
async function generate() {
  running?.abort();
  const mine = (running = new AbortController());
  say(byId("playground-error"), "");
  say(byId("playground-result"), "");
  const models = [fields.version.value, fields.other.value].filter((each) => each !== "none");
  lanes = models.map((model) => new Lane(model));
  byId("lanes").replaceChildren(...lanes.map(({ element }) => element));
  fields.stop.disabled = false;
  const request = {
    prompt: fields.prompt.value,
    ...Object.fromEntries(["temperature", "top_p", "top_k", "max_tokens", "seed"].map((name) => [name, Number(fields[name].value)])),
  };
  await Promise.all(lanes.map((lane) => lane.run(request, mine.signal)));
  if (running !== mine) return;
  fields.stop.disabled = true;
  if (mine.signal.aborted || lanes.some(({ digest }) => !digest)) return;
  // The address is now the link that reproduces this.
  history.replaceState(null, "", fragment(fields, lanes));
}

async function copyLink() {
  if (!lanes.length || lanes.some(({ digest }) => !digest)) {
    say(byId("playground-error"), "There is nothing to link to yet: generate a text first.");
    return;
  }
  const address = new URL(fragment(fields, lanes), location.href).href;
  try {
    await navigator.clipboard.writeText(address);
    say(byId("playground-result"), "The link is copied. It holds the version’s digest, the prompt, the parameters and the seed.");
  } catch {
    // Without a secure context there is no clipboard.
    byId("playground-result").replaceChildren("This link reproduces the text: ", make("a", { href: address }, address));
    byId("playground-result").hidden = false;
  }
}
