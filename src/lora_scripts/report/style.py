"""How the page looks, and the little that moves on it. Everything also works without the script."""

from __future__ import annotations

__all__ = ["CSS", "SCRIPT"]

CSS = """
:root {
  color-scheme: light dark;
  --page: #f5f5f2; --card: #ffffff; --sunken: #f1f1ed; --line: #dedfd9; --ink: #1d2125; --soft: #5f666d;
  --accent: #2459c4; --accent-soft: #e7eefc; --second: #b4540a; --good: #17704a; --good-soft: #e3f3ea;
  --warn: #8a5300; --warn-soft: #fdf1dc; --shadow: 0 1px 2px rgb(20 24 30 / 5%), 0 6px 24px rgb(20 24 30 / 5%);
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #121417; --card: #1b1e22; --sunken: #23272c; --line: #32373d; --ink: #e8eaed; --soft: #a0a7af;
    --accent: #8ab0ff; --accent-soft: #1f2c47; --second: #f0a35e; --good: #6fd3a0; --good-soft: #17342a;
    --warn: #f2c069; --warn-soft: #3a2d14; --shadow: none;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--ink); font-size: 16px; line-height: 1.55;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", "PingFang SC",
    "Microsoft YaHei", "Noto Sans CJK SC", sans-serif;
}
main { max-width: 1140px; margin: 0 auto; padding: 40px 24px 72px; }
h1 { font-size: clamp(30px, 5vw, 46px); line-height: 1.12; letter-spacing: -.02em; margin: 6px 0 0; overflow-wrap: anywhere; }
h2 { font-size: 22px; line-height: 1.25; letter-spacing: -.01em; margin: 0; }
h3 { font-size: 16px; margin: 26px 0 10px; }
.zh { color: var(--soft); font-weight: 400; font-size: .78em; margin-left: .45em; letter-spacing: .02em; white-space: nowrap; }
p { margin: 0 0 12px; max-width: 76ch; }
a { color: var(--accent); }
img { display: block; max-width: 100%; height: auto; }
code, pre, .mono { font-family: ui-monospace, "SF Mono", "Cascadia Mono", Consolas, "DejaVu Sans Mono", monospace; font-size: .89em; }
code { background: var(--sunken); border-radius: 5px; padding: 1px 5px; overflow-wrap: anywhere; }
pre { background: var(--sunken); border-radius: 8px; padding: 11px 14px; margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.soft { color: var(--soft); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 26px 28px 28px; margin-top: 22px; box-shadow: var(--shadow); }
.head { display: flex; flex-wrap: wrap; align-items: baseline; justify-content: space-between; gap: 6px 16px; margin-bottom: 16px; }
.lead { color: var(--soft); margin: -8px 0 18px; font-size: 15px; max-width: 100ch; text-wrap: pretty; }

header .over { color: var(--accent); font-weight: 600; font-size: 14px; letter-spacing: .02em; margin: 0; }
.badge { display: inline-block; border-radius: 999px; padding: 3px 12px; font-size: 14px; font-weight: 600; }
.badge.good { color: var(--good); background: var(--good-soft); }
.badge.warn { color: var(--warn); background: var(--warn-soft); }
.verdict { font-size: 18px; line-height: 1.6; margin: 18px 0 8px; }
.verdict-zh { color: var(--soft); margin-bottom: 20px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(138px, 1fr)); gap: 1px; background: var(--line);
  border: 1px solid var(--line); border-radius: 12px; overflow: hidden; margin: 22px 0 0; }
.figures div { background: var(--card); padding: 13px 16px 14px; }
.figures dt { font-size: 13px; color: var(--soft); }
.figures dd { margin: 2px 0 0; font-size: 22px; font-weight: 600; letter-spacing: -.01em; line-height: 1.2; overflow-wrap: anywhere; }
.figures dd small { display: block; font-size: 13px; font-weight: 400; color: var(--soft); letter-spacing: 0; margin-top: 2px; }
.use { display: grid; grid-template-columns: auto 1fr; gap: 8px 14px; align-items: center; margin-top: 18px; }
.use span { color: var(--soft); font-size: 14px; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-top: 22px; font-size: 14px; }
nav a { text-decoration: none; }
nav a:hover { text-decoration: underline; }

.pairs { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 26px 24px; }
.pairs figure, .grid figure, .data figure { margin: 0; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 6px; position: relative; border-radius: 10px; overflow: hidden; }
.pair > div { position: relative; }
.pair img { width: 100%; background: var(--sunken); }
.chip { position: absolute; left: 8px; top: 8px; background: rgb(16 18 22 / 72%); color: #fff; border-radius: 6px; padding: 1px 8px; font-size: 12.5px; }
.pairs figcaption { margin-top: 9px; font-size: 15px; overflow-wrap: anywhere; }
.slide .pair { display: block; touch-action: pan-y; max-width: 512px; }
.slide .pair > .after { position: absolute; inset: 0; clip-path: inset(0 0 0 var(--cut, 50%)); }
.slide .after .chip { left: auto; right: 8px; }
.slide .pair::after { content: ""; position: absolute; top: 0; bottom: 0; left: var(--cut, 50%); width: 2px; margin-left: -1px; background: #fff; box-shadow: 0 0 0 1px rgb(0 0 0 / 25%); pointer-events: none; }
.pair input { display: none; }
.slide .pair input { display: block; position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0; cursor: ew-resize; }
.slide .pair:focus-within { outline: 3px solid var(--accent); }
button { font: inherit; font-size: 14px; color: var(--accent); background: var(--accent-soft); border: 0; border-radius: 8px; padding: 5px 13px; cursor: pointer; }

.answers { display: grid; gap: 18px; }
.answers article { border: 1px solid var(--line); border-radius: 12px; overflow: hidden; }
.answers .asked { margin: 0; padding: 12px 16px; background: var(--sunken); font-weight: 600; max-width: none; white-space: pre-wrap; overflow-wrap: anywhere; }
.said { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(240px, 100%), 1fr)); }
.said > div { padding: 12px 16px 14px; border-top: 1px solid var(--line); }
.said > div + div { border-left: 1px solid var(--line); }
.said .now { background: var(--accent-soft); }
.said h4 { margin: 0 0 4px; font-size: 13.5px; font-weight: 600; color: var(--soft); }
.answer { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; max-width: none; }

.scroll { overflow-x: auto; margin: 0 -28px; padding: 0 28px; }
.grid { border-collapse: separate; border-spacing: 6px; margin: -6px; width: 100%; }
.grid th { font-weight: 600; font-size: 13.5px; text-align: center; padding: 0 0 2px; white-space: nowrap; }
.grid th[scope=row] { font-weight: 400; text-align: left; width: 170px; min-width: 120px; white-space: normal; color: var(--soft); padding-right: 10px; line-height: 1.4; overflow-wrap: anywhere; }
.grid td { padding: 0; }
.grid.answers-by-step { margin: 0; }
.grid.answers-by-step td { vertical-align: top; padding: 8px 10px; background: var(--sunken); border-radius: 8px; min-width: 190px; font-size: 14px; }
.grid.answers-by-step thead td { background: none; }
.grid.answers-by-step th[scope=row] { vertical-align: top; padding-top: 8px; white-space: pre-wrap; }
.grid img { width: 100%; min-width: 112px; border-radius: 8px; background: var(--sunken); }
img[data-zoom].live { cursor: zoom-in; }
dialog { border: 0; outline: 0; padding: 0; background: transparent; max-width: 96vw; max-height: 96vh; }
dialog::backdrop { background: rgb(10 11 13 / 82%); }
dialog img { width: min(88vw, 82vh, 768px); height: auto; border-radius: 10px; cursor: zoom-out; }
dialog p { color: #f0f1f3; margin: 10px auto 0; text-align: center; max-width: 70ch; font-size: 15px; }

.measures { display: grid; gap: 18px; }
.measure { display: grid; grid-template-columns: minmax(180px, 1fr) 2fr; gap: 4px 24px; align-items: center; padding-bottom: 16px; border-bottom: 1px solid var(--line); }
.measure:last-child { border: 0; padding-bottom: 0; }
.measure b { font-weight: 600; }
.measure p { margin: 2px 0 0; font-size: 14px; color: var(--soft); }
.bars { display: grid; grid-template-columns: auto 1fr auto; gap: 5px 12px; align-items: center; font-size: 14px; font-variant-numeric: tabular-nums; }
.bars .track { background: var(--sunken); border-radius: 4px; height: 12px; overflow: hidden; }
.bars .fill { height: 100%; border-radius: 4px; background: var(--soft); opacity: .55; }
.bars .fill.now { background: var(--accent); opacity: 1; }
.bars strong { text-align: right; }
.measure .change { font-size: 19px; color: var(--ink); font-variant-numeric: tabular-nums; margin: 0; }

.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 30px 34px; }
.chart { margin: 0; min-width: 0; }
.chart.wide { grid-column: 1 / -1; }
.chart figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 2px 14px; margin-bottom: 8px; font-size: 15px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 13.5px; color: var(--soft); }
.legend i { display: inline-block; width: 18px; height: 0; border-top: 3px solid var(--accent); border-radius: 2px; vertical-align: middle; margin-right: 6px; }
.legend i.faint { opacity: .42; border-top-width: 2px; }
.legend i.second { border-color: var(--second); }
.plot { display: grid; grid-template-columns: 52px 1fr; grid-template-rows: 190px 22px; }
.wide .plot { grid-template-rows: 270px 22px; }
.area { position: relative; }
.area svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: hidden; display: block; }
.area path { fill: none; vector-effect: non-scaling-stroke; stroke-linecap: round; stroke-linejoin: round; stroke: var(--accent); }
.area .grid, .area .mark { stroke: var(--line); stroke-width: 1; }
.area .mark { stroke: var(--soft); stroke-width: 2; }
.area .limit { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 4 5; }
.area .line { stroke-width: 2.2; }
.area .second { stroke: var(--second); stroke-width: 2.2; }
.area .dense { stroke-width: 1.1; }
.area .faint { stroke-width: 1.1; opacity: .42; }
.limit-label { position: absolute; right: 4px; transform: translateY(-105%); font-size: 12px; color: var(--soft); }
.y-axis, .x-axis { position: relative; font-size: 12.5px; color: var(--soft); font-variant-numeric: tabular-nums; }
.y-axis span { position: absolute; right: 9px; transform: translateY(-50%); white-space: nowrap; }
.x-axis { grid-column: 2; }
.x-axis span { position: absolute; top: 5px; transform: translateX(-50%); }
.reading { font-size: 13.5px; color: var(--soft); margin: 8px 0 0; }
.cursor { position: absolute; top: 0; bottom: 0; width: 1px; background: var(--soft); pointer-events: none; }
.tip { position: absolute; top: 6px; z-index: 2; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 5px 10px; font-size: 13px; pointer-events: none; white-space: nowrap; box-shadow: 0 4px 16px rgb(0 0 0 / 14%); }
.tip b { display: block; }

.clamp { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 5; overflow: hidden; }
.files { list-style: none; margin: 0; padding: 0; border-top: 1px solid var(--line); }
.files li { padding: 10px 0; border-bottom: 1px solid var(--line); }
.files div { display: flex; justify-content: space-between; gap: 16px; }
.files div code { font-weight: 600; }
.files div span { white-space: nowrap; font-variant-numeric: tabular-nums; }
.files p { margin: 3px 0 0; font-size: 14px; color: var(--soft); }
table.list { border-collapse: collapse; width: 100%; font-size: 15px; }
.list th, .list td { text-align: left; vertical-align: top; padding: 8px 16px 8px 0; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
.list th { font-size: 13.5px; font-weight: 600; color: var(--soft); }
.list tr:last-child td { border-bottom: 0; }
.list td:first-child { min-width: 8.6em; }
.list tr.changed td { background: var(--accent-soft); }
.list tr.changed td:first-child, .list tr.changed th:first-child { box-shadow: inset 3px 0 var(--accent); }
.settings td:first-child { padding-left: 12px; }
.settings th:first-child { padding-left: 12px; }
.settings .why { font-size: 13.5px; color: var(--soft); }
.settings td code { background: none; padding: 0; }
.settings .default { white-space: nowrap; }
.settings td:first-child code { overflow-wrap: break-word; }
.settings .group td { padding: 20px 0 6px; border-bottom: 1px solid var(--line); font-weight: 600; font-size: 14px; }
.buckets { display: grid; grid-template-columns: auto 1fr auto; gap: 7px 14px; align-items: center; font-size: 14px; font-variant-numeric: tabular-nums; max-width: 620px; }
.buckets .track { height: 12px; }
.buckets .fill { height: 100%; background: var(--accent); border-radius: 0 4px 4px 0; min-width: 3px; }
.data { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 20px 16px; }
.data .frame { background: var(--sunken); border-radius: 9px; overflow: hidden; aspect-ratio: 1; display: grid; place-items: center; }
.data img { width: 100%; height: 100%; object-fit: contain; }
.data figcaption { font-size: 13.5px; line-height: 1.42; margin-top: 7px; overflow-wrap: anywhere; }
.data figcaption .soft { display: block; font-size: 12px; }
details { margin-top: 18px; }
summary { cursor: pointer; color: var(--accent); font-size: 15px; }
details > :not(summary) { margin-top: 12px; }
ul.lines { list-style: none; margin: 0; padding: 0; }
ul.lines li { position: relative; padding: 5px 0 5px 26px; max-width: 84ch; overflow-wrap: anywhere; }
ul.lines li::before { position: absolute; left: 2px; color: var(--accent); content: "\\2192"; }
ul.good li::before { color: var(--good); content: "\\2713"; font-weight: 700; }
ul.warn li::before { color: var(--warn); content: "!"; left: 6px; font-weight: 700; }
.command { margin-bottom: 14px; }
.command p { margin: 0 0 5px; font-size: 15px; }
footer { color: var(--soft); font-size: 13.5px; margin-top: 26px; }
@media (max-width: 640px) {
  main { padding: 24px 14px 48px; }
  section { padding: 20px 16px 22px; border-radius: 12px; }
  .scroll { margin: 0 -16px; padding: 0 16px; }
  .verdict { font-size: 17px; }
  .figures { grid-template-columns: 1fr 1fr; }
  .use { grid-template-columns: 1fr; gap: 4px; }
  .use pre { margin-bottom: 8px; }
  .measure { grid-template-columns: 1fr; gap: 10px; }
  .plot { grid-template-columns: 44px 1fr; }
  .wide .plot { grid-template-rows: 210px 22px; }
  .grid th[scope=row] { min-width: 104px; max-width: 104px; font-size: 12.5px; }
  .data { grid-template-columns: 1fr 1fr; }
  .settings .why { display: none; }
  .settings code { font-size: 12.5px; }
  .list th, .list td { padding-right: 10px; font-size: 14px; }
}
@media print {
  body { background: #fff; }
  section { box-shadow: none; break-inside: avoid; }
  nav, button { display: none; }
}
"""

SCRIPT = """
"use strict";
// Before and after as a slider: one button turns all pairs.
for (const section of document.querySelectorAll("[data-pairs]")) {
  const button = document.createElement("button");
  const name = on => { button.textContent = on ? "Side by side" : "Compare with a slider"; };
  name(false);
  button.addEventListener("click", () => name(section.classList.toggle("slide")));
  section.querySelector(".head").append(button);
  for (const pair of section.querySelectorAll(".pair")) {
    const range = document.createElement("input");
    range.type = "range"; range.min = 0; range.max = 100; range.value = 50;
    range.setAttribute("aria-label", "before or after");
    range.addEventListener("input", () => pair.style.setProperty("--cut", range.value + "%"));
    pair.append(range);
  }
}
// A click enlarges a picture.
const dialog = document.createElement("dialog");
if (dialog.showModal) {
  const large = document.createElement("img"), words = document.createElement("p");
  dialog.append(large, words);
  document.body.append(dialog);
  dialog.addEventListener("click", () => dialog.close());
  for (const image of document.querySelectorAll("img[data-zoom]")) {
    image.classList.add("live");
    image.addEventListener("click", () => { large.src = image.src; large.alt = words.textContent = image.alt; dialog.showModal(); });
  }
}
// The values under the pointer.
for (const area of document.querySelectorAll("[data-hover]")) {
  const series = JSON.parse(area.dataset.hover), first = +area.dataset.first, last = +area.dataset.last;
  const cursor = document.createElement("div"), tip = document.createElement("div");
  cursor.className = "cursor"; tip.className = "tip"; cursor.hidden = tip.hidden = true;
  area.append(cursor, tip);
  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) { const middle = (low + high) >> 1; if (xs[middle] > x) high = middle; else low = middle; }
    return x - xs[low] <= xs[high] - x ? low : high;
  };
  area.addEventListener("pointermove", event => {
    const box = area.getBoundingClientRect(), share = (event.clientX - box.left) / box.width;
    const wanted = first + share * (last - first), main = series[series.length - 1];
    const x = main.x[nearest(main.x, wanted)], at = (x - first) / (last - first);
    cursor.style.left = at * 100 + "%";
    tip.style.left = at < .5 ? "calc(" + at * 100 + "% + 10px)" : "auto";
    tip.style.right = at < .5 ? "auto" : "calc(" + (1 - at) * 100 + "% + 10px)";
    const head = document.createElement("b");
    head.textContent = "step " + x.toLocaleString("en");
    tip.replaceChildren(head);
    for (const each of series) {
      const value = each.y[nearest(each.x, x)], line = document.createElement("div");
      line.textContent = (series.length > 1 ? each.name + " " : "") + (value === null ? "not a number" : value);
      tip.append(line);
    }
    cursor.hidden = tip.hidden = false;
  });
  area.addEventListener("pointerleave", () => { cursor.hidden = tip.hidden = true; });
}
"""
