/** Repeats a task while somebody looks. */

import { byId, say } from "./elements.js";

/**
 * Runs a task now, and again some seconds after its end; pauses while the page is hidden.
 * A task that fails is tried again, and the page says why. Returns a function that ends it.
 */
export function repeat(task, seconds) {
  let timer;
  let running = false;
  let ended = false;

  async function run() {
    clearTimeout(timer);
    if (running || ended || document.hidden) return;
    running = true;
    let problem = "";
    try {
      await task();
    } catch (error) {
      problem = error.message;
    }
    running = false;
    if (ended) return;
    say(byId("connection"), problem);
    timer = setTimeout(run, seconds * 1000);
  }

  document.addEventListener("visibilitychange", run);
  run();
  return () => {
    ended = true;
    clearTimeout(timer);
    document.removeEventListener("visibilitychange", run);
  };
}
