/** A text of tokens, each with its probability; pointing at one shows what else was likely there. */

import { make } from "./elements.js";
import { percent } from "./format.js";

// Probabilities from which a token is coloured less.
const LIKELY = [0.5, 0.2, 0.05, 0.01];
let ids = 0;

export class TokenText {
  constructor() {
    this.id = `text-${++ids}`;
    this.given = make("span", { className: "given" });
    this.written = make("span", { className: "written" });
    this.paragraph = make("p", {
      id: this.id,
      className: "text",
      tabIndex: 0,
      role: "group",
      "aria-label": "Text; the arrow keys move from token to token",
      "aria-busy": "true",
    }, this.given, this.written);
    this.about = make("div", { className: "about", role: "status", hidden: true });
    this.element = make("div", { className: "token-text" }, this.paragraph, this.about);
    this.paragraph.addEventListener("mouseover", ({ target }) => this.show(this.spans.indexOf(target)));
    this.paragraph.addEventListener("mouseleave", () => this.show(-1));
    this.paragraph.addEventListener("blur", () => this.show(-1));
    this.paragraph.addEventListener("keydown", (event) => this.move(event));
  }

  /** Begins with a prompt. */
  begin(prompt) {
    this.given.textContent = prompt;
    // Characters as Unicode counts them, because offsets do.
    this.characters = [];
    this.tokens = [];
    this.spans = [];
    this.settled = 0;
    this.current = -1;
  }

  /** Adds text and its tokens, as a choice of an event has them. */
  add(text, logprobs) {
    this.characters.push(...text);
    logprobs.tokens.forEach((token, i) => {
      const top = Object.entries(logprobs.top_logprobs[i]).map(([name, logprob]) => ({ name, share: Math.exp(logprob) }));
      // The names of objects that are numbers come first.
      top.sort((a, b) => b.share - a.share);
      const share = Math.exp(logprobs.token_logprobs[i]);
      this.tokens.push({ name: token, share, top, offset: logprobs.text_offset[i] });
      const surprise = LIKELY.filter((limit) => share < limit).length;
      const span = make("span", { className: "token", "data-surprise": surprise });
      this.spans.push(span);
      this.written.append(span);
    });
    // A token's text is complete once the next one begins; text may come later than its tokens.
    for (let i = this.settled; i < this.tokens.length; i++) {
      const end = this.tokens[i + 1]?.offset;
      this.spans[i].textContent = this.characters.slice(this.tokens[i].offset, end).join("");
      if (end !== undefined && end <= this.characters.length && i === this.settled) this.settled++;
    }
  }

  end() {
    this.paragraph.removeAttribute("aria-busy");
  }

  /** The geometric mean of the probabilities of the tokens, null without tokens. */
  get likelihood() {
    if (!this.tokens.length) return null;
    return Math.exp(this.tokens.reduce((sum, { share }) => sum + Math.log(share), 0) / this.tokens.length);
  }

  move(event) {
    const last = this.spans.length - 1;
    const steps = { ArrowLeft: this.current - 1, ArrowRight: this.current + 1, Home: 0, End: last, Escape: -1 };
    if (!(event.key in steps) || last < 0) return;
    event.preventDefault();
    this.show(event.key === "Escape" ? -1 : Math.min(Math.max(steps[event.key], 0), last));
  }

  /** Shows the probabilities at a token, or hides them for −1. */
  show(index) {
    this.spans[this.current]?.classList.remove("current");
    this.current = index;
    this.about.hidden = index < 0;
    if (index < 0) return;
    const { name, share, top } = this.tokens[index];
    const span = this.spans[index];
    span.classList.add("current");
    const rows = top.map((other) => {
      const bar = make("span", { className: "bar", "aria-hidden": "true" });
      bar.style.width = `${100 * other.share}%`;
      const className = other.name === name ? "chosen" : "";
      return make("li", { className }, bar, make("code", {}, visible(other.name)), " ", make("span", {}, percent(other.share)));
    });
    this.about.replaceChildren(
      make("p", {}, make("code", {}, visible(name)), ` had ${percent(share)}. Likeliest here:`),
      make("ol", {}, ...rows),
    );
    const room = this.element.clientWidth - this.about.offsetWidth;
    this.about.style.left = `${Math.max(Math.min(span.offsetLeft, room), 0)}px`;
    this.about.style.top = `${span.offsetTop + span.offsetHeight + 4}px`;
  }
}

/** Makes spaces and line breaks visible. */
function visible(text) {
  return text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥") || "∅";
}
