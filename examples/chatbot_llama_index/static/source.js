// The panel beside the answer: one source, its tokens shaded by score and underlined where they were recomputed.

import { byId, count, element } from "./dom.js";

const STATUS = {
  hit: "from cache",
  miss: "was not cached",
  corrupt: "its cache was damaged",
  unused: "cache not used",
  remembered: "from this conversation",
};

let open = null; // {sources, number, opener}

export function sourceCounts(tokens) {
  if (!tokens) return "not recognised in the prompt";
  return `${STATUS[tokens.status] ?? tokens.status}, ${count(tokens.recomputed)} of ${count(tokens.tokens.length)} tokens recomputed`;
}

export function openSource(sources, number, buttons) {
  const wasOpen = open;
  open = { sources, number, buttons };
  wasOpen?.buttons[wasOpen.number].setAttribute("aria-expanded", "false");
  buttons[number].setAttribute("aria-expanded", "true");
  const source = sources[number];
  byId("source-title").textContent = `${number + 1}. ${source.file}`;
  byId("source-facts").textContent =
    `Part ${source.part} of ${source.parts}` + (source.tokens ? `, ${sourceCounts(source.tokens)}` : "");
  byId("legend").hidden = !source.tokens;
  const text = byId("source-text");
  text.replaceChildren(...(source.tokens ? drawn(source.tokens.tokens) : [source.text]));
  text.scrollTop = 0;
  byId("previous-source").disabled = number === 0;
  byId("next-source").disabled = number === sources.length - 1;
  byId("source").hidden = false;
  byId("layout").classList.add("with-source");
  byId("source-title").focus();
}

export function refreshSource(sources) {
  if (open?.sources === sources) openSource(sources, open.number, open.buttons);
}

// Tokens of one character come together: all but the last have no text.
function* characters(tokens) {
  let held = { shade: 0, recomputed: 0, score: null };
  for (const [text, shade, recomputed, score] of tokens) {
    held.shade = Math.max(held.shade, shade);
    held.recomputed |= recomputed;
    held.score = score === null ? held.score : Math.max(held.score ?? 0, score);
    if (text) {
      yield { text, ...held };
      held = { shade: 0, recomputed: 0, score: null };
    }
  }
}

function drawn(tokens) {
  return [...characters(tokens)].flatMap(({ text, shade, recomputed, score }) => {
    if (!shade && !recomputed) return text;
    const said = recomputed ? "recomputed" : "reused";
    const word = text.trimStart() || text; // most tokens begin with a space, which is drawn plain
    const span = element(recomputed ? "u" : "span", { textContent: word });
    span.className = [recomputed ? "r" : "", shade ? `s${shade}` : ""].join(" ").trim();
    span.title = score === null ? said : `${said}, score ${score.toPrecision(3)}`;
    return [text.slice(0, text.length - word.length), span];
  });
}

export function closeSource() {
  if (!open) return;
  const { buttons, number } = open;
  buttons[number].setAttribute("aria-expanded", "false");
  byId("source").hidden = true;
  byId("layout").classList.remove("with-source");
  open = null;
  if (buttons[number].isConnected) buttons[number].focus();
}

export function setUpSource() {
  byId("close-source").addEventListener("click", closeSource);
  byId("previous-source").addEventListener("click", () => openSource(open.sources, open.number - 1, open.buttons));
  byId("next-source").addEventListener("click", () => openSource(open.sources, open.number + 1, open.buttons));
}
