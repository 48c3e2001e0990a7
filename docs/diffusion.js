// Sampling in the browser from a network that export.py wrote:
// 1. the diffusion process, as in src/diffusion.py and src/samplers.py, with the same letters;
// 2. the worker, in which the network runs, so that the page never freezes; it loads this same file;
// 3. the page.
// Images are Float32Arrays of all pixels (B × C × H × W) in [-1, 1]. t counts from 0; t = -1 is the clean image.

// ---- 1. The diffusion process ------------------------------------------------------------------------------

const roundHalfToEven = (x) => (Math.abs(x % 1) === 0.5 ? 2 * Math.round(x / 2) : Math.round(x)); // as Python does

/** The (t, s) pairs of some steps from noise to image, as `time_grid` in src/samplers.py, which explains the rest. */
export function timeGrid(T, steps, strength = 1, power = 1) {
  const start = roundHalfToEven(T * strength) - 1;
  const count = Math.min(Math.max(1, roundHalfToEven(steps * strength)), start + 1);
  const time = (left) => roundHalfToEven(Math.max(((start + 1) * left ** power) / count ** power, left) - 1);
  return Array.from({ length: count }, (_, i) => [time(count - i), time(count - i - 1)]);
}

/** Combine arrays pixel by pixel: f of their values. */
const pixels = (f, ...arrays) => arrays[0].map((_, i) => f(...arrays.map((a) => a[i])));

/** Put arrays one after the other: images into a batch. */
function join(arrays) {
  const whole = new Float32Array(arrays.reduce((sum, a) => sum + a.length, 0));
  arrays.reduce((start, a) => (whole.set(a, start), start + a.length), 0);
  return whole;
}

/** A noise schedule α̅ and what follows from it; `predict(x_t, t)` is the network's output, an array like x_t. */
class Diffusion {
  constructor({ alpha_bar, time_steps, prediction }) {
    Object.assign(this, { T: time_steps, prediction, alphaBar: (t) => (t < 0 ? 1 : alpha_bar[t]) });
  }

  /** √α̅ and √(1 - α̅), the factors of x_0 and eps in x_t. */
  signalAndNoise(t) {
    return [Math.sqrt(this.alphaBar(t)), Math.sqrt(1 - this.alphaBar(t))];
  }

  /** x_t ~ q(x_t | x_0), Ho et al. 2020, eq. 4. */
  qSample(x0, t, eps) {
    const [signal, noise] = this.signalAndNoise(t);
    return pixels((x, e) => signal * x + noise * e, x0, eps);
  }

  /** The network's estimate of x_0, clipped to [-1, 1]. */
  async denoise(predict, x_t, t) {
    const [signal, noise] = this.signalAndNoise(t);
    const formula = {
      noise: (x, output) => (x - noise * output) / signal,
      v: (x, output) => signal * x - noise * output,
      x0: (x, output) => output,
    }[this.prediction];
    return pixels((x, o) => Math.min(1, Math.max(-1, formula(x, o))), x_t, await predict(x_t, t));
  }

  halfLogSNR(t) {
    return Math.log(this.alphaBar(t) / (1 - this.alphaBar(t))) / 2; // λ_t; infinite for the clean image
  }

  /** x_s ~ q(x_s | x_t, x_0), Ho et al. 2020, eq. 7, for any s < t. */
  posterior(x0, x_t, t, s, eps) {
    const [a, b] = [this.alphaBar(t), this.alphaBar(s)], alpha = a / b;
    const fromX0 = (Math.sqrt(b) * (1 - alpha)) / (1 - a), fromXt = (Math.sqrt(alpha) * (1 - b)) / (1 - a);
    const deviation = Math.sqrt(((1 - b) / (1 - a)) * (1 - alpha));
    return pixels((x, y, e) => fromX0 * x + fromXt * y + deviation * e, x0, x_t, eps);
  }
}

/** Samplers: each yields x_t after every step. noise[0] is x_T, noise[1] the fresh noise of the first step ... */
const SAMPLERS = {
  __proto__: null,

  /** Consistency sampling (Song et al. 2023, Algorithm 1). */
  async *consistency(diffusion, predict, x_t, noise, grid) {
    for (const [i, [t, s]] of grid.entries()) {
      x_t = await diffusion.denoise(predict, x_t, t);
      if (s >= 0) x_t = diffusion.qSample(x_t, s, noise[i + 1]);
      yield x_t;
    }
  },

  /** SDE-DPM-Solver++(2M) (Lu et al. 2022): the posterior of x_0 extrapolated to the middle of the step. */
  async *dpmpp_2m_sde(diffusion, predict, x_t, noise, grid) {
    let previous = null;
    for (const [i, [t, s]] of grid.entries()) {
      const x0 = await diffusion.denoise(predict, x_t, t);
      const h = diffusion.halfLogSNR(s) - diffusion.halfLogSNR(t);
      const factor = previous && s >= 0 ? h / (2 * previous.h) : 0;
      const D = previous ? pixels((x, y) => x + factor * (x - y), x0, previous.x0) : x0;
      x_t = diffusion.posterior(D, x_t, t, s, noise[i + 1] ?? noise[0]); // the last step has deviation 0
      previous = { x0, h };
      yield x_t;
    }
  },
};

/** N(0, I) noise from a seed: mulberry32 for uniform numbers, and Box & Muller 1958. */
export function gaussian(seed, length) {
  let state = Math.imul(seed + 1, 0x9e3779b1) >>> 0; // neighbouring seeds begin far from each other
  const uniform = () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let z = Math.imul(state ^ (state >>> 15), state | 1);
    z ^= z + Math.imul(z ^ (z >>> 7), z | 61);
    return (((z ^ (z >>> 14)) >>> 0) + 0.5) / 2 ** 32;
  };
  return Float32Array.from({ length }, () => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform()));
}

/** Spherical interpolation from a (weight 0) to b (weight 1): a straight line would leave the sphere of noises. */
export function slerp(a, b, weight) {
  const dot = (u, v) => u.reduce((sum, value, i) => sum + value * v[i], 0);
  const angle = Math.acos(dot(a, b) / Math.sqrt(dot(a, a) * dot(b, b)));
  const [p, q] = [Math.sin((1 - weight) * angle), Math.sin(weight * angle)].map((x) => x / Math.sin(angle));
  return pixels((x, y) => p * x + q * y, a, b);
}

// ---- 2. The worker -----------------------------------------------------------------------------------------

const RUNTIME = "https://cdn.jsdelivr.net/npm/onnxruntime-web@1.30.0/dist/"; // with the hash of each file
const FILES = {
  webgpu: {
    "ort.webgpu.bundle.min.mjs": "sha384-1ntMeyj+z5diX6vBR5h+zlJBPc4iNvhCxE6nlammh8daBYcLBZkzrwDkuJjhwI+f",
    "ort-wasm-simd-threaded.asyncify.wasm": "sha384-EPVDLTxuO663dkZO/pcKJF6vOyyfq/5z9FY1oksN0UWFX2ABH4wDDZQHeNoUleWR",
  },
  wasm: {
    "ort.wasm.bundle.min.mjs": "sha384-PLWz+nHEVHpjwBsO0YVdvQj6n5814Iv8E3b8FG0Rp/uIAtjFMCKOpP66iPzedrIG",
    "ort-wasm-simd-threaded.wasm": "sha384-vjBJ1z7qrhkTyYsNqKeF6c7N+nOJSU94czEo+tvZcu8G75JparGq9kB+kTnEUNVM",
  },
};

/** ONNX Runtime Web, for the graphics card or as WebAssembly. */
async function loadRuntime(backend) {
  const [script, binary] = await Promise.all(
    Object.entries(FILES[backend]).map(async ([name, integrity]) => {
      const answer = await fetch(RUNTIME + name, { integrity }).catch(() => null);
      if (!answer?.ok) throw new Error(`ONNX Runtime was not found at ${RUNTIME}, or is not the expected file: check the internet connection.`);
      return answer.arrayBuffer();
    }),
  );
  const ort = await import(URL.createObjectURL(new Blob([script], { type: "text/javascript" })));
  ort.env.wasm.wasmBinary = binary;
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
  return ort;
}

/** What export.py wrote into the file's metadata: field 14 of a protocol buffer, which is a list of fields. */
function readMetadata(bytes) {
  function* fields(start, end) {
    const varint = () => {
      let value = 0;
      for (let factor = 1, byte = 128; byte >= 128; factor *= 128) value += ((byte = bytes[start++]) & 127) * factor;
      return value;
    };
    while (start < end) {
      const [tag, size] = [varint(), varint()]; // wire type 0: the number itself; wire type 2: so many bytes follow
      if (tag % 8 === 2) yield [Math.floor(tag / 8), start, (start += size)];
    }
  }
  const settings = {};
  try {
    for (const [field, start, end] of fields(0, bytes.length)) {
      if (field !== 14) continue;
      const texts = [...fields(start, end)].map(([, from, to]) => new TextDecoder().decode(bytes.slice(from, to)));
      settings[texts[0]] = JSON.parse(texts[1]);
    }
  } catch {
    return {}; // another kind of file
  }
  return settings;
}

const runtimes = {}; // backend → its runtime, once it was needed

async function loadModel({ url, bytes }, previous) {
  if (typeof WebAssembly !== "object") throw new Error("This browser has no WebAssembly, which the page needs.");
  if (!bytes) {
    const answer = await fetch(url);
    if (!answer.ok) throw new Error(`${url} is not there (${answer.status}). Make it with python export.py.`);
    bytes = await answer.arrayBuffer();
  }
  const damaged = () => new Error(`${url} is no network that export.py wrote, or is damaged.`);
  const settings = readMetadata(new Uint8Array(bytes));
  if (!(settings.sampler in SAMPLERS && settings.alpha_bar.length === settings.time_steps)) throw damaged();
  const trial = { noise: [new Float32Array(settings.channels * settings.image_size ** 2)], labels: [0], steps: 1 };
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  let failure;
  for (const backend of adapter ? ["webgpu", "wasm"] : ["wasm"]) {
    try {
      const ort = await (runtimes[backend] ??= loadRuntime(backend));
      const create = ort.InferenceSession.create(bytes, { executionProviders: [backend] });
      const session = await create.catch(() => Promise.reject(damaged()));
      const model = { ort, session, settings: { ...settings, backend, threads: ort.env.wasm.numThreads } };
      await sample(model, { ...trial, guidance: 1 }, () => {}); // a graphics card may fail only now
      await previous?.session.release(); // not before: if the new model fails, the old one stays
      return model;
    } catch (error) {
      failure = error;
    }
  }
  throw failure;
}

/** Sample images. labels: class of each (none: classes.length); image, strength: SDEdit, as in src/generation.py. */
async function sample({ ort, session, settings }, { noise, labels, steps, guidance, image, strength = 1 }, onStep) {
  const { channels, image_size: side, classes } = settings;
  const run = async (x, y, t) => {
    const inputs = {
      x_t: new ort.Tensor("float32", x, [y.length, channels, side, side]),
      t: new ort.Tensor("int64", BigInt64Array.of(BigInt(t)), [1]),
    };
    if (classes.length) inputs.y = new ort.Tensor("int64", BigInt64Array.from(y, BigInt), [y.length]);
    return (await session.run(inputs)).output.data;
  };
  const predict = async (x_t, t) => {
    if (guidance === 1 || !classes.length) return run(x_t, labels, t);
    const both = await run(join([x_t, x_t]), [...labels, ...labels.map(() => classes.length)], t);
    const [conditional, unconditional] = [both.slice(0, x_t.length), both.slice(x_t.length)];
    return pixels((c, u) => u + guidance * (c - u), conditional, unconditional); // Ho & Salimans 2022, eq. 6
  };
  const power = settings.sampler === "consistency" ? 3 : 1, diffusion = new Diffusion(settings);
  const grid = timeGrid(diffusion.T, steps, strength, power);
  const first = grid[0]?.[0] ?? -1; // with no steps, x_t is the image itself
  let x_t = image && first < diffusion.T - 1 ? diffusion.qSample(image, first, noise[0]) : noise[0];
  for await (x_t of SAMPLERS[settings.sampler](diffusion, predict, x_t, noise, grid)) if (await onStep(x_t)) break;
  return x_t;
}

if (typeof document === "undefined") {
  let model, work = Promise.resolve(), stopped = 0; // the last of the requests that are wanted no longer
  const messages = () => new Promise((resolve) => setTimeout(resolve)); // lets them arrive
  const handle = async ({ id, request }) => {
    const onStep = async (x) => (postMessage({ id, step: x }), await messages(), id <= stopped);
    try {
      if (request.load) model = await loadModel(request.load, model);
      postMessage({ id, result: request.load ? model.settings : await sample(model, request, onStep) });
    } catch (error) {
      postMessage({ id, error: error.message });
    }
  };
  onmessage = ({ data }) => ("stop" in data ? (stopped = data.stop) : (work = work.then(() => handle(data))));
}

// ---- 3. The page -------------------------------------------------------------------------------------------

/** A worker as functions: load(source) → settings, sample(request, onStep) → images, stop() whatever it samples. */
export function connect() {
  const worker = new Worker(new URL("diffusion.js", import.meta.url), { type: "module" }), waiting = new Map();
  worker.onmessage = ({ data: { id, step, result, error } }) => {
    const { resolve, reject, onStep } = waiting.get(id);
    if (step) return onStep?.(step);
    waiting.delete(id);
    error ? reject(new Error(error)) : resolve(result);
  };
  const broken = new Promise((_, reject) => {
    worker.onerror = ({ message }) => reject(new Error(message || "The worker failed: reload the page."));
  });
  let id = 0;
  const ask = (request, onStep) => {
    worker.postMessage({ id: ++id, request });
    return Promise.race([broken, new Promise((resolve, reject) => waiting.set(id, { resolve, reject, onStep }))]);
  };
  return { load: (source) => ask({ load: source }), sample: ask, stop: () => worker.postMessage({ stop: id }) };
}

/** Draw images side by side, with a black pixel between them. */
function show(canvas, images, { channels, image_size: side }) {
  const area = side * side, count = images.length / (channels * area), columns = Math.ceil(Math.sqrt(count));
  canvas.width = columns * (side + 1) - 1;
  canvas.height = Math.ceil(count / columns) * (side + 1) - 1;
  const picture = new ImageData(side, side);
  for (let n = 0; n < count; n++) {
    for (let i = 0; i < 4 * area; i++) {
      const value = images[(n * channels + Math.min(i % 4, channels - 1)) * area + (i >> 2)];
      picture.data[i] = i % 4 === 3 ? 255 : (value + 1) * 127.5; // the array clips and rounds
    }
    canvas.getContext("2d").putImageData(picture, (n % columns) * (side + 1), Math.floor(n / columns) * (side + 1));
  }
}

/** A canvas to draw on, with mouse, finger or keyboard; `mark` shows where the keyboard's brush is. */
function makeSketch(canvas, mark, brush, onChange) {
  const pen = canvas.getContext("2d", { willReadFrequently: true }), at = { x: 0, y: 0 };
  const fill = (grey, ...rectangle) => ((pen.fillStyle = `rgb(${grey} ${grey} ${grey})`), pen.fillRect(...rectangle));
  const paint = (x, y) => fill(brush.value, Math.round(x) - 1, Math.round(y) - 1, 3, 3);
  const clear = () => fill(0, 0, 0, canvas.width, canvas.height);
  const drag = (event) => {
    if (event.buttons !== 1) return;
    const box = canvas.getBoundingClientRect(), scale = canvas.width / box.width;
    const to = { x: (event.clientX - box.left) * scale, y: (event.clientY - box.top) * scale };
    const from = event.type === "pointerdown" ? to : { ...at }, points = 1 + Math.hypot(to.x - from.x, to.y - from.y);
    for (let w = 0; w <= 1; w += 1 / points) paint(from.x + w * (to.x - from.x), from.y + w * (to.y - from.y));
    Object.assign(at, to);
  };
  canvas.onpointerdown = (event) => (canvas.setPointerCapture(event.pointerId), drag(event));
  canvas.onpointermove = drag;
  canvas.onpointerup = () => onChange();
  const KEYS = { " ": [0, 0], ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  canvas.onkeydown = (event) => {
    if (!(event.key in KEYS) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    const [dx, dy] = KEYS[event.key], inside = (x) => Math.min(canvas.width - 1, Math.max(0, Math.round(x)));
    Object.assign(at, { x: inside(at.x + dx), y: inside(at.y + dy) });
    mark.style.translate = [at.x, at.y].map((x) => `${(100 * (x - 1)) / 3}%`).join(" "); // it is 3 pixels large
    if (event.key === " " || event.shiftKey) paint(at.x, at.y), onChange();
  };
  return {
    clear,
    resize: (side) => {
      Object.assign(canvas, { width: side, height: side });
      Object.assign(mark.style, { width: `${300 / side}%`, height: `${300 / side}%` });
      Object.assign(at, { x: side / 2, y: side / 2 });
    },
    shirt: () => {
      clear();
      pen.fillStyle = "#aaa";
      pen.setTransform(canvas.width / 32, 0, 0, canvas.height / 32, 0, 0);
      pen.fill(new Path2D("M8 6 24 6 29 14 26 17 23 13 23 27 9 27 9 13 6 17 3 14"));
      pen.resetTransform();
    },
    /** The sketch as an image (C × H × W), grey in every channel. */
    read: (channels) => {
      const { data } = pen.getImageData(0, 0, canvas.width, canvas.height), area = data.length / 4;
      return Float32Array.from({ length: channels * area }, (_, i) => data[4 * (i % area)] / 127.5 - 1);
    },
  };
}

export function start(url) {
  const $ = (id) => document.getElementById(id), { load, sample, stop } = connect();
  const sketch = makeSketch($("sketch"), $("mark"), $("brush"), () => make()), problems = new Map();
  let settings, ready; // of the model in use; what the status says then

  /** Show what is wrong with a task, or "" if nothing is, beside what is wrong with others. */
  const report = (task, text) => {
    problems.set(task, text);
    $("error").textContent = [...problems.values()].filter(Boolean).join(" ");
    if (text) $("error").scrollIntoView({ block: "nearest" });
  };
  /** A task that paints a canvas. It never runs twice at once: asked for meanwhile, it runs once more at the end. */
  const painting = (canvas, task) => {
    let again = false;
    return async () => {
      again = true;
      if (canvas.ariaBusy === "true") return;
      for (canvas.ariaBusy = "true"; again; ) {
        again = false;
        await task(canvas).then(() => report(canvas, ""), (error) => report(canvas, error.message));
      }
      canvas.ariaBusy = "false";
    };
  };
  const seed = () => Math.min(Number($("seed").max), Math.max(0, Math.floor(Number($("seed").value)) || 0));
  const labelsOf = ({ value }, count) =>
    Array.from({ length: count }, (_, i) => (value === "all" ? i % settings.classes.length : Number(value)));
  const names = (labels) => [...new Set(labels.map((label) => settings.classes[label] ?? "no class"))].join(", ");
  const how = () => ({ steps: Number($("steps").value), guidance: Number($("guidance").value) });
  /** x_T and the fresh noise of every step for some images, each with a random stream of its own. */
  const noises = (first, count) => {
    const size = settings.channels * settings.image_size ** 2, { steps } = how();
    const streams = Array.from({ length: count }, (_, i) => gaussian(first + i, size * steps));
    return Array.from({ length: steps }, (_, k) => join(streams.map((x) => x.subarray(k * size, (k + 1) * size))));
  };

  const generate = painting($("grid"), async (canvas) => {
    const count = Number($("count").value), labels = labelsOf($("class"), count), noise = noises(1000 * seed(), count);
    const began = performance.now(), { steps } = how();
    let step = 0;
    show(canvas, noise[0], settings);
    await sample({ noise, labels, ...how() }, (x_t) => {
      show(canvas, x_t, settings);
      $("progress").textContent = `Step ${++step} of ${steps}, ${((performance.now() - began) / 1000).toFixed(1)} s`;
    });
    canvas.ariaLabel = `Generated: ${names(labels)}`;
  });
  const walk = painting($("walked"), async (canvas) => {
    const [a, b] = [noises(1000 * seed(), 1), noises(1000 * (seed() + 1), 1)], weight = Number($("weight").value);
    const noise = a.map((_, i) => slerp(a[i], b[i], weight)), labels = labelsOf($("class"), 1);
    show(canvas, await sample({ noise, labels, ...how() }), settings);
    canvas.ariaLabel = `Between two noises: ${names(labels)}`;
  });
  const make = painting($("drawn"), async (canvas) => {
    const labels = labelsOf($("kind"), 4), noise = noises(1000 * seed(), 4), strength = Number($("strength").value);
    const image = join(Array(4).fill(sketch.read(settings.channels)));
    show(canvas, await sample({ noise, labels, image, strength, ...how() }), settings);
    canvas.ariaLabel = `From the sketch: ${names(labels)}`;
  });

  const all = () => {
    $("seed").value = seed(); // the one in use, whatever was typed
    stop(), generate(), walk(), make(); // all again: what is on its way is of no use
  };
  for (const id of ["class", "count", "steps", "guidance", "seed"]) $(id).onchange = all;
  $("guidance").oninput = () => ($("scale").textContent = $("guidance").value);
  $("again").onclick = () => (($("seed").value = Math.floor(Math.random() * 1e6)), all());
  $("save").onclick = () => {
    const image = { href: $("grid").toDataURL("image/png"), download: `simple-ddpm-${seed()}.png` };
    Object.assign(document.createElement("a"), image).click();
  };
  $("weight").oninput = walk;
  $("clear").onclick = () => (sketch.clear(), make());
  $("example").onclick = () => (sketch.shirt(), make());
  $("strength").oninput = () => ($("amount").textContent = $("strength").value);
  for (const id of ["strength", "kind"]) $(id).onchange = make;

  const use = async ({ url, file }) => {
    $("controls").inert = true; // until there is a model
    $("status").textContent = `Loading ${url} ...`;
    if (new URL(url, location.href).origin !== location.origin) throw new Error(`${url} is on another server.`);
    settings = await load({ url, bytes: await file?.arrayBuffer() });
    const { classes, objective, backend, steps } = settings;
    const options = classes.map((name, i) => new Option(name, i)), none = () => new Option("no class", classes.length);
    $("class").replaceChildren(...(classes.length ? [new Option("each in turn", "all")] : []), ...options, none());
    $("kind").replaceChildren(...options.map((option) => option.cloneNode(true)), none());
    const choices = new Set(objective === "consistency" ? [1, 2, 4, steps] : [10, 20, 30, 50, steps]);
    $("steps").replaceChildren(...[...choices].map((n) => new Option(n, n, n === steps, n === steps)));
    $("guidance").disabled = !classes.length;
    sketch.resize(settings.image_size);
    ready = `${url}: ready, on the ${backend === "wasm" ? "processor" : "graphics card"}.`;
    rest();
    sketch.shirt(), all();
  };
  const rest = () => (($("controls").inert = !ready), ($("status").textContent = ready ?? ""));
  let opened = Promise.resolve();
  const fail = (error) => (rest(), report("model", error.message));
  const open = (source) => (opened = opened.then(() => use(source)).then(() => report("model", ""), fail));
  $("file").onchange = () => {
    for (const file of $("file").files) open({ url: file.name, file });
    $("file").value = ""; // so that the same file can be chosen again
  };
  open({ url });
}
