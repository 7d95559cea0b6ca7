// The chat: the conversation, its settings, and one answer at a time that streams, stops, goes on and is tried again.
//
// The conversation is saved as it grows, so that a page that is loaded again, even in the middle of an answer, shows
// what was there and offers to go on.

import { askForKey, postStream } from "./api.js";
import { element, load, make, save } from "./page.js";

const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];
const SAVE_MS = 250; // between two savings of an answer that grows

/** A message: role, text, reasoning, and of an answer its state: growing, done, stopped, broken. */
function newMessage(role, text = "") {
  return { role, text, reasoning: "", state: role === "user" ? "done" : "growing", note: "" };
}

export class Chat {
  constructor() {
    this.model = undefined;
    this.messages = load("messages") ?? [];
    this.views = [];
    this.abort = null; // ends the running answer
    this.leaving = false; // the page is being left
    for (const message of this.messages) {
      if (message.state === "growing") message.state = "stopped"; // the page was left in the middle of it
    }
    this.restoreSettings();
    this.render();
    element("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    element("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.send();
      }
    });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.abort?.abort();
    });
    element("stop").addEventListener("click", () => this.abort?.abort());
    element("clear").addEventListener("click", () => this.clear());
    window.addEventListener("pagehide", () => {
      this.leaving = true; // what ends an answer from now on is not its fault
      save("messages", this.messages);
    });
  }

  restoreSettings() {
    const kept = load("settings") ?? {};
    for (const name of ["system", ...NUMBERS]) {
      const field = element(name);
      field.value = kept[name] ?? "";
      field.addEventListener("change", () => {
        const values = ["system", ...NUMBERS].map((each) => [each, element(each).value]);
        save("settings", Object.fromEntries(values));
      });
    }
  }

  send() {
    const text = element("prompt").value.trim();
    if (!text || this.abort) return;
    if (this.broken()) return;
    element("prompt").value = "";
    this.messages.push(newMessage("user", text));
    this.answer(newMessage("assistant"));
  }

  /** Whether a setting has an impossible value, which the browser then shows. */
  broken() {
    const wrong = NUMBERS.map(element).find((field) => !field.checkValidity());
    if (wrong) {
      element("settings").open = true;
      wrong.reportValidity();
    }
    return Boolean(wrong);
  }

  clear() {
    this.abort?.abort();
    this.messages = [];
    save("messages", this.messages);
    this.render();
    element("prompt").focus();
  }

  retry() {
    this.messages.pop();
    this.answer(newMessage("assistant"));
  }

  resume() {
    const message = this.messages.pop();
    message.state = "growing";
    this.answer(message);
  }

  /** The body of a request that ends with an answer to grow; one that has begun is continued. */
  body(message) {
    const system = element("system").value.trim();
    const earlier = this.messages.map(({ role, text }) => ({ role, content: text }));
    const begun = message.text ? [{ role: "assistant", content: message.text }] : [];
    const body = {
      model: this.model,
      messages: [...(system ? [{ role: "system", content: system }] : []), ...earlier, ...begun],
      stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true },
    };
    if (begun.length) Object.assign(body, { add_generation_prompt: false, continue_final_message: true });
    for (const name of NUMBERS) {
      if (element(name).value !== "") body[name] = Number(element(name).value);
    }
    return body;
  }

  async answer(message) {
    const body = this.body(message);
    this.messages.push(message);
    this.abort = new AbortController();
    this.render();
    const meter = new Meter();
    const view = this.views.at(-1);
    let saved = 0;
    try {
      for await (const event of postStream("v1/chat/completions", body, this.abort.signal)) {
        meter.take(event);
        const choice = event.choices[0];
        message.text += choice?.delta?.content ?? "";
        message.reasoning += choice?.delta?.reasoning ?? choice?.delta?.reasoning_content ?? "";
        if (choice?.finish_reason) message.state = choice.finish_reason === "abort" ? "stopped" : "done";
        if (choice?.finish_reason === "length") message.state = "stopped";
        message.note = meter.text();
        view.update();
        if (performance.now() > saved + SAVE_MS) {
          save("messages", this.messages);
          saved = performance.now();
        }
      }
    } catch (error) {
      if (this.leaving) return;
      message.state = error.name === "AbortError" ? "stopped" : "broken";
      if (message.state === "broken") message.note = error.message;
      if (error.status === 401) askForKey();
    }
    this.abort = null;
    save("messages", this.messages);
    this.render();
  }

  render() {
    const list = element("messages");
    this.views = this.messages.map((message) => new MessageView(message));
    list.replaceChildren(...this.views.map((view) => view.item));
    const last = this.messages.at(-1);
    if (last?.role === "assistant" && !this.abort) {
      const actions = make("div", "actions");
      actions.append(this.action("Retry", () => this.retry()));
      if (last.state === "stopped" && last.text) actions.append(this.action("Go on", () => this.resume()));
      this.views.at(-1).item.append(actions);
    }
    element("send").hidden = Boolean(this.abort);
    element("stop").hidden = !this.abort;
    list.lastElementChild?.scrollIntoView({ block: "end" });
  }

  action(text, act) {
    const button = make("button", "", text);
    button.type = "button";
    button.addEventListener("click", () => {
      if (!this.broken()) act();
    });
    return button;
  }
}

/** How fast an answer comes, by the server's own count of tokens. */
class Meter {
  constructor() {
    this.began = performance.now();
    this.first = null;
    this.last = null;
    this.tokens = 0;
    this.firstTokens = 0;
  }

  take(event) {
    const tokens = event.usage?.completion_tokens ?? 0;
    if (tokens <= this.tokens) return;
    this.last = performance.now();
    if (this.first === null) {
      this.first = this.last;
      this.firstTokens = tokens;
    }
    this.tokens = tokens;
  }

  text() {
    if (this.first === null) return "";
    const parts = [`${this.tokens} tokens`, `first after ${Math.round(this.first - this.began)} ms`];
    const seconds = (this.last - this.first) / 1000;
    if (seconds > 0) parts.push(`${((this.tokens - this.firstTokens) / seconds).toFixed(1)} tokens/s`);
    return parts.join(", ");
  }
}

/** What one message looks like. Text is set as text: nothing of it is ever taken for markup. */
class MessageView {
  constructor(message) {
    this.message = message;
    this.item = make("li", message.role);
    this.reasoning = make("details", "reasoning");
    this.reasoning.append(make("summary", "", "Reasoning"), make("div", "text"));
    this.text = make("div", "text");
    this.note = make("p", "note");
    this.item.append(this.reasoning, this.text, this.note);
    this.update();
  }

  update() {
    const { text, reasoning, state, note } = this.message;
    const stick = window.innerHeight + window.scrollY >= document.body.scrollHeight - 80;
    this.reasoning.hidden = !reasoning;
    this.reasoning.lastElementChild.textContent = reasoning;
    this.text.replaceChildren(...pieces(text));
    this.item.dataset.state = state;
    const words = { stopped: "stopped here", broken: "failed" }[state];
    this.note.textContent = [words, note].filter(Boolean).join(" · ");
    if (state === "growing" && stick) this.item.scrollIntoView({ block: "end" });
  }
}

/** Paragraphs and fenced code of a text, as elements. */
function pieces(text) {
  return text.split("```").map((part, index) => {
    if (index % 2 === 0) return make("span", "", part);
    const [, , code] = part.match(/^([\w+-]*\n)?([\s\S]*)$/);
    return make("pre", "", code);
  });
}
