// The picture of the cache: one cell per page, or per run of neighbouring pages when there are more than fit.

import { make } from "./page.js";

const MOST_CELLS = 4096;
const BLANK = 0;
const CACHED = 1;
const SHARED = 2;
const NAMES = ["free", "cached", "shared"];

export class PageMap {
  constructor(place, legend, text) {
    this.place = place;
    this.legend = legend;
    this.text = text;
    this.canvases = [];
  }

  /** The colour of a mark; that of a request stays the same while it keeps its place. */
  colour(mark) {
    const style = getComputedStyle(document.documentElement);
    if (mark <= SHARED) return style.getPropertyValue(`--page-${NAMES[mark]}`).trim();
    const turn = ((mark - SHARED) * 137.508) % 360; // the golden angle: neighbours differ
    return `hsl(${turn.toFixed(0)} 65% ${style.getPropertyValue("--page-lightness").trim() || "55%"})`;
  }

  show(live) {
    while (this.canvases.length > live.groups.length) this.canvases.pop().remove();
    while (this.canvases.length < live.groups.length) {
      const canvas = make("canvas");
      canvas.setAttribute("role", "img");
      this.place.append(canvas);
      this.canvases.push(canvas);
    }
    const totals = live.groups.map((group, index) => this.paint(this.canvases[index], group));
    this.explain(live, totals);
  }

  /** Paint a group; returns how many pages have each kind of mark. */
  paint(canvas, group) {
    const pages = group.runs.reduce((sum, [, count]) => sum + count, 0);
    const perCell = Math.ceil(pages / MOST_CELLS);
    const cells = Math.ceil(pages / perCell);
    const width = canvas.clientWidth || 600;
    const side = Math.max(4, Math.min(22, Math.floor(Math.sqrt((width * 170) / Math.max(1, cells)))));
    const columns = Math.max(1, Math.floor(width / side));
    const scale = window.devicePixelRatio || 1;
    const height = Math.ceil(cells / columns) * side;
    canvas.width = width * scale;
    canvas.height = height * scale;
    canvas.style.height = `${height}px`;
    const paper = canvas.getContext("2d");
    paper.scale(scale, scale);
    const totals = { free: 0, cached: 0, shared: 0, owned: 0 };
    let page = 0;
    for (const [mark, count] of group.runs) {
      totals[mark === BLANK ? "free" : mark === CACHED ? "cached" : mark === SHARED ? "shared" : "owned"] += count;
      paper.fillStyle = this.colour(mark);
      const first = Math.ceil(page / perCell);
      page += count;
      // A cell shows the mark of its first page; a run that begins and ends within a cell still colours it.
      const last = Math.max(first, Math.ceil(page / perCell) - 1);
      for (let cell = first; cell <= last && cell < cells; cell++) {
        paper.fillRect((cell % columns) * side, Math.floor(cell / columns) * side, side - 1, side - 1);
      }
    }
    const words = `${pages} pages: ${totals.owned} of one request, ${totals.shared} shared, ${totals.cached} cached, ${totals.free} free`;
    canvas.setAttribute("aria-label", words);
    return { ...totals, pages, perCell, pageSize: group.page_size, words };
  }

  explain(live, totals) {
    const shown = [
      ["free", this.colour(BLANK)],
      ["cached", this.colour(CACHED)],
      ["shared", this.colour(SHARED)],
      ["of one request each", null],
    ];
    const items = shown.map(([name, colour]) => {
      const item = make("li", "", name);
      const swatch = make("i");
      if (colour) swatch.style.backgroundColor = colour;
      else swatch.className = "rainbow";
      item.prepend(swatch);
      return item;
    });
    this.legend.replaceChildren(...items);
    const texts = totals.map((each) => {
      const cells = each.perCell > 1 ? `, ${each.perCell} pages a cell` : "";
      return `${each.words} (${each.pageSize} positions each${cells})`;
    });
    this.text.textContent = texts.join(" · ") || "The engine has not told of its pages yet.";
  }
}
