// A dialogue with the run: persona, messages, the prompt that answered, all prompts side by side.
// Texts are only ever set as text: nothing that a model or a person writes becomes markup.

import { hue, scoreChart } from "/scores.js";

const $ = (id) => document.getElementById(id);
const turns = []; // {role, content} of what was said and answered
let key = "", prompts = 0, running = null;

function element(name, classes, text) {
  const made = document.createElement(name);
  if (classes) made.className = classes;
  if (text !== undefined) made.textContent = text;
  return made;
}

async function request(path, options = {}) {
  const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  const error = new Error(told?.error?.message ?? `the server answered ${response.status}`);
  error.status = response.status;
  throw error;
}

// --- who answers ---------------------------------------------------------------------------------

function choice(value, label, classes) {
  const wrapped = element("label", `choice ${classes}`);
  const radio = element("input");
  Object.assign(radio, { type: "radio", name: "prompt", value, checked: value === "auto" });
  wrapped.append(radio, element("span", "", label));
  return wrapped;
}

async function open() {
  try {
    const model = (await (await request("/v1/models")).json()).data[0];
    prompts = model.spt.prompts;
    $("model").textContent = document.title = model.id;
    $("facts").textContent = `${prompts} prompt${prompts === 1 ? "" : "s"}`;
    $("facts").title = `generate.mode: ${model.spt.mode}`;
    $("choices").replaceChildren(choice("auto", "Retriever", "wide"));
    for (let k = 0; k < prompts; k++) $("choices").append(choice(String(k), `${k}`, hue(k)));
    if (prompts > 1) $("choices").append(choice("all", "Compare all", "wide"));
    $("limit").max = model.spt.max_tokens;
    $("limit").value = model.spt.default_max_tokens;
    showLimit();
    if (!$("unlock").hidden) {
      $("unlock").hidden = true;
      fresh();
    }
  } catch (error) {
    if (error.status !== 401) return note(error.message);
    if (key) note("That is not the key.");
    $("unlock").hidden = false;
    $("key").select();
  }
}

function showLimit() {
  $("limit-shown").textContent = $("limit").value;
}

// --- the dialogue on the page --------------------------------------------------------------------

function put(...nodes) {
  $("empty").hidden = true;
  $("log").append(...nodes);
  $("log").scrollTop = $("log").scrollHeight;
}

function note(text) {
  put(element("p", "note", text));
}

// A reply that grows: a bubble, and below it who wrote it.
class Bubble {
  constructor(parent) {
    this.node = element("article", "reply growing");
    this.text = element("p", "text");
    this.foot = element("footer");
    this.node.append(this.text, this.foot);
    parent.append(this.node);
  }

  chosen({ prompt, scores }) {
    this.node.classList.add(hue(prompt));
    const who = prompt === null ? "all prompts" : `prompt ${prompt}`;
    this.foot.replaceChildren(element("span", "who", who), scoreChart(scores, prompt));
    this.scores = scores;
  }

  add(piece) {
    this.text.textContent += piece;
    $("log").scrollTop = $("log").scrollHeight;
  }

  end(state) {
    this.node.classList.remove("growing");
    if (state) this.foot.append(element("span", "state", state));
  }
}

// --- asking --------------------------------------------------------------------------------------

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: {")) yield JSON.parse(part.slice(6));
    }
  }
}

async function answer(bubble, prompt, signal) {
  const persona = $("persona").value.split("\n").filter((line) => line.trim());
  const asked = { messages: turns, persona, stream: true, max_tokens: Number($("limit").value) };
  if (prompt !== null) asked.prompt_index = prompt;
  const response = await request("/v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(asked),
    signal,
  });
  let finish = null, dropped = 0;
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    if (event.spt) {
      bubble.chosen(event.spt);
      dropped = event.spt.dropped_turns ?? dropped;
    }
    const [said] = event.choices;
    if (said?.delta.content) bubble.add(said.delta.content);
    finish = said?.finish_reason ?? finish;
  }
  const cut = finish === "length" ? "cut at the limit" : "";
  bubble.end([cut, dropped ? `oldest ${dropped} turns no longer fit` : ""].filter(Boolean).join("; "));
  return bubble.text.textContent;
}

async function say(message) {
  const picked = document.querySelector("input[name=prompt]:checked")?.value ?? "auto";
  running = new AbortController();
  document.body.classList.add("busy");
  $("send").textContent = "Stop";
  turns.push({ role: "user", content: message });
  put(element("article", "said", message));
  const group = element("div", picked === "all" ? "replies many" : "replies");
  put(group);
  const forced = picked === "auto" ? [null] : picked === "all" ? [...Array(prompts).keys()] : [Number(picked)];
  const bubbles = forced.map(() => new Bubble(group));
  const given = await Promise.allSettled(
    forced.map((prompt, place) => answer(bubbles[place], prompt, running.signal)),
  );
  given.forEach(({ reason }, place) => reason && bubbles[place].end(
    reason.name === "AbortError" ? "stopped" : reason.message));
  const texts = given.map(({ value }) => value);
  if (picked === "all" && texts.every((text) => text !== undefined)) compare(bubbles, texts);
  else if (texts[0]) turns.push({ role: "assistant", content: texts[0] });
  else takeBack(message);
  document.body.classList.remove("busy");
  $("send").textContent = "Send";
  running = null;
  $("log").scrollTop = $("log").scrollHeight;
}

// A message without an answer cannot be followed by another: it goes back into the field.
function takeBack(message) {
  turns.pop();
  if (!$("message").value) $("message").value = message;
  note("No reply: the message is back in its field.");
}

// All replies stand side by side; the dialogue follows the one of the best score, or who is picked.
function compare(bubbles, texts) {
  const place = turns.length;
  const scores = bubbles[0].scores;
  const best = scores.indexOf(Math.max(...scores));
  const picks = bubbles.map((bubble, k) => {
    const pick = element("button", "pick");
    pick.type = "button";
    pick.addEventListener("click", () => follow(k));
    bubble.foot.append(pick);
    return pick;
  });
  const follow = (k) => {
    turns[place] = { role: "assistant", content: texts[k] || "..." };
    bubbles.forEach((bubble, n) => {
      bubble.node.classList.toggle("followed", n === k);
      picks[n].textContent = n === k ? "in the dialogue" : "take this one";
      picks[n].setAttribute("aria-pressed", n === k);
      // Later turns have answered to the one that was there.
      picks[n].disabled = turns.length > place + 1;
    });
  };
  follow(best);
  bubbles[best].node.classList.add("best");
}

// --- hands on the keyboard -----------------------------------------------------------------------

function grow() {
  $("message").rows = Math.min(8, $("message").value.split("\n").length);
}

function fresh() {
  running?.abort();
  turns.length = 0;
  $("log").replaceChildren($("empty"));
  $("empty").hidden = false;
  $("message").focus();
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const message = $("message").value.trim();
  if (running) return running.abort();
  if (!message) return;
  document.querySelectorAll(".pick").forEach((pick) => (pick.disabled = true));
  $("message").value = "";
  grow();
  say(message);
});
$("message").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!running) $("composer").requestSubmit();
});
$("message").addEventListener("input", grow);
$("limit").addEventListener("input", showLimit);
$("fresh").addEventListener("click", fresh);
$("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value;
  open();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (!event.altKey) return;
  if (event.code === "KeyN") fresh();
  if (event.code === "KeyP") {
    $("settings").open = true;
    $("persona").focus();
  }
});
if (matchMedia("(max-width: 760px)").matches) $("settings").open = false;
open();
