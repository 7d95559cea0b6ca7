// The live picture of the engine: asked for twice a second while it can be seen, drawn with what came.

import { getJson } from "./api.js";
import { PageMap } from "./pages.js";
import { drawRates, drawRoofline } from "./plots.js";
import { element, make, short } from "./page.js";

const PAUSE_MS = 500;
const RETRY_MS = 2000;
const HISTORY_MS = 120_000;

/** Tokens per second since the last answer, for two minutes. */
class History {
  constructor() {
    this.points = [];
    this.before = null;
  }

  take(live) {
    const now = performance.now();
    const before = this.before;
    this.before = { at: now, generated: live.generated_tokens, computed: live.computed_tokens };
    if (!before || live.computed_tokens < before.computed) return;
    const seconds = (now - before.at) / 1000;
    const generated = (live.generated_tokens - before.generated) / seconds;
    const computed = (live.computed_tokens - before.computed) / seconds;
    this.points.push({ at: now, generated, prompt: Math.max(0, computed - generated), rows: live.running });
    while (this.points[0].at < now - HISTORY_MS) this.points.shift();
  }
}

/** Ask again and again, for as long as the page is open; a hidden page does not ask. */
export async function watchEngine({ onAnswer, onSilence }) {
  const history = new History();
  const map = new PageMap(element("pages"), element("legend"), element("page-text"));
  for (;;) {
    let pause = PAUSE_MS;
    if (!document.hidden) {
      try {
        const live = await getJson("v1/live", AbortSignal.timeout(10_000));
        onAnswer(live);
        history.take(live);
        show(live, history, map);
      } catch (error) {
        onSilence(error);
        pause = RETRY_MS;
      }
    }
    await new Promise((resolve) => setTimeout(resolve, pause));
  }
}

function show(live, history, map) {
  const latest = history.points.at(-1);
  const hits = live.prompt_tokens ? live.cached_tokens / live.prompt_tokens : 0;
  const figures = [
    ["running", live.running],
    ["waiting", live.waiting],
    ["tokens/s", latest ? short(latest.generated) : "–"],
    ["prompt tokens/s", latest ? short(latest.prompt) : "–"],
    ["tokens made", short(live.generated_tokens)],
    ["prompts from cache", `${(100 * hits).toFixed(0)} %`],
    ["preemptions", live.preemptions],
    ["restarts", live.restarts],
  ];
  if (live.drafted_tokens) {
    figures.push(["drafts accepted", `${((100 * live.accepted_tokens) / live.drafted_tokens).toFixed(0)} %`]);
  }
  element("figures").replaceChildren(
    ...figures.map(([name, value]) => {
      const pair = make("div");
      pair.append(make("dt", "", name), make("dd", "", String(value)));
      return pair;
    }),
  );
  map.show(live);
  drawRates(element("rates"), element("rates-text"), history.points, HISTORY_MS);
  drawRoofline(element("roofline"), element("roofline-text"), live.ceiling, history.points);
  showRequests(live, map);
}

function showRequests(live, map) {
  const rows = live.requests.map((request, index) => {
    const row = make("tr", request.id ? "" : "foreign");
    const swatch = make("td", "swatch");
    if (request.state === "running") {
      swatch.append(make("i"));
      swatch.firstChild.style.backgroundColor = map.colour(live.first_owner + index);
    }
    const cells = [
      request.id ?? "of another key",
      request.state,
      `${short(request.computed)} of ${short(request.tokens)}, at most ${short(request.limit)}`,
      request.cached_tokens ? `${short(request.cached_tokens)} tokens` : "–",
    ];
    row.append(swatch, ...cells.map((text) => make("td", "", text)));
    return row;
  });
  const hidden = live.running + live.waiting - live.requests.length;
  if (hidden > 0) {
    const more = make("td", "foreign", `and ${hidden} more`);
    more.colSpan = 5;
    rows.push(make("tr"));
    rows.at(-1).append(more);
  }
  element("requests").tBodies[0].replaceChildren(...rows);
}
