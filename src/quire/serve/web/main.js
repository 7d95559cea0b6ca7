// Ties the parts of the page together: tabs, theme, the key, the chat and the engine's picture.

import { askForKey } from "./api.js";
import { Chat } from "./chat.js";
import { watchEngine } from "./engine.js";
import { element, load, save } from "./page.js";

const TABS = ["chat", "engine"];

function showTab(name) {
  for (const tab of TABS) {
    element(`tab-${tab}`).setAttribute("aria-selected", String(tab === name));
    element(tab).classList.toggle("shown", tab === name);
  }
}

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : window.matchMedia("(prefers-color-scheme: dark)").matches;
}

for (const tab of TABS) {
  element(`tab-${tab}`).addEventListener("click", () => showTab(tab));
}
setTheme(load("theme"));
element("theme").addEventListener("click", () => {
  const theme = isDark() ? "light" : "dark";
  save("theme", theme);
  setTheme(theme);
});

showTab("chat");
const chat = new Chat();
watchEngine({
  onAnswer(live) {
    chat.model = live.model;
    element("model").textContent = live.model;
    element("state").textContent = live.restarts ? `${live.state}, restarted ${live.restarts}×` : live.state;
    element("state").dataset.state = live.state;
  },
  onSilence(error) {
    element("state").textContent = "not reachable";
    element("state").dataset.state = "gone";
    if (error.status === 401) askForKey();
  },
});
