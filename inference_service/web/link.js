/** Links that reproduce a text: the digests of the versions, the prompt, the parameters and the seed. */

const FIELDS = ["prompt", "temperature", "top_p", "top_k", "max_tokens", "seed"];
const CHOICES = ["version", "other"];

/** Returns the fragment for what the lanes wrote. */
export function fragment(fields, lanes) {
  const parameters = new URLSearchParams(FIELDS.map((name) => [name, fields[name].value]));
  lanes.forEach(({ version, digest }, i) => {
    parameters.set(CHOICES[i], version);
    parameters.set(`${CHOICES[i]}_digest`, digest);
  });
  return `#playground?${parameters}`;
}

/** Fills a form from a link. */
export function read(link, fields) {
  for (const name of FIELDS) if (link.has(name)) fields[name].value = link.get(name);
}

/** Chooses the versions that a link names by their digests; returns a sentence if they are not here. */
export function check(link, versions, fields) {
  const problems = [];
  fields.other.value = "none";
  for (const choice of CHOICES) {
    const [number, digest] = [link.get(choice), link.get(`${choice}_digest`)];
    if (number === null) continue;
    const same = versions.find((each) => each.digest === digest);
    if (same) {
      fields[choice].value = same.version;
    } else if (versions.some(({ version }) => version === number)) {
      fields[choice].value = number;
      problems.push(`Version ${number} of this server is another one than that of the link, so its text will differ.`);
    } else {
      fields[choice].value = choice === "version" ? "" : "none";
      problems.push(`This server does not have version ${number} of the link, so it cannot write the same text.`);
    }
  }
  return problems.join(" ");
}
