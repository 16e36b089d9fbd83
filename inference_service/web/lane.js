/** What one version writes: a stream of tokens, coloured by their probability. */

import { complete } from "./api.js";
import { make, say, setText } from "./elements.js";
import { count, percent } from "./format.js";
import { TokenText } from "./token_text.js";

const ALTERNATIVES = 5;
const REASONS = { stop: "the text ended", length: "the limit was reached" };

export class Lane {
  /** @param {string} model the name of a version, empty for the one that serves */
  constructor(model) {
    this.model = model;
    // Which version answered.
    this.version = "";
    this.digest = "";
    this.heading = make("h2", {}, model ? `Version ${model}` : "The serving version");
    this.status = make("p", { className: "hint", role: "status" }, "Waiting…");
    this.error = make("p", { className: "notice error", role: "alert", hidden: true });
    this.text = new TokenText();
    this.element = make("article", { className: "card lane" }, this.heading, this.text.element, this.error, this.status);
  }

  /** Streams a completion into the lane until it ends or the signal comes. */
  async run(request, signal) {
    let tokens = 0;
    let firstAt = 0;
    let reason = "";
    this.text.begin(request.prompt);
    try {
      for await (const event of complete({ ...request, model: this.model, logprobs: ALTERNATIVES }, signal)) {
        this.version = event.model;
        this.digest = event.system_fingerprint;
        setText(this.heading, `Version ${event.model}`);
        for (const { text, logprobs, finish_reason: ended } of event.choices) {
          firstAt ||= performance.now();
          this.text.add(text, logprobs);
          tokens += logprobs.tokens.length;
          reason = ended ?? reason;
        }
        setText(this.status, "Writing…");
      }
      const speed = tokens > 1 ? `, ${count((tokens - 1) / ((performance.now() - firstAt) / 1000))} a second` : "";
      const likely = this.text.likelihood;
      const probable = likely === null ? "" : `; a token had ${percent(likely)} on average`;
      setText(this.status, `${tokens} tokens${speed}${probable}. It ended because ${REASONS[reason] ?? reason}.`);
    } catch (error) {
      setText(this.status, `Stopped after ${tokens} tokens.`);
      if (error.name !== "AbortError") say(this.error, error.message);
    }
    this.text.end();
  }
}
