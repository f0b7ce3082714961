// The page: one conversation, its documents beside it.

import { ask, call } from "./api.js";
import { setUpDocuments, showListing } from "./documents.js";
import { announce, byId, count, element, seconds, show } from "./dom.js";
import { closeSource, openSource, refreshSource, setUpSource, sourceCounts } from "./source.js";

let session = sessionStorage.getItem("session");
let running = null; // AbortController of the answer that is being written
let ready = false;

const question = byId("question");
const send = byId("send");

function setRunning(controller) {
  running = controller;
  send.textContent = running ? "Stop" : "Ask";
  send.disabled = !ready;
}

function fit() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
}

function nearEnd() {
  const scroll = byId("scroll");
  return scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 120;
}

function follow(was) {
  if (was) byId("scroll").scrollTop = byId("scroll").scrollHeight;
}

function addTurn(asked) {
  byId("empty").hidden = true;
  const answer = element("div", { className: "answer" });
  const turn = element(
    "article",
    { className: "turn" },
    element("h2", { className: "visually-hidden", textContent: "Question" }),
    element("p", { className: "asked", textContent: asked }),
    element("h2", { className: "visually-hidden", textContent: "Answer" }),
    answer,
  );
  byId("turns").append(turn);
  return { turn, answer };
}

function showCall(turn, name, given) {
  const said = Object.values(given).map((value) => `“${value}”`).join(", ");
  const line = element("p", { className: "call small soft" }, element("strong", { textContent: name.replaceAll("_", " ") }), ` ${said}`);
  turn.querySelector(".answer").before(line);
  announce(`${name.replaceAll("_", " ")}: ${said}`);
}

function showSources(turn, sources) {
  turn.querySelector(".sources")?.remove();
  if (!sources.length) return [];
  const buttons = sources.map((source, number) => {
    const button = element(
      "button",
      { type: "button" },
      element("span", { className: "number", textContent: number + 1 }),
      element("span", { className: "file", textContent: source.file }),
      element("span", { className: "snippet", textContent: source.text.replace(/\s+/g, " ").slice(0, 200) }),
      element("span", { className: "counts soft", textContent: `part ${source.part} of ${source.parts}` }),
    );
    button.setAttribute("aria-expanded", "false");
    button.setAttribute("aria-controls", "source");
    button.addEventListener("click", () => openSource(sources, number, buttons));
    return button;
  });
  const list = element("ol", { className: "sources" }, ...buttons.map((button) => element("li", {}, button)));
  list.setAttribute("aria-label", "Sources of this answer");
  turn.append(list);
  return buttons;
}

function before(turn, made) {
  const list = turn.querySelector(".sources");
  if (list) list.before(made);
  else turn.append(made);
}

function showReport(turn, report) {
  const parts = [
    ["remembered", report.remembered_tokens, "of this conversation, not computed again"],
    ["reused", report.reused_tokens, "reused"],
    ["recomputed", report.recomputed_tokens, "recomputed"],
    ["fresh", report.fresh_tokens, "new"],
  ].filter(([, tokens]) => tokens > 0);
  const bar = element("div", { className: "reuse" });
  bar.setAttribute("aria-hidden", "true");
  const keys = element("ul", { className: "keys" });
  for (const [name, tokens, said] of parts) {
    const piece = element("i", { className: name });
    piece.style.flexGrow = tokens;
    bar.append(piece);
    keys.append(element("li", {}, element("i", { className: name }), `${count(tokens)} ${said}`));
  }
  const first = element("span", {}, "First token after ", element("strong", { textContent: seconds(report.timings_s.ttft) }));
  const prompt = element("span", { className: "soft", textContent: `${count(report.prompt_tokens)} prompt tokens` });
  const facts = element("div", { className: "facts" }, element("div", { className: "facts-line" }, first, prompt), bar, keys);
  turn.querySelector(".facts")?.remove(); // of the call before
  before(turn, facts);
}

function showComparison(turn, ours, full) {
  turn.querySelector(".comparison")?.remove();
  const box = element("div", { className: "comparison small" });
  if (full === null) {
    box.textContent = "Now the same prompt by full prefill…";
  } else {
    const times = full / ours;
    const verdict = times >= 1 ? `${times.toFixed(1)} times sooner than full prefill` : "Full prefill was sooner here";
    const rows = [["Reused caches", ours, "meter ours"], ["Full prefill", full, "meter"]];
    const list = element("dl");
    for (const [name, time, className] of rows) {
      const meter = element("div", { className });
      meter.style.width = `${(100 * time) / Math.max(ours, full)}%`;
      const track = element("dd", {}, meter);
      track.setAttribute("aria-hidden", "true");
      list.append(element("dt", { textContent: name }), track, element("dd", { textContent: seconds(time) }));
    }
    box.append(element("strong", { textContent: verdict }), list);
    announce(`${verdict}: ${seconds(ours)} against ${seconds(full)}.`);
  }
  before(turn, box);
}

async function submit(text) {
  show("problem", "");
  if (!text.trim()) {
    show("problem", "The question is empty. Write what you want to know.");
    question.focus();
    return;
  }
  const controller = new AbortController();
  setRunning(controller);
  closeSource();
  const { turn, answer } = addTurn(text.trim());
  answer.classList.add("busy");
  follow(true);
  announce("Answering");
  let sources = [];
  let buttons = [];
  let ours = 0;
  let isAccepted = false;
  try {
    const body = { question: text, session, compare: byId("compare").checked };
    for await (const event of ask(body, controller.signal)) {
      const was = nearEnd();
      if (event.type === "sources") {
        isAccepted = true;
        question.value = "";
        fit();
        session = event.session;
        sessionStorage.setItem("session", session);
        sources = event.sources;
        buttons = showSources(turn, sources);
      } else if (event.type === "call") {
        showCall(turn, event.name, event.arguments);
        if (answer.textContent) answer.textContent += "\n\n";
      } else if (event.type === "token") {
        answer.textContent += event.text;
      } else if (event.type === "report") {
        ours = event.report.timings_s.ttft;
        showReport(turn, event.report);
        event.sources.forEach((tokens, number) => {
          sources[number].tokens = tokens;
          buttons[number].querySelector(".counts").textContent = sourceCounts(tokens);
        });
        refreshSource(sources);
      } else if (event.type === "comparing") {
        answer.classList.remove("busy");
        showComparison(turn, ours, null);
      } else if (event.type === "comparison") {
        showComparison(turn, ours, event.ttft);
      } else if (event.type === "error") {
        throw new Error(event.error);
      }
      follow(was);
    }
    if (!answer.textContent.trim()) answer.textContent = "(The model gave an empty answer.)";
    announce(`Answer: ${answer.textContent.trim()}`);
  } catch (error) {
    if (error.name === "AbortError") {
      announce("Stopped");
      if (!answer.textContent) answer.textContent = "(Stopped.)";
    } else {
      show("problem", error.message === "Failed to fetch" ? "The server does not answer. Is it still running?" : error.message);
      if (!isAccepted) {
        turn.remove();
        byId("empty").hidden = byId("turns").children.length > 0;
      }
    }
    turn.querySelector(".comparison:not(:has(dl))")?.remove();
  } finally {
    answer.classList.remove("busy");
    setRunning(null);
  }
}

function setUpChat() {
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) running.abort();
    else if (ready) submit(question.value);
  });
  question.addEventListener("input", fit);
  question.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      if (!running && ready) submit(question.value);
    }
  });
  byId("new-chat").addEventListener("click", async () => {
    running?.abort();
    closeSource();
    if (session) call(`api/sessions/${encodeURIComponent(session)}`, { method: "DELETE" }).catch(() => {});
    session = null;
    sessionStorage.removeItem("session");
    byId("turns").replaceChildren();
    byId("empty").hidden = false;
    show("problem", "");
    question.focus();
  });
}

function setUpDrawer() {
  const drawer = byId("documents");
  const toggle = (isOpen) => {
    drawer.classList.toggle("open", isOpen);
    byId("backdrop").hidden = !isOpen;
    byId("open-documents").setAttribute("aria-expanded", String(isOpen));
    byId(isOpen ? "close-documents" : "open-documents").focus();
  };
  byId("open-documents").addEventListener("click", () => toggle(true));
  byId("close-documents").addEventListener("click", () => toggle(false));
  byId("backdrop").addEventListener("click", () => toggle(false));
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || byId("confirm").open) return;
    if (drawer.classList.contains("open")) toggle(false);
    else closeSource();
  });
}

function welcome(state) {
  byId("empty-title").textContent = "What would you like to know?";
  const share = `${Math.round(state.ratio * 100)}%`;
  byId("empty-text").textContent =
    `Answers come from ${state.documents.length === 1 ? "one document" : `${state.documents.length} documents`} on this ` +
    `machine. What the model has read before it does not read again: for each question it recomputes ${share} of the ` +
    "retrieved text and reuses the rest. Open a source to see which.";
  byId("suggestions").replaceChildren(
    ...state.suggestions.map((text) => {
      const button = element("button", { type: "button", textContent: text });
      button.addEventListener("click", () => !running && submit(text));
      return element("li", {}, button);
    }),
  );
  byId("model").textContent = state.model;
  if (state.notes.length) show("upload-problem", `Left out: ${state.notes.join(" ")}`);
}

async function restore() {
  if (!session) return;
  const messages = await call(`api/sessions/${encodeURIComponent(session)}`).catch(() => []);
  let last = null;
  for (const { role, text } of messages) {
    if (role === "user") last = addTurn(text);
    else if (last) last.answer.textContent = text;
  }
  follow(true);
}

async function start() {
  setRunning(null);
  for (;;) {
    const state = await call("api/state").catch((error) => ({ problem: error.message, phase: "" }));
    if (state.ready) {
      ready = true;
      setRunning(null);
      setUpDocuments(state);
      showListing(state);
      welcome(state);
      await restore();
      return;
    }
    byId("empty-text").textContent = state.phase ? `${state.phase}…` : "";
    show("problem", state.problem ?? "");
    await new Promise((resolve) => setTimeout(resolve, 700));
  }
}

setUpChat();
setUpSource();
setUpDrawer();
start();
