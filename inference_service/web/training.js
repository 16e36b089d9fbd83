/** The view of runs: their curves as they grow, the versions on them, and how long the newest takes still. */

import { get } from "./api.js";
import { Chart } from "./chart.js";
import { byId, make, setText } from "./elements.js";
import { compact, count, duration, loss, mebibytes } from "./format.js";
import { repeat } from "./poll.js";
import { RunChoice } from "./run_choice.js";

const POLL_S = 1;
// A run that reports nothing for so many seconds, or for so many times what a report usually takes, is not running.
const SILENT_S = 30;
const SILENT_REPORTS = 5;
// The reports from which the remaining time follows.
const RECENT = 20;

/** What is known of each run: a cursor and columns, as `/api/runs/{run}` returns them. */
const curves = new Map();
const choice = new RunChoice(byId("runs"), () => render());
let charts;
let runs = [];
let drawn = "";

/** Shows the view until the function that it returns is called. */
export function start() {
  charts ??= {
    loss: new Chart(byId("chart-loss"), { height: 320, main: true, write: (value) => value.toFixed(2) }),
    rate: new Chart(byId("chart-rate"), { height: 170, write: (value) => value.toFixed(4) }),
    speed: new Chart(byId("chart-speed"), { height: 170, write: compact }),
    memory: new Chart(byId("chart-memory"), { height: 170, write: compact }),
  };
  const along = byId("training-content").querySelector("form");
  along.addEventListener("change", render);
  const end = repeat(look, POLL_S);
  return () => {
    along.removeEventListener("change", render);
    end();
  };
}

async function look() {
  ({ runs } = await get("api/runs"));
  choice.offer(runs);
  await load();
  render();
}

/** Fetches the lines of the selected runs that are not known yet. */
async function load() {
  for (const { run, cursor } of choice.selected(runs)) {
    const known = curves.get(run);
    const after = known?.cursor ?? "";
    if (after === cursor) continue;
    const more = await get(`api/runs/${encodeURIComponent(run)}?after=${after}`);
    // Another call may have fetched the same lines meanwhile.
    if ((curves.get(run)?.cursor ?? "") !== after) continue;
    if (more.continues) {
      append(known.reports, more.reports);
      append(known.evaluations, more.evaluations);
      known.cursor = more.cursor;
    } else {
      curves.set(run, more);
    }
  }
}

function append(columns, more) {
  for (const [name, values] of Object.entries(more)) for (const value of values) columns[name].push(value);
}

function render() {
  byId("no-run").hidden = runs.length > 0;
  byId("training-content").hidden = runs.length === 0;
  const selected = choice.selected(runs);
  if (selected.some(({ run }) => !curves.has(run))) {
    // Just chosen: comes with the next look.
    load().then(render, () => {});
    return;
  }
  renderFigures(selected[0]);
  const along = document.querySelector("input[name=along]:checked").value;
  const state = JSON.stringify([along, selected.map(({ run }) => [run, curves.get(run).cursor])]);
  if (state === drawn) return;
  drawn = state;
  renderCharts(selected, along);
  renderTable(selected[0]);
}

/** Draws every chart for the selected runs, along steps or tokens. */
function renderCharts(selected, along) {
  const several = selected.length > 1;
  const lines = { loss: [], rate: [], speed: [], memory: [] };
  const marks = [];
  for (const { run } of selected) {
    const { reports, evaluations } = curves.get(run);
    const colour = choice.colour(run);
    const label = (what) => (several ? `${run}, ${what}` : what);
    const line = (columns, y, what, more = {}) => ({ label: label(what), colour, x: columns[along], y, ...more });
    lines.loss.push(line(reports, reports.loss, "training"));
    lines.loss.push(line(evaluations, evaluations.validation_loss, "held out", { strong: true }));
    lines.rate.push(line(reports, reports.learning_rate, "learning rate"));
    lines.speed.push(line(reports, reports.tokens_per_second, "tokens/s"));
    lines.memory.push(line(reports, reports.resident_memory_bytes.map((bytes) => bytes / 2 ** 20), "MiB"));
    evaluations.version.forEach((version, i) => {
      if (!version) return;
      const y = evaluations.validation_loss[i];
      const title = `version ${version}, step ${count(evaluations.step[i])}, held-out loss ${loss(y)}`;
      marks.push({ text: String(version), title, colour, x: evaluations[along][i], y });
    });
  }
  const names = selected.map(({ run }) => run).join(", ") || "no run";
  charts.loss.draw(lines.loss, marks, `Loss of ${names}; the table of evaluations has its figures.`);
  charts.rate.draw(lines.rate, [], `Learning rate of ${names}.`);
  charts.speed.draw(lines.speed, [], `Tokens a second of ${names}.`);
  charts.memory.draw(lines.memory, [], `Resident memory of ${names}.`);
}

function renderFigures(run) {
  setText(byId("run-title"), run?.run ?? "Choose a run");
  const figures = run ? describe(run) : [];
  const place = byId("figures");
  if (place.children.length !== figures.length) {
    place.replaceChildren(...figures.map(() => make("div", {}, make("dt"), make("dd"))));
  }
  figures.forEach(([name, value], i) => {
    setText(place.children[i].firstChild, name);
    setText(place.children[i].lastChild, value);
  });
}

/** Returns the figures of a run: names and values. */
function describe(run) {
  const { reports } = curves.get(run.run);
  const last = reports.step.length - 1;
  const known = run.max_steps && run.max_steps >= run.step ? run.max_steps : null;
  const figures = [
    ["State", state(run, reports)],
    ["Step", known ? `${count(run.step)} of ${count(known)}` : count(run.step)],
    ["Tokens", compact(run.tokens)],
    ["Training loss", loss(run.loss)],
    ["Held-out loss", loss(run.validation_loss)],
    ["Bits per byte", loss(run.bits_per_byte)],
  ];
  if (last >= 0) {
    figures.push(["Tokens/s", count(reports.tokens_per_second[last])]);
    figures.push(["Memory", mebibytes(reports.resident_memory_bytes[last])]);
  }
  return figures;
}

/** Says whether a run is running, and if its end is known, how long it takes still. */
function state(run, { step, time }) {
  if (run.ended) return `finished ${duration(run.age_s)} ago`;
  const first = Math.max(step.length - 1 - RECENT, 0);
  const reports = step.length - 1 - first;
  const passed = time.at(-1) - time[first];
  if (run.age_s > Math.max(SILENT_S, (SILENT_REPORTS * passed) / reports || 0)) return `silent for ${duration(run.age_s)}`;
  const left = (passed / (step.at(-1) - step[first])) * (run.max_steps - run.step);
  return left >= 0 ? `running, ${duration(left)} left` : "running";
}

function renderTable(run) {
  setText(byId("evaluations-caption"), run ? `Evaluations of ${run.run}` : "");
  const { step, tokens, validation_loss, bits_per_byte, version } = run ? curves.get(run.run).evaluations : { step: [] };
  const rows = step.map((each, i) => {
    const cells = [count(each), count(tokens[i]), loss(validation_loss[i]), loss(bits_per_byte[i]), version[i] || "–"];
    return make("tr", {}, ...cells.map((text) => make("td", { className: "number" }, String(text))));
  });
  byId("evaluations").replaceChildren(...rows.reverse());
}
