/** One row of the table of versions. */

import { make, setText } from "./elements.js";
import { count, duration, loss, mebibytes } from "./format.js";

const CELLS = ["Version", "State", "Run", "Step", "Held-out loss", "Bits per byte", "Evaluated", "As served", "Streams",
  "Memory", "Age", "Labels", "Actions"];
const NUMBERS = new Set(["Version", "Step", "Held-out loss", "Bits per byte", "Evaluated", "As served", "Streams", "Memory"]);

/** Returns the state of a version in one word. */
export function stateOf({ state }) {
  return state.replace("VERSION_STATE_", "").toLowerCase();
}

/** A row that changes in place, so that the focus stays on its buttons. */
export class VersionRow {
  /** @param {string} number @param {(action: string, number: string) => void} act */
  constructor(number, act) {
    this.number = number;
    this.cells = CELLS.map((name) => make(name === "Version" ? "th" : "td", {
      "role": name === "Version" ? "rowheader" : "cell",
      "data-name": name,
      className: NUMBERS.has(name) ? "number" : "",
    }));
    this.cells[0].scope = "row";
    this.state = make("span", { className: "state" });
    this.reason = make("small", { className: "reason" });
    this.cells[1].append(this.state, this.reason);
    this.bits = make("span");
    this.record = make("small", { className: "reason" });
    this.buttons = Object.fromEntries(["load", "unload", "promote", "pin"].map((action) => {
      const text = action[0].toUpperCase() + action.slice(1);
      const button = make("button", { type: "button", "aria-label": `${text} version ${number}` }, text);
      button.addEventListener("click", () => act(action, number));
      return [action, button];
    }));
    this.cells.at(-1).append(make("div", { className: "buttons" }, ...Object.values(this.buttons)));
    this.element = make("tr", { role: "row" }, ...this.cells);
    this.labels = [];
  }

  /** Shows a status, as `/api/versions` returns it; `method` is that of the newest evaluation. */
  update(status, run, method) {
    const state = stateOf(status);
    const { labels = [], streams = 0, held = false, memory_bytes: memory, evaluation } = status;
    // Without a manifest there is nothing to say.
    const known = Boolean(status.digest);
    const bits = evaluation ? loss(evaluation.bits_per_byte) : "";
    const measured = status.measured_loss;
    const served = measured === undefined ? null : Math.round((measured - status.claimed_loss) * 1e4) / 1e4;
    setText(this.state, held ? `${state}, held` : state);
    this.state.dataset.state = state;
    setText(this.reason, status.reason ?? "");
    this.element.title = known ? `digest ${status.digest}` : "";
    const texts = {
      "Version": this.number,
      "Run": run,
      "Step": known ? count(Number(status.step ?? 0)) : "",
      "Held-out loss": known ? loss(status.validation_loss) : "",
      "Bits per byte": known ? loss(status.bits_per_byte) : "",
      "As served": served === null ? "" : `${served < 0 ? "−" : "+"}${Math.abs(served).toFixed(4)}`,
      "Streams": streams ? String(streams) : "",
      "Memory": memory ? mebibytes(Number(memory)) : "",
      "Age": known ? duration((Date.now() - Date.parse(status.created_at)) / 1000) : "",
    };
    CELLS.forEach((name, i) => {
      if (name in texts) setText(this.cells[i], texts[name]);
    });
    // In parentheses if it does not compare with the newest.
    setText(this.bits, bits && evaluation.method_digest !== method ? `(${bits})` : bits);
    setText(this.record, evaluation ? describe(evaluation) : "");
    this.cells[CELLS.indexOf("Evaluated")].replaceChildren(...(evaluation ? [this.bits, this.record] : []));
    if (labels.join() !== this.labels.join()) {
      this.labels = labels;
      this.cells.at(-2).replaceChildren(...labels.map((label) => make("span", { className: "label" }, label)));
    }
    const inMemory = state === "resident" || state === "serving";
    this.buttons.load.hidden = inMemory && held;
    this.buttons.unload.hidden = !(inMemory && held) || state === "serving";
    this.allowed = {
      load: state !== "loading",
      unload: true,
      promote: known && !labels.includes("stable") && state !== "refused",
      pin: known && state !== "refused" && !labels.includes(`pinned:${this.number}`),
    };
  }

  /** Turns the buttons off while something is under way. */
  setBusy(busy) {
    for (const [action, button] of Object.entries(this.buttons)) button.disabled = busy || !this.allowed[action];
  }

  remove() {
    this.element.remove();
  }
}

/** Writes the figures of an evaluation. */
function describe({ nats_per_token: nats, nats_per_token_low: low, nats_per_token_high: high, perplexity, tokens }) {
  const interval = low === undefined ? "" : ` (95 %: ${low.toFixed(3)} to ${high.toFixed(3)})`;
  return `${nats.toFixed(3)} nats${interval}, perplexity ${perplexity.toFixed(1)}, ${count(Number(tokens))} tokens`;
}
