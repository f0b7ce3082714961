// Talking to the server: JSON, and answers as server-sent events read from a POST.

export class Refused extends Error {}

async function refusal(response) {
  try {
    return new Refused((await response.json()).error);
  } catch {
    return new Refused(`The server answered with status ${response.status}.`);
  }
}

export async function call(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Refused("The server does not answer. Is it still running?");
  }
  if (!response.ok) throw await refusal(response);
  return response.json();
}

export async function* ask(body, signal) {
  const headers = { "Content-Type": "application/json" };
  const response = await fetch("api/chat", { method: "POST", headers, body: JSON.stringify(body), signal });
  if (!response.ok) throw await refusal(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const messages = rest.split("\n\n");
    rest = messages.pop();
    for (const message of messages) yield JSON.parse(message.slice("data: ".length));
  }
}
