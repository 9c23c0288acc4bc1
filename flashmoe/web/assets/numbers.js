// Figures for people. RAM is binary, drive speed decimal, as their makers count.

export const whole = (value) => Math.round(value).toLocaleString("en");

export function bytes(value) {
  const [size, unit] = value >= 2 ** 30 ? [value / 2 ** 30, "GiB"] : [value / 2 ** 20, "MiB"];
  return `${unit === "GiB" ? size.toFixed(size < 10 ? 2 : 1) : size.toFixed(size < 10 ? 1 : 0)} ${unit}`;
}

export function megabytesPerSecond(value) {
  return value >= 1000 ? `${(value / 1000).toFixed(2)} GB/s` : `${whole(value)} MB/s`;
}

export const perSecond = (value) => (value >= 100 ? whole(value) : value.toFixed(1));
export const percent = (share) => `${(100 * share).toFixed(share > 0.995 && share < 1 ? 1 : 0)} %`;

export function amount(value) {
  const units = [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"]];
  const [scale, unit] = units.find(([scale]) => value >= scale) ?? [1e6, "MB"];
  return `${(value / scale).toFixed(value / scale < 100 ? 1 : 0)} ${unit}`;
}

export function duration(seconds) {
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
}
