// The page's side: opens a model in a worker when it is first asked for, and draws.
//
//   const { pixels } = await minidiff.draw({ prompt: "a red dress", seed: 0 });
"use strict";

window.minidiff = Object.assign(window.minidiff ?? {}, (() => {
  const here = document.currentScript?.src;
  const opened = new Map();

  const script = (file) => new Promise((done, fail) => {
    const element = document.createElement("script");
    element.src = new URL(file, here);
    element.onload = done;
    element.onerror = () => fail(new Error(`${file} cannot be read`));
    document.head.append(element);
  });

  // A part's weights: bytes from a server, base64 from the disk, which may not be fetched.
  async function weights(file) {
    if (minidiff.weights[file]) return minidiff.weights[file];
    if (globalThis.origin === "null") { // a file, or a notebook's output
      await script(`${file}.js`);
      return minidiff.weights[file];
    }
    const answer = await fetch(new URL(`${file}.bin`, here));
    if (!answer.ok) throw new Error(`${file} cannot be read: ${answer.status}`);
    return answer.arrayBuffer();
  }

  // The first form of the kernel that this browser runs, in base64.
  function chooseKernel() {
    const runs = (kernel) =>
      WebAssembly.validate(Uint8Array.from(atob(kernel), (c) => c.charCodeAt(0)));
    const kernel = globalThis.WebAssembly && minidiff.runtime.kernels.find(runs);
    let classes = true;
    try { new RegExp("[\\p{L}--a]", "v"); } catch { classes = false; }
    if (!classes || !kernel) {
      throw new Error("this browser lacks WebAssembly SIMD: one of 2023 or newer has it");
    }
    return kernel;
  }

  // { about, call(task, given, progress), seconds } of a model, once.
  function open(name = Object.keys(minidiff.exported)[0]) {
    if (!opened.has(name)) {
      const opening = start(name);
      opening.catch(() => opened.delete(name));
      opened.set(name, opening);
    }
    return opened.get(name);
  }

  async function start(name) {
    const begun = performance.now();
    if (!Object.hasOwn(minidiff.exported, name)) {
      const known = Object.keys(minidiff.exported).join(", ");
      throw new Error(`model is ${name}; expected one of ${known}`);
    }
    if (!minidiff.runtime) await script("runtime.js");
    const kernel = chooseKernel();
    if (!minidiff.models[name]) await script(`${name}.js`);
    const about = minidiff.models[name];
    const read = Object.entries(about.parts).map(async ([part, { file }]) =>
      [part, await weights(file)]);
    const parts = Object.fromEntries(await Promise.all(read));
    const call = startWorker();
    await call("open", { about, kernel, parts });
    return { about, call, seconds: (performance.now() - begun) / 1000 };
  }

  // A function that sends the worker a task and waits for the result.
  function startWorker() {
    const text = new Blob([minidiff.runtime.script], { type: "text/javascript" });
    const worker = new Worker(URL.createObjectURL(text)), waiting = new Map();
    let last = 0;
    worker.onmessage = ({ data: { id, result, error, progress } }) => {
      const { done, fail, watch } = waiting.get(id);
      if (progress) return watch?.(progress);
      waiting.delete(id);
      if (error) fail(new Error(error));
      else done(result);
    };
    return (task, given = {}, watch = undefined) => new Promise((done, fail) => {
      waiting.set(++last, { done, fail, watch });
      worker.postMessage({ id: last, task, ...given });
    });
  }

  // Draw a picture; null where a later drawing of the same model came between.
  //
  // The request: { prompt, negative_prompt, seed, steps, guidance, sampler, model }, the
  // model's own where nothing is said; latents in place of the seed's noise; a sketch of
  // side² numbers, 1 on an edge, and its strength, for a model that reads it; changes that
  // take something away (sampling.js). With watch, a time in ms, `progress` is given
  // estimates on the way. The result: { pixels: Uint8ClampedArray (side·side·4), side,
  // latents: Float32Array (C·h·w), ids of the three readers, trace: for each step { sigma,
  // x: where it led, v, x0 }, times in ms, maps(block, step) → { weights (H·L·L), heads,
  // length } }.
  async function draw({ model, ...given }, progress) {
    const { about, call } = await open(model);
    const usual = { prompt: "", negative_prompt: "", seed: 0, sampler: "euler", ...about.defaults };
    const request = { ...usual, ...given };
    checkRequest(request, about);
    const result = await call("draw", { request }, progress);
    if (!result) return null;
    const before = (step) => step ? result.trace[step - 1].x : request.latents;
    result.maps = (block, step = request.steps - 1) =>
      call("maps", { request, latents: before(step), step, block });
    return result;
  }

  function checkRequest({ prompt, seed, steps, guidance, sampler, sketch }, about) {
    const { scheduler, solvers } = about, count = about.sketch ** 2;
    const whole = (name, value, least, most) => {
      if (!Number.isInteger(value) || value < least || value > most) {
        throw new Error(`${name} is ${value}; expected a whole number, ${least} to ${most}`);
      }
    };
    if (typeof prompt !== "string") throw new Error(`prompt is ${prompt}; expected a text`);
    whole("seed", seed, 0, Number.MAX_SAFE_INTEGER);
    whole("steps", steps, 1, scheduler.jumps ?? 1000);
    if (!solvers.includes(sampler)) {
      throw new Error(`sampler is ${sampler}; expected one of ${solvers.join(", ")}`);
    }
    if (sketch && sketch.length !== count) {
      throw new Error(`sketch has ${sketch.length} numbers; this model reads ${count}`);
    }
    if (!Number.isFinite(guidance)) throw new Error(`guidance is ${guidance}; expected a number`);
  }

  return { models: {}, weights: {}, script, open, draw };
})());
