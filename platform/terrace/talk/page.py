"""The page on which a served model is tried: one file of plain HTML, whose script speaks the same API as everybody else."""

from __future__ import annotations

from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1c2028; --muted: #626979; --line: #dfe3ea; --page: #f6f7f9; --panel: #fff; --own: #e8eefc;
  --accent: #2f5fd0; --wrong: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ec; --muted: #9aa2b1; --line: #2c323d; --page: #14171c; --panel: #1b1f26;
  --own: #24304a; --accent: #7ea2f5; --wrong: #f0867c; } }
* { box-sizing: border-box; }
html, body { height: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  display: flex; flex-direction: column; }
header { display: flex; flex-wrap: wrap; gap: 4px 16px; align-items: center; padding: 12px 20px; border-bottom: 1px solid var(--line); }
header h1 { font-size: 17px; margin: 0; overflow-wrap: anywhere; }
header p { margin: 0; color: var(--muted); font-size: 13px; flex: 1 1 160px; }
main { flex: 1; overflow-y: auto; padding: 20px; }
#turns { max-width: 760px; margin: 0 auto; display: flex; flex-direction: column; gap: 12px; }
.turn { border: 1px solid var(--line); border-radius: 12px; padding: 10px 14px; background: var(--panel); white-space: pre-wrap;
  overflow-wrap: anywhere; align-self: flex-start; max-width: 92%; min-height: 24px; }
.turn.user { background: var(--own); align-self: flex-end; }
.turn.error { color: var(--wrong); }
.turn img, #pictures img { display: block; max-width: 100%; max-height: 220px; border-radius: 8px; margin: 2px 0 8px; }
.turn.waiting::after { content: "\\2026"; color: var(--muted); }
#empty { color: var(--muted); text-align: center; margin-top: 12vh; }
form { border-top: 1px solid var(--line); background: var(--panel); padding: 12px 20px; }
form > div { max-width: 760px; margin: 0 auto; display: flex; gap: 8px; align-items: flex-end; flex-wrap: wrap; }
#pictures { gap: 8px; padding-bottom: 10px; }
#pictures:empty { display: none; }
#pictures button { padding: 0; border: 0; background: none; height: auto; }
#pictures img { max-height: 64px; margin: 0; }
textarea { flex: 1 1 120px; min-width: 0; resize: none; font: inherit; color: inherit; background: var(--page);
  border: 1px solid var(--line); border-radius: 10px; padding: 9px 12px; height: 44px; }
button, .file { font: inherit; border: 1px solid var(--line); border-radius: 10px; background: var(--panel); color: inherit; height: 44px;
  padding: 0 14px; cursor: pointer; display: inline-flex; align-items: center; }
button.main { background: var(--accent); border-color: var(--accent); color: var(--page); }
button:focus-visible, textarea:focus-visible, .file:focus-within { outline: 2px solid var(--accent); outline-offset: 2px; }
.file input { position: absolute; opacity: 0; width: 1px; height: 1px; }
#key { height: 32px; border: 1px solid var(--line); border-radius: 8px; padding: 0 8px; background: var(--page); color: inherit; }
header button { height: 32px; }
@media print { html, body { height: auto; } main { overflow: visible; } form, header button { display: none; }
  .turn { break-inside: avoid; } }
"""

SCRIPT = """
const model = JSON.parse(document.getElementById("model").textContent);
const byId = id => document.getElementById(id);
const turns = byId("turns"), text = byId("text"), pictures = byId("pictures"), send = byId("send");
let messages = [], waiting = [], running = null;

function show(role, content) {
  byId("empty").hidden = true;
  const box = document.createElement("div");
  box.className = "turn " + role;
  for (const part of content) {
    if (part.type === "image_url") {
      const image = document.createElement("img");
      image.src = part.image_url.url; image.alt = "picture of the question";
      box.append(image);
    } else box.append(document.createTextNode(part.text));
  }
  turns.append(box);
  box.scrollIntoView({block: "end"});
  return box;
}

function attach(files) {
  for (const file of files) if (file.type.startsWith("image/")) {
    const reader = new FileReader();
    reader.onload = () => { waiting.push(reader.result); drawWaiting(); };
    reader.readAsDataURL(file);
  }
}

function drawWaiting() {
  pictures.replaceChildren(...waiting.map((address, place) => {
    const button = document.createElement("button"), image = document.createElement("img");
    button.type = "button"; button.title = "leave this picture out"; image.src = address; image.alt = "attached picture";
    button.append(image);
    button.onclick = () => { waiting.splice(place, 1); drawWaiting(); };
    return button;
  }));
}

async function ask() {
  const words = text.value.trim();
  if (running || (!words && !waiting.length)) return;
  const content = waiting.map(url => ({type: "image_url", image_url: {url}}));
  if (words) content.push({type: "text", text: words});
  const asked = {role: "user", content};
  messages.push(asked);
  show("user", content);
  text.value = ""; waiting = []; drawWaiting();
  const box = show("assistant waiting", []);
  running = new AbortController();
  send.textContent = "Stop";
  let answer = "";
  try {
    const headers = {"Content-Type": "application/json"};
    if (byId("key")) headers.Authorization = "Bearer " + byId("key").value;
    const body = JSON.stringify({model, messages, stream: true});
    const response = await fetch("/v1/chat/completions", {method: "POST", headers, body, signal: running.signal});
    if (!response.ok) throw new Error((await response.json()).error.message);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const {done, value} = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\\n");
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data: ") && line !== "data: [DONE]") {
        const event = JSON.parse(line.slice(6));
        if (event.error) throw new Error(event.error.message);
        answer += event.choices[0]?.delta.content ?? "";
        box.textContent = answer;
        box.scrollIntoView({block: "end"});
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      messages.pop();
      box.className = "turn error";
      box.textContent = error.message;
      return;
    }
  } finally {
    box.classList.remove("waiting");
    running = null;
    send.textContent = "Send";
  }
  messages.push({role: "assistant", content: answer});
  document.body.dataset.answers = String(messages.length / 2);
}

byId("form").addEventListener("submit", event => { event.preventDefault(); running ? running.abort() : ask(); });
text.addEventListener("keydown", event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); ask(); }
});
byId("file").addEventListener("change", event => { attach(event.target.files); event.target.value = ""; });
document.addEventListener("paste", event => attach(event.clipboardData.files));
document.addEventListener("dragover", event => event.preventDefault());
document.addEventListener("drop", event => { event.preventDefault(); attach(event.dataTransfer.files); });
byId("anew").addEventListener("click", () => {
  if (running) running.abort();
  messages = []; turns.replaceChildren(); byId("empty").hidden = false; text.focus();
});
"""


def page(name: str, nonce: str, asks_for_key: bool) -> str:
    """The page of the model `name`. `nonce` is that of the policy under which its script runs."""
    key = '<input id="key" type="password" placeholder="key" aria-label="key" autocomplete="off">' if asks_for_key else ""
    model = '"' + name.replace("\\", "\\\\").replace('"', '\\"').replace("<", "\\u003c") + '"'
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(name)} · Terrace</title>
<style>{STYLE}</style>
<header><h1>{escape(name)}</h1><p>one conversation at a time</p>{key}<button type="button" id="anew">New</button></header>
<main><p id="empty">Attach, paste or drop a picture, and ask.</p><div id="turns" aria-live="polite"></div></main>
<form id="form">
<div id="pictures"></div>
<div><label class="file">Picture<input id="file" type="file" accept="image/*" multiple></label>
<textarea id="text" placeholder="Ask something" aria-label="question" autofocus></textarea>
<button class="main" id="send">Send</button></div>
</form>
<script type="application/json" id="model" nonce="{nonce}">{model}</script>
<script nonce="{nonce}">{SCRIPT}</script>
</html>
"""
