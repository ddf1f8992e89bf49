// One answer of one model, written into a place as it arrives.

export async function answer(settings, place, signal) {
  try {
    for await (const chunk of chunks(settings, signal)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const choice = chunk.choices?.[0];
      place.textContent += choice?.delta?.reasoning_content ?? "";
      place.textContent += choice?.delta?.content ?? choice?.text ?? "";
    }
    if (place.textContent === "") place.textContent = "(no text)";
  } catch (error) {
    const stopped = error.name === "AbortError";
    const line = document.createElement("span");
    line.className = "error";
    line.textContent = stopped ? " (stopped)" : error.message;
    place.append(line);
  }
}

async function* chunks({ model, prompt, temperature, max_tokens, plain }, signal) {
  const asked = plain ? { prompt } : { messages: [{ role: "user", content: prompt }] };
  const response = await fetch(plain ? "/ui/completions" : "/ui/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ model, temperature, max_tokens, stream: true, ...asked }),
    signal,
  });
  if (!response.ok) {
    const told = await response.json().catch(() => ({}));
    throw new Error(told.error?.message ?? told.error ?? `status ${response.status}`);
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}
