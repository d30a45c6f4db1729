// The student in a browser. student.json, which web/export.py writes, says all that depends on the student.
//
//   prompt -> tokens -> text_encoder -> [ unet, Euler step ] x steps -> decoder -> canvas
//
import { Tokenizer, euler, generatorOf, guide, noise, timesOf } from "./student.js";

const $ = (id) => document.getElementById(id);
const PARTS = ["text_encoder", "unet", "decoder"];
const RUNTIMES = { WebGPU: ["ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify"],
                   WebAssembly: ["ort.wasm.min.mjs", "ort-wasm-simd-threaded"] };
// And student, tokenizers, ort, backend, lost.
export const state = { sessions: {}, firstLoad: {}, busy: "", note: "" };

// ----------------------------------------------------------------------------------------------------
// Files and networks

class Told extends Error {} // a sentence for the page
const CONNECTION = "broke off: check the connection and";
const broken = (what, advice) => new Told(`The download of ${what} ${CONNECTION} ${advice}.`);

// A file of the page, unpacked; kept for the next visit where the browser can (by https, or on this machine).
async function load(name, version) {
  const url = new URL(`${name}?v=${version}`, import.meta.url).href;
  const cache = await self.caches?.open("snapgen");
  try {
    const kept = await cache?.match(url), response = kept ?? await fetch(url);
    const copy = kept ? null : response.clone();
    if (!response.ok) throw new Error(`the server says ${response.status}`);
    const counted = new TransformStream({ transform(part, to) { arrived(part.length); to.enqueue(part); } });
    const unpacked = response.body.pipeThrough(counted).pipeThrough(new DecompressionStream("gzip"));
    const data = new Uint8Array(await new Response(unpacked).arrayBuffer());
    if (copy) await cache?.put(url, copy).catch(() => {}); // a full disk: it is loaded again next time
    return data;
  } catch (error) {
    throw broken(`${name} (${error.message})`, "tap Draw to try again");
  }
}

function arrived(bytes) {
  $("progress").value += bytes;
  const [now, all] = [$("progress").value, $("progress").max].map((n) => (n / 1e6).toFixed(1));
  if (state.busy === "loading") say(`Loading: ${now} of ${all} MB.`);
}

async function openRuntime(backend) {
  const [script, binary] = RUNTIMES[backend], version = state.student.runtime;
  const ort = await import(`./ort/${script}?v=${version}`).catch(() => {
    throw broken(script, "load the page again");
  });
  ort.env.wasm.numThreads = 1; // more need headers that few hosts send
  ort.env.wasm.wasmPaths = { mjs: new URL(`ort/${binary}.mjs?v=${version}`, import.meta.url).href };
  ort.env.wasm.wasmBinary = await load(`ort/${binary}.wasm.gz`, version);
  return ort;
}

async function openSession(part, backend) {
  const start = performance.now(), { file, hash } = state.student.files[part];
  // One provider at a time: with ["webgpu", "wasm"] nothing would tell which of them draws.
  const options = { executionProviders: [backend === "WebGPU" ? "webgpu" : "wasm"] };
  const session = await state.ort.InferenceSession.create(await load(file, hash), options);
  return [session, performance.now() - start];
}

async function openBackend(backend) {
  [state.ort, state.lost, state.backend] = [await openRuntime(backend), null, null];
  for (const part of PARTS) [state.sessions[part], state.firstLoad[part]] = await openSession(part, backend);
  state.backend = backend;
  if (backend === "WebGPU") watch(await state.ort.env.webgpu.device);
}

export function watch(device) {
  device?.lost?.then((info) => { state.lost = info.message || "no reason given"; });
}

async function open() {
  state.busy = "loading";
  const { student } = state, adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  const wanted = adapter ? "WebGPU" : "WebAssembly";
  Object.assign($("progress"), { hidden: false, value: 0, max: student.packed[wanted] });
  const { file, hash } = student.files.tokenizers;
  const tokenizers = JSON.parse(new TextDecoder().decode(await load(file, hash)));
  state.tokenizers = tokenizers.map((tokenizer) => new Tokenizer(tokenizer));
  await openBackend(wanted).catch((error) => adapter ? useWebAssembly(error.message) : Promise.reject(error));
  $("progress").hidden = true;
}

async function useWebAssembly(reason) {
  state.note = `The GPU cannot be used (${reason}), so WebAssembly draws.`;
  await openBackend("WebAssembly");
}

// ----------------------------------------------------------------------------------------------------
// One picture

// Milliseconds of every run, { text_encoder: [], unet: [], decoder: [] }; `show` gets each decoded picture.
export async function sample(prompt, seed, steps, every, show) {
  const { student, ort, sessions, tokenizers } = state, ms = { text_encoder: [], unet: [], decoder: [] };
  const shape = [1, student.latent_channels, student.side, student.side];
  const times = steps === student.steps ? student.times : timesOf(steps, student.shift);
  const tensor = (data, dims, type = "float32") => new ort.Tensor(type, data, dims);
  const run = async (part, feeds) => {
    const start = performance.now(), out = await sessions[part].run(feeds);
    ms[part].push(performance.now() - start);
    if (state.lost) throw new Error(`it was lost: ${state.lost}`);
    return out;
  };
  const read = (text) => {
    const length = student.tokens, ids = tokenizers.map((t) => tensor(t.padded(text, length), [1, length], "int32"));
    return run("text_encoder", { tokens: ids[0], tokens_2: ids[1] });
  };
  const text = await read(prompt), empty = student.guidance === 1 ? null : await read("");
  let x = noise(generatorOf(seed), shape.reduce((a, b) => a * b));
  for (let i = 0; i < steps; i++) {
    const [t, s] = [times[i], times[i + 1]], now = { latent: tensor(x, shape), t: tensor([t], [1]) };
    let v = (await run("unet", { ...now, ...text })).velocity.data;
    if (empty && t >= student.interval[0] && t <= student.interval[1]) {
      v = guide(v, (await run("unet", { ...now, ...empty })).velocity.data, student.guidance);
    }
    const predicted = euler(x, v, t, 0);
    x = euler(x, v, t, s);
    if (!every && i + 1 < steps) continue;
    show((await run("decoder", { latent: tensor(i + 1 < steps ? predicted : x, shape) })).picture, i + 1);
    if (i + 1 === steps) return ms;
    await new Promise((done) => { // lets the browser show it; setTimeout would wait for 4 ms
      const { port1, port2 } = new MessageChannel();
      [port1.onmessage, port2.onmessage] = [done, null];
      port2.postMessage(0);
    });
  }
}

function paint({ data, dims: [, , height, width] }) {
  const image = new ImageData(width, height), size = height * width;
  for (let i = 0; i < 4 * size; i++) image.data[i] = i % 4 === 3 ? 255 : data[(i % 4) * size + (i >> 2)];
  if ($("picture").width !== width || $("picture").height !== height) Object.assign($("picture"), { width, height });
  $("picture").getContext("2d").putImageData(image, 0, 0);
}

export async function draw() {
  if (state.busy) {
    state.note = `A tap while it was ${state.busy} has been left out.`;
    return;
  }
  if (!state.student) return start();
  try {
    if (!state.backend) await open();
    const { student } = state, prompt = $("prompt").value.trim();
    const seed = $("seed").value, steps = Number($("steps").value);
    if (!prompt) {
      throw new Told(`Type what you would like to see, such as “${student.examples[0] ?? "a photo of a cat"}”.`);
    }
    if (!/^\d+$/.test(seed) || !Number.isSafeInteger(Number(seed))) {
      throw new Told("The seed is a whole number, 0 or above: it picks the noise that a drawing begins with.");
    }
    state.busy = "drawing";
    const started = performance.now(), name = `“${prompt}”, seed ${seed}`;
    const once = () => sample(prompt, Number(seed), steps, $("every").checked, (picture, step) => {
      paint(picture);
      if (step < steps) say(`Drawing ${name}: step ${step} of ${steps}.`);
    });
    const ms = await once().catch(async (error) => {
      if (state.backend !== "WebGPU") throw error;
      await useWebAssembly(error.message);
      return once();
    });
    const all = performance.now() - started;
    $("picture").ariaLabel = `Picture of ${name}`;
    tell(ms, all);
    say(`${name}: ${Math.round(all)} ms with ${state.backend}. ${remarks(prompt)}`);
  } catch (error) {
    say(error instanceof Told ? error.message : `This could not be drawn: ${error.message}.`);
  } finally {
    [state.busy, state.note] = [false, ""];
  }
}

// ----------------------------------------------------------------------------------------------------
// What the page says

const median = (numbers) => [...numbers].sort((a, b) => a - b)[numbers.length >> 1];

function say(sentence) {
  $("status").textContent = `${sentence} ${state.note ?? ""}`.trim();
}

function remarks(prompt) {
  const { words, tokens } = state.student, said = [];
  const asked = words.length ? new Set(prompt.toLowerCase().match(/\p{L}+/gu)) : [];
  const unknown = [...asked].filter((word) => !words.includes(word));
  if (unknown.length) said.push(`Not among the words it has learned: ${unknown.join(", ")}. There it guesses.`);
  const read = state.tokenizers[0].encode(prompt).length + 2;
  if (read > tokens) said.push(`These are ${read} tokens, and it reads ${tokens}: the rest is not drawn.`);
  return said.join(" ");
}

function tell(ms, all) {
  for (const part of PARTS) {
    $(part).cells[1].textContent = median(ms[part]).toFixed(1);
    $(part).cells[2].textContent = Math.round(state.firstLoad[part]);
  }
  $("all").cells[1].textContent = Math.round(all);
}

// What `python latency.py --compare` reads: loads and predictions in milliseconds, as on a Mac.
export async function measure(predictions = 20, loads = 3) {
  const { student, backend } = state, parts = {}, all = { text_encoder: [], unet: [], decoder: [] };
  for (let i = 0; i < predictions; i++) {
    say(`Measuring: picture ${i + 1} of ${predictions}.`);
    const ms = await sample(student.examples[0] ?? "", i, student.steps, false, paint);
    PARTS.forEach((part) => all[part].push(...ms[part]));
  }
  for (const part of PARTS) {
    const again = [];
    for (let i = 0; i < loads; i++) {
      say(`Measuring: ${part}, load ${i + 1} of ${loads}.`);
      [state.sessions[part], again[i]] = await openSession(part, backend);
    }
    parts[part] = { [backend]: { first_load: state.firstLoad[part], load: median(again), load_samples: again,
                                 predict: median(all[part]), predict_samples: all[part] } };
  }
  const device = await navigator.userAgentData?.getHighEntropyValues(["model", "platformVersion"]);
  const system = /\(([^)]*)\)/.exec(navigator.userAgent)?.[1] ?? navigator.platform;
  return {
    device: device?.model || `${system}, ${navigator.hardwareConcurrency} cores`,
    os: device ? `${device.platform} ${device.platformVersion}`.trim() : system, browser: navigator.userAgent,
    backend, parts, plans: {}, stopped: null,
    packages: Object.fromEntries(PARTS.map((part) => [part, student.files[part].hash])),
    precision: "float32", nbits: 16, latent_sizes: [student.side], batch: 1, steps: student.steps,
    coremltools: `none (onnxruntime-web ${student.runtime})`, iterations: { predict: predictions, load: loads },
  };
}

async function saveReport() {
  if (state.busy || !state.backend) return draw();
  state.busy = "measuring";
  try {
    const file = new Blob([JSON.stringify(await measure(), null, 2)], { type: "application/json" });
    const link = document.createElement("a");
    Object.assign(link, { href: URL.createObjectURL(file), download: "browser.json" }).click();
    say("browser.json is saved: python latency.py --compare browser.json sets it beside the paper's numbers.");
  } catch (error) {
    say(`This could not be measured: ${error.message}.`);
  } finally {
    state.busy = false;
  }
}

async function start() {
  navigator.serviceWorker?.register("sw.js").catch(() => {}); // without it the page needs the network
  document.querySelector("form").addEventListener("submit", (event) => (event.preventDefault(), draw()));
  $("report").addEventListener("click", saveReport);
  try {
    state.student = await (await fetch("student.json")).json();
  } catch (error) {
    return say(broken("student.json", "tap Draw to try again").message);
  }
  const { student } = state, steps = [...new Set([1, 2, 4, 8, student.steps])].sort((a, b) => a - b);
  $("steps").append(...steps.map((n) => new Option(n, n, n === student.steps, n === student.steps)));
  $("about").textContent = student.about;
  for (const part of PARTS) $(part).cells[3].textContent = student.paper[part];
  $("examples").append(...student.examples.map((prompt) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: prompt });
    button.addEventListener("click", () => (state.busy || ($("prompt").value = prompt), draw()));
    return button;
  }));
  $("prompt").value = student.examples[0] ?? "";
  return $("prompt").value ? draw() : undefined;
}

start();
