// The chart of the memory page: bytes a second that came ahead of need, and that VMs waited for.
"use strict";
(() => {
  const place = document.getElementById("pulse");
  if (!place) return;
  const EVERY_MS = 2000;
  const HEIGHT = 190;
  let plot = null;
  let data = [[], [], []];

  const size = (bytes) => {
    const units = ["B/s", "KiB/s", "MiB/s", "GiB/s"];
    let at = 0;
    while (bytes >= 1024 && at + 1 < units.length) {
      bytes /= 1024;
      at += 1;
    }
    return `${bytes < 10 && bytes % 1 ? bytes.toFixed(1) : Math.round(bytes)} ${units[at]}`;
  };

  // UTC, as everywhere on these pages.
  const time = (s) => new Date(s * 1000).toISOString().slice(11, 19);

  // Lines at sizes that are read easily: powers of two.
  const splits = (chart, axis, least, most) => {
    const step = 2 ** Math.ceil(Math.log2(Math.max(most, 1024) / 4));
    const lines = [];
    for (let at = 0; at <= most; at += step) lines.push(at);
    return lines;
  };

  const draw = () => {
    if (plot) plot.destroy();
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const axis = {
      stroke: colour("--soft"),
      grid: { stroke: colour("--line"), width: 1 },
      ticks: { show: false },
      font: "12px system-ui, sans-serif",
    };
    const series = (stroke) => ({ stroke, fill: stroke + "55", width: 1.5, points: { show: false } });
    plot = new uPlot(
      {
        width: place.clientWidth,
        height: HEIGHT,
        legend: { show: false },
        cursor: { show: false },
        scales: { y: { range: (chart, least, most) => [0, Math.max(most * 1.1, 64 * 1024)] } },
        axes: [{ ...axis, space: 90, values: (chart, lines) => lines.map(time) }, { ...axis, size: 84, splits, values: (chart, lines) => lines.map(size) }],
        series: [{}, series(colour("--b")), series(colour("--s4"))],
      },
      data,
      place,
    );
  };

  const look = async () => {
    if (document.hidden) return;
    const answer = await fetch("/ui/pulse");
    if (!answer.ok) return;
    const told = await answer.json();
    data = [told.at_s, told.ahead, told.waited];
    if (plot) plot.setData(data);
    else draw();
  };
  // A daemon that is away is told by what keeps the page.
  const again = () => look().catch(() => {}).finally(() => setTimeout(again, EVERY_MS));
  again();
  new ResizeObserver(() => plot && plot.setSize({ width: place.clientWidth, height: HEIGHT })).observe(place);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => plot && draw());
})();
