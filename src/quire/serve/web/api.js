// Asking the server: the API key, errors, and streams of server-sent events.

import { element } from "./page.js";

const KEY = "quire.key"; // of this tab alone

/** An answer that is not what was asked for: its HTTP status and the server's own words. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

function headers() {
  const key = sessionStorage.getItem(KEY);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/** Let the user type a key; further calls carry it. Does nothing while the question is open. */
export function askForKey() {
  const dialog = element("key-dialog");
  if (dialog.open) return;
  element("key-problem").textContent = sessionStorage.getItem(KEY) ? "The key was not accepted." : "";
  dialog.showModal();
  dialog.addEventListener("close", () => sessionStorage.setItem(KEY, element("key").value.trim()), { once: true });
}

async function checked(response) {
  if (response.ok) return response;
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // Not in the shape of the API's errors: something else answered.
  }
  throw new ApiError(response.status, message);
}

/** The JSON at a path. Paths are relative, so that the page works behind a prefix. */
export async function getJson(path, signal) {
  return (await checked(await fetch(path, { headers: headers(), signal }))).json();
}

/** Post a body; yields the JSON of each server-sent event until [DONE]. */
export async function* postStream(path, body, signal) {
  const response = await checked(
    await fetch(path, {
      method: "POST",
      headers: { "Content-Type": "application/json", ...headers() },
      body: JSON.stringify(body),
      signal,
    }),
  );
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ApiError(0, "The stream ended too early.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue; // comments keep the connection alive
      const data = line.slice(6).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(event.error.code, event.error.message);
      yield event;
    }
  }
}
