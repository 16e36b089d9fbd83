/** A chart of several lines over one another, with marks for versions. */

import { make } from "./elements.js";
import { compact } from "./format.js";
import uPlot from "./vendor/uplot/uPlot.esm.js";

// Numbers of marks that are nearer than this, in pixels along and across, cannot be read.
const NEAR = [20, 14];
const cursor = uPlot.sync("training");

/**
 * @typedef {object} Line
 * @property {string} label
 * @property {string} colour a custom property of the style sheet
 * @property {number[]} x
 * @property {number[]} y
 * @property {boolean} [strong] whether it is drawn strongly, with its points
 *
 * @typedef {object} Mark
 * @property {string} text
 * @property {string} title
 * @property {string} colour
 * @property {number} x
 * @property {number} y
 */

export class Chart {
  /**
   * @param {HTMLElement} place
   * @param {{height: number, main?: boolean, write: (value: number) => string}} options whether it is the main chart,
   *   which has a legend and does not begin at zero; how it writes values
   */
  constructor(place, { height, main = false, write }) {
    this.place = place;
    this.height = height;
    this.main = main;
    this.write = write;
    this.plot = null;
    this.shape = "";
    this.zoomed = false;
    this.marks = [];
    this.layer = make("div", { className: "marks", "aria-hidden": "true" });
    place.setAttribute("role", "img");
    new ResizeObserver(() => this.fit()).observe(place);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.plot && this.rebuild());
  }

  /** @param {Line[]} lines @param {Mark[]} marks @param {string} description what a screen reader says */
  draw(lines, marks, description) {
    this.lines = lines;
    this.marks = marks;
    this.data = lines.length ? uPlot.join(lines.map(({ x, y }) => [x, y])) : [[]];
    this.place.setAttribute("aria-label", description);
    const shape = JSON.stringify(lines.map(({ label, colour, strong }) => [label, colour, strong]));
    if (shape !== this.shape) {
      this.shape = shape;
      this.rebuild();
    } else if (this.zoomed) {
      this.plot.setData(this.data, false);
    } else {
      this.plot.setData(this.data);
    }
  }

  rebuild() {
    this.plot?.destroy();
    this.zoomed = false;
    this.plot = new uPlot(this.options(), this.data, this.place);
  }

  fit() {
    const width = this.place.clientWidth;
    if (this.plot && width && width !== this.plot.width) this.plot.setSize({ width, height: this.height });
  }

  options() {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const axis = {
      stroke: colour("--muted"),
      grid: { stroke: colour("--line"), width: 1 },
      ticks: { show: false },
      font: "12px system-ui, sans-serif",
    };
    const series = this.lines.map(({ label, colour: name, strong }) => ({
      label,
      stroke: colour(name),
      width: strong ? 2 : 1.25,
      alpha: strong || !this.main ? 1 : 0.6,
      points: { show: Boolean(strong), size: 5, fill: colour(name) },
      spanGaps: true,
      value: (_, value) => (value === null ? "–" : this.write(value)),
    }));
    return {
      width: this.place.clientWidth || 300,
      height: this.height,
      legend: { show: this.main, markers: { fill: (_, i) => (this.lines[i - 1]?.strong ? series[i - 1].stroke : "transparent") } },
      cursor: { sync: { key: cursor.key }, drag: { x: true, y: false }, dataIdx: nearest, points: { size: 7 } },
      scales: { x: { time: false }, y: this.main ? {} : { range: (_, low, high) => [0, high * 1.08 || 1] } },
      series: [{ label: "at", value: (_, value) => (value === null ? "–" : compact(value)) }, ...series],
      axes: [
        { ...axis, values: (_, ticks) => ticks.map(compact), space: 60, size: 30 },
        { ...axis, values: (_, ticks) => ticks.map(this.write), size: 56 },
      ],
      hooks: {
        ready: [(plot) => plot.over.append(this.layer)],
        draw: [(plot) => this.placeMarks(plot)],
        setSelect: [(plot) => { this.zoomed ||= plot.select.width > 0; }],
        init: [(plot) => plot.over.addEventListener("dblclick", () => { this.zoomed = false; })],
      },
    };
  }

  placeMarks(plot) {
    const marks = [];
    const numbers = [];
    for (const { x, y, text, title, colour } of this.marks) {
      const left = plot.valToPos(x, "x");
      const top = plot.valToPos(y, "y");
      if (!(left >= 0 && left <= plot.over.clientWidth && top >= 0 && top <= plot.over.clientHeight)) continue;
      const isFree = !numbers.some((other) => Math.abs(left - other.left) < NEAR[0] && Math.abs(top - other.top) < NEAR[1]);
      if (isFree) numbers.push({ left, top });
      const mark = make("span", { className: "mark", title }, make("span", {}, isFree ? text : ""));
      mark.style.left = `${left}px`;
      mark.style.top = `${top}px`;
      mark.style.setProperty("--colour", `var(${colour})`);
      marks.push(mark);
    }
    this.layer.replaceChildren(...marks);
  }
}

/** Returns the nearest place at which a line has a value: lines of several runs have theirs at different places. */
function nearest(plot, line, place) {
  const values = plot.data[line];
  for (let distance = 0; distance < values.length; distance++) {
    if (values[place - distance] != null) return place - distance;
    if (values[place + distance] != null) return place + distance;
  }
  return place;
}
