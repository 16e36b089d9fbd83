/** The list of runs from which a person chooses those to draw. */

import { make, setText } from "./elements.js";
import { duration, loss } from "./format.js";

const COLOURS = 6;

export class RunChoice {
  /** @param {HTMLElement} place @param {() => void} changed */
  constructor(place, changed) {
    this.place = place;
    this.changed = changed;
    this.rows = new Map();
    // Until a person chooses, the newest run is drawn.
    this.chosen = false;
  }

  /** Lists the runs, the newest first. */
  offer(runs) {
    const names = runs.map(({ run }) => run);
    for (const [name, { label }] of this.rows) {
      if (names.includes(name)) continue;
      label.remove();
      this.rows.delete(name);
    }
    for (const run of runs) {
      if (!this.rows.has(run.run)) this.add(run.run);
      const state = run.ended ? "finished" : `${duration(run.age_s)} ago`;
      setText(this.rows.get(run.run).note, `${state} · ${loss(run.validation_loss ?? run.loss)}`);
    }
    const labels = names.map((name) => this.rows.get(name).label);
    const listed = [...this.place.querySelectorAll("label")];
    if (labels.some((label, i) => label !== listed[i])) this.place.append(...labels);
    if (!this.chosen) for (const [name, { box }] of this.rows) box.checked = name === names[0];
  }

  add(name) {
    const box = make("input", { type: "checkbox", name: "run", value: name });
    const swatch = make("span", { className: "swatch" });
    const used = [...this.rows.values()].map(({ colour }) => colour);
    const free = Array.from({ length: COLOURS }, (_, i) => `--run-${i + 1}`).find((colour) => !used.includes(colour));
    const colour = free ?? `--run-${(this.rows.size % COLOURS) + 1}`;
    swatch.style.background = `var(${colour})`;
    const note = make("small");
    const label = make("label", {}, box, swatch, make("span", { className: "name" }, name), note);
    box.addEventListener("change", () => {
      this.chosen = true;
      this.changed();
    });
    this.rows.set(name, { label, box, note, colour });
  }

  /** Returns the chosen ones of some runs. */
  selected(runs) {
    return runs.filter(({ run }) => this.rows.get(run)?.box.checked);
  }

  /** Returns the colour of a run, a custom property of the style sheet. */
  colour(run) {
    return this.rows.get(run).colour;
  }
}
