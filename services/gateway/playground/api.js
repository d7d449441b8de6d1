// The gateway's API, asked as any client asks it: streams of /v1/chat/completions, and errors in OpenAI's form.

export class ApiError extends Error {
  constructor(message, { status = 0, code = "", param = "", retryAfterS = null } = {}) {
    super(message);
    Object.assign(this, { status, code, param, retryAfterS });
  }
}

async function send(path, key, options) {
  const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    const offline = navigator.onLine === false;
    throw new ApiError(offline ? "This device is offline." : "The gateway cannot be reached.", { code: "unreachable" });
  }
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => ({}));
  throw refusal(said.error, answer);
}

function refusal(error = {}, answer = null) {
  const wait = Number(answer?.headers.get("retry-after-ms")) / 1000 || Number(answer?.headers.get("retry-after")) || null;
  return new ApiError(error.message || `The gateway answered ${answer?.status ?? "with an error"}.`, {
    status: answer?.status ?? 0,
    code: error.code ?? "",
    param: error.param ?? "",
    retryAfterS: wait,
  });
}

/** The models served. */
export async function models(key, signal) {
  return (await (await send("/v1/models", key, { signal })).json()).data;
}

/** What this page may offer, by its operator's settings. */
export async function setup() {
  return (await send("/playground/setup.json", "", {})).json();
}

async function* events(answer, signal) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let ended = false;
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (signal.aborted) throw error;
      throw new ApiError("The connection broke before the answer had ended.", { code: "cut_off" });
    }
    if (part.done && ended) return;
    if (part.done) throw new ApiError("The answer broke off.", { code: "cut_off" });
    const blocks = (rest + part.value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.startsWith("data: ") ? block.slice("data: ".length) : "";
      if (data === "[DONE]") ended = true;
      else if (data) yield JSON.parse(data);
    }
  }
}

/**
 * One answer. Calls `changed` whenever more of it is there; resolves to the run, whose `error` says what went
 * wrong, if something did. Rejects when it was aborted.
 */
export async function ask(body, key, signal, run, changed) {
  const began = performance.now();
  const since = () => performance.now() - began;
  Object.assign(run, { text: "", pruning: null, usage: null, timings: {}, firstMs: null, totalMs: null, error: null, state: "asking" });
  changed(run);
  try {
    const answer = await send("/v1/chat/completions", key, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
      signal,
    });
    for await (const event of events(answer, signal)) {
      if (event.error) throw refusal(event.error);
      if (event.pruning?.images) run.pruning = event.pruning;
      if (event.pruning?.timings_ms) run.timings = event.pruning.timings_ms;
      if (event.usage) run.usage = event.usage;
      const text = event.choices?.[0]?.delta?.content;
      if (text) {
        run.firstMs ??= since();
        run.text += text;
      }
      run.finish = event.choices?.[0]?.finish_reason ?? run.finish;
      changed(run);
    }
    run.totalMs = since();
    run.state = "done";
  } catch (error) {
    if (signal.aborted) {
      run.state = "cancelled";
      changed(run);
      throw error;
    }
    run.error = error instanceof ApiError ? error : new ApiError(String(error.message ?? error));
    run.state = "failed";
  }
  changed(run);
  return run;
}
