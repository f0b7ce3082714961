// The documents and what their caches take: add, delete, and see the difference.

import { call } from "./api.js";
import { announce, byId, bytes, chunks, element, show } from "./dom.js";

let totals = null;

export function showListing({ documents, caches }, said = "") {
  byId("document-list").replaceChildren(...documents.map(row));
  byId("no-documents").hidden = documents.length > 0;
  byId("totals").textContent = `${chunks(caches.chunks)}, ${bytes(caches.nbytes)}`;
  if (totals && said) {
    const [more, size] = [caches.chunks - totals.chunks, caches.nbytes - totals.nbytes];
    const sign = more < 0 || size < 0 ? "−" : "+";
    const change = more || size ? `${sign}${chunks(Math.abs(more))}, ${sign}${bytes(Math.abs(size))}` : "unchanged";
    show("change", `${said}: ${change}`);
    announce(`${said}. Caches: ${change}.`);
  }
  totals = caches;
}

function row(document) {
  const remove = element("button", { className: "icon", textContent: "✕", title: "Delete" });
  remove.setAttribute("aria-label", `Delete ${document.name}`);
  remove.addEventListener("click", () => ask(document));
  const facts = `${chunks(document.chunks)}, ${bytes(document.nbytes)}`;
  return element(
    "li",
    {},
    element(
      "div",
      {},
      element("span", { className: "name", textContent: document.name }),
      element("span", { className: "soft small", textContent: facts }),
    ),
    remove,
  );
}

function ask(document) {
  const dialog = byId("confirm");
  byId("confirm-title").textContent = `Delete ${document.name}?`;
  byId("confirm-text").textContent =
    `Its ${chunks(document.chunks)} and ${bytes(document.nbytes)} of KV caches go with it. ` +
    "The file itself stays where it is.";
  dialog.returnValue = "keep";
  dialog.onclose = () => dialog.returnValue === "delete" && remove(document);
  dialog.showModal();
}

async function remove(document) {
  show("upload-problem", "");
  try {
    showListing(await call(`api/documents/${encodeURIComponent(document.id)}`, { method: "DELETE" }), `Deleted ${document.name}`);
  } catch (error) {
    show("upload-problem", error.message);
  }
  byId("file").focus();
}

async function add(file, limit) {
  if (file.size > limit) {
    throw new Error(`“${file.name}” is larger than ${bytes(limit)}, which is the most this chat takes.`);
  }
  const waiting = element(
    "li",
    { className: "busy" },
    element(
      "div",
      {},
      element("span", { className: "name", textContent: file.name }),
      element("span", { className: "soft small", textContent: "computing its caches…" }),
    ),
  );
  byId("document-list").append(waiting);
  announce(`Adding ${file.name}`);
  const body = new FormData();
  body.append("file", file);
  try {
    showListing(await call("api/documents", { method: "POST", body }), `Added ${file.name}`);
  } finally {
    waiting.remove();
  }
}

export function setUpDocuments({ allowed, max_bytes: limit }) {
  const [input, zone] = [byId("file"), byId("upload")];
  input.accept = allowed.join(",");
  byId("upload-hint").textContent = `or drop it here: ${allowed.join(", ")}, up to ${bytes(limit)}`;
  const addAll = async (files) => {
    show("upload-problem", "");
    for (const file of files) {
      try {
        await add(file, limit);
      } catch (error) {
        show("upload-problem", error.message);
      }
    }
    input.value = "";
  };
  input.addEventListener("change", () => addAll([...input.files]));
  zone.addEventListener("dragover", (event) => {
    event.preventDefault();
    zone.classList.add("over");
  });
  zone.addEventListener("dragleave", () => zone.classList.remove("over"));
  zone.addEventListener("drop", (event) => {
    event.preventDefault();
    zone.classList.remove("over");
    addAll([...event.dataTransfer.files]);
  });
}
