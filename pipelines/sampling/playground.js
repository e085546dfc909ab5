"use strict";
// The playground: asks this server's own API and shows what comes. Whatever came from elsewhere is
// put on the page as text (textContent) or as a picture (a data: URI), never as markup.

const $ = (id) => document.getElementById(id);
const MOST_SEED = Number.MAX_SAFE_INTEGER;
const POOLS = [8, 16, 32, 64, 128, 256, 512];
const LONGEST_CARD_VALUE = 300;
let model = null; // its entry of /v1/models
let running = null; // the AbortController of the request under way

function element(tag, attributes = {}, ...children) {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(...children);
  return made;
}

const address = (path) => new URL(path, document.baseURI).href;

function headers() {
  const key = $("key").value.trim();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

// --- what is asked ------------------------------------------------------------------------------

function asked() {
  const request = { prompt: $("prompt").value.trim(), n: Number($("n").value) };
  const seed = $("seed").value.trim();
  if (seed) request.seed = Number(seed);
  if (Number($("temperature").value) !== 1) request.temperature = Number($("temperature").value);
  const pool = Number($("pool").value);
  if (pool) request.rerank_pool = Math.max(pool, request.n);
  return request;
}

function complaint(request) {
  if (!request.prompt) return ["prompt", "Say in a few words what shall be drawn."];
  const seed = $("seed").value.trim();
  if (seed && (!/^[0-9]+$/.test(seed) || Number(seed) > MOST_SEED))
    return ["seed", `The seed must be a whole number from 0 to ${MOST_SEED}, or empty.`];
  return null;
}

// --- code to copy -------------------------------------------------------------------------------

const shellQuoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function asCurl(request) {
  const key = $("key-field").hidden ? "" : " \\\n  -H \"Authorization: Bearer $MANRAY_KEY\"";
  return `curl ${address("v1/images/generations")}${key} \\\n  -H 'Content-Type: application/json'` +
    ` \\\n  -d ${shellQuoted(JSON.stringify(request))}`;
}

function asPython(request) {
  const { prompt, n, ...ours } = request;
  const key = $("key-field").hidden ? '"none"' : 'os.environ["MANRAY_KEY"]';
  const extra = Object.keys(ours).length ? `\n    extra_body=${JSON.stringify(ours)},` : "";
  return `import base64\n${$("key-field").hidden ? "" : "import os\n"}\nfrom openai import OpenAI\n
client = OpenAI(base_url=${JSON.stringify(address("v1"))}, api_key=${key})
answer = client.images.generate(
    prompt=${JSON.stringify(prompt)},
    n=${n},${extra}
)
for number, picture in enumerate(answer.data):
    with open(f"{number}.png", "wb") as file:
        file.write(base64.b64decode(picture.b64_json))`;
}

const SNIPPETS = { curl: asCurl, python: asPython };
let language = "curl";

function showCode() {
  $("snippet").textContent = SNIPPETS[language](asked());
}

async function copyCode(button) {
  language = button.dataset.copy;
  showCode();
  try {
    await navigator.clipboard.writeText($("snippet").textContent);
    $("status").textContent = "Copied.";
  } catch { // pages without TLS may not write to the clipboard
    getSelection().selectAllChildren($("snippet"));
    $("status").textContent = "Selected: copy it with Ctrl+C.";
  }
}

// --- what came ----------------------------------------------------------------------------------

function say(text) {
  $("status").textContent = text;
}

function sayError(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

async function refusal(answer) {
  let error = {};
  try {
    error = (await answer.json()).error || {};
  } catch { /* not from us: a proxy's page */ }
  if (answer.status === 401) {
    $("key-field").hidden = false;
    $("key").focus();
    return $("key").value ? "This key is not valid." : "This server asks for a key.";
  }
  const later = answer.headers.get("retry-after");
  const when = answer.status === 429 && later ? ` Try again in ${later} s.` : "";
  return `${error.message || `The server answered ${answer.status}.`}${when}`;
}

function blankPicture(number) {
  const frame = element("div", { className: "frame busy" });
  const below = element("div", { className: "below" }, "waiting");
  const item = element("li", {}, frame, below);
  item.dataset.number = number;
  return item;
}

function showRows(item, source, share, words) {
  let picture = item.querySelector("img");
  if (!picture) {
    picture = element("img", { alt: $("asked").textContent });
    picture.classList.toggle("sharp", parseInt(model?.manray?.size, 10) <= 128);
    picture.style.clipPath = "inset(0 0 100% 0)";
    item.firstChild.append(picture);
    picture.getBoundingClientRect(); // so that there is something to move from
  }
  picture.src = source;
  picture.style.clipPath = `inset(0 0 ${(100 * (1 - share)).toFixed(2)}% 0)`;
  item.lastChild.replaceChildren(words);
}

function showPartial(event) {
  const item = $("pictures").children[event.index];
  if (!item) return;
  const grid = Math.round(Math.sqrt(model?.manray?.image_tokens || 1024));
  item.dataset.seed = event.seed;
  showRows(item, sourceOf(event), event.rows / grid, `${event.rows} of ${grid} rows`);
}

function showFinished(events, ranked) {
  const drawn = new Map([...$("pictures").children].map((item) => [item.dataset.seed, item]));
  const items = events.map((event, rank) => {
    const item = drawn.get(String(event.seed)) || blankPicture(rank);
    showRows(item, sourceOf(event), 1, "");
    item.firstChild.classList.remove("busy");
    item.classList.toggle("best", ranked && rank === 0 && events.length > 1);
    const again = element("button", { type: "button", title: "Use this seed" }, `seed ${event.seed}`);
    again.addEventListener("click", () => {
      $("seed").value = event.seed;
      $("n").value = 1;
      changed();
      $("seed").focus();
    });
    const save = element("a", { href: sourceOf(event), download: `${event.seed}.png` }, "save");
    const score = event.score === null ? [] : [element("strong", {}, `#${rank + 1}`),
      element("span", { title: "The reranker's score" }, event.score.toFixed(3))];
    item.lastChild.replaceChildren(...score, again, save);
    return item;
  });
  $("pictures").replaceChildren(...items);
}

const sourceOf = (event) => `data:image/png;base64,${event.b64_json}`;

// Server-sent events of a POST: EventSource can only GET.
async function* eventsOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
      const line = text.slice(0, end).split("\n").find((row) => row.startsWith("data: "));
      if (line) yield JSON.parse(line.slice(6));
    }
  }
}

async function draw(request) {
  const answer = await fetch(address("v1/images/generations"), {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers() },
    body: JSON.stringify({ ...request, stream: true, partial_images: 3 }),
    signal: running.signal,
  });
  if (!answer.ok) throw new Error(await refusal(answer));
  const finished = [];
  for await (const event of eventsOf(answer)) {
    if (event.error) throw new Error(event.error.message);
    if (event.type.endsWith(".partial_image")) showPartial(event);
    if (event.type.endsWith(".completed")) finished.push(event);
  }
  if (finished.length < request.n) throw new Error("The connection broke before all was drawn.");
  showFinished(finished, Boolean(request.rerank_pool));
}

async function submit() {
  if (running) return;
  const request = asked();
  const wrong = complaint(request);
  sayError(wrong ? wrong[1] : "");
  if (wrong) return $(wrong[0]).focus();
  running = new AbortController();
  begin(request);
  const started = performance.now();
  try {
    await draw(request);
    say(`Drawn in ${((performance.now() - started) / 1000).toFixed(1)} s.`);
  } catch (error) {
    const stopped = error.name === "AbortError";
    say(stopped ? "Stopped." : "");
    if (!stopped) sayError(error instanceof TypeError ? "The server cannot be reached." : error.message);
    for (const item of [...$("pictures").children]) if (!item.querySelector("img")) item.remove();
    for (const frame of document.querySelectorAll(".busy")) frame.classList.remove("busy");
    $("empty").hidden = $("pictures").children.length > 0;
    $("asked").hidden = !$("empty").hidden;
  } finally {
    running = null;
    end();
  }
}

function begin(request) {
  const pool = request.rerank_pool ? `, best of ${request.rerank_pool}` : "";
  say(`Drawing${pool} …`);
  $("empty").hidden = true;
  $("asked").textContent = request.prompt;
  $("asked").hidden = false;
  $("pictures").className = request.n === 1 ? "one" : "";
  $("pictures").replaceChildren(...Array.from({ length: request.n }, (_, number) => blankPicture(number)));
  $("pictures").setAttribute("aria-busy", "true");
  $("draw").disabled = true;
  $("stop").hidden = false;
  if (matchMedia("(max-width: 800px)").matches) $("asked").scrollIntoView({ block: "start" });
}

function end() {
  $("pictures").setAttribute("aria-busy", "false");
  $("draw").disabled = false;
  $("stop").hidden = true;
}

// --- the model ----------------------------------------------------------------------------------

async function meet() {
  try {
    const answer = await fetch(address("v1/models"), { headers: headers() });
    if (!answer.ok) return sayError(await refusal(answer));
    model = (await answer.json()).data[0];
  } catch {
    return sayError("The server cannot be reached.");
  }
  const { about = {}, size, largest_pool: pool } = model.manray;
  $("model").textContent = `${model.id} · ${size.replace("x", "×")} pixels`;
  $("pool-field").hidden = !pool;
  const pools = POOLS.filter((count) => count <= pool);
  const options = [0, ...pools].map((count) =>
    element("option", { value: count }, count ? `${count} candidates` : "no ranking"));
  $("pool").replaceChildren(...options);
  $("about").replaceChildren(...Object.entries(about).flatMap(([name, value]) =>
    [element("dt", {}, name), element("dd", {}, String(value).slice(0, LONGEST_CARD_VALUE))]));
  showCode();
}

function changed() {
  $("n-shown").textContent = $("n").value;
  $("temperature-shown").textContent = Number($("temperature").value).toFixed(2);
  showCode();
}

$("ask").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
$("ask").addEventListener("input", changed);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); submit(); }
});
$("stop").addEventListener("click", () => running?.abort());
$("key").addEventListener("change", () => { sayError(""); meet(); });
for (const button of document.querySelectorAll("[data-copy]"))
  button.addEventListener("click", () => copyCode(button));
changed();
meet();
