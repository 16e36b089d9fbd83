/** Writes numbers for people. */

const compactly = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export const compact = (value) => compactly.format(value);
export const count = (value) => whole.format(value);
export const loss = (value) => (value === null || value === undefined ? "–" : value.toFixed(4));
export const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;
export const mebibytes = (bytes) => `${whole.format(bytes / 2 ** 20)} MiB`;

/** Returns a duration in its largest unit, as the commands do. */
export function duration(seconds) {
  for (const [unit, length] of [["d", 86400], ["h", 3600], ["min", 60]]) {
    if (seconds >= length) return `${Math.round(seconds / length)} ${unit}`;
  }
  return `${Math.max(Math.round(seconds), 0)} s`;
}
