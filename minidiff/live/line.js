// The line to type into: a figure of class minidiff-live becomes a place to draw.
"use strict";

minidiff.make = (tag, parent, props = {}, attributes = {}) => {
  const element = Object.assign(document.createElement(tag), props);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  parent?.append(element);
  return element;
};

// The words of a text that a model has never seen, with their places; WORD as in tokenizer_files.py.
minidiff.unseen = (text, words) => {
  const WORD = /[\p{L}\p{N}_][\p{L}\p{N}\p{M}_\u200c\u200d]*|[\p{So}\p{Sm}\p{Sc}][\p{S}\p{M}\u200d]*/gu;
  const known = new Set(words), found = Array.from(text.matchAll(WORD), ({ 0: piece, index }) =>
    ({ word: piece.normalize().toLowerCase(), start: index, end: index + piece.length }));
  return known.size ? found.filter(({ word }) => !known.has(word)) : [];
};

minidiff.line = (figure) => {
  const { make } = minidiff, DRAFT = 350; // ms that a draft may take while one types
  const models = minidiff.exported, names = Object.keys(models);
  const image = figure.querySelector("img");
  const notebook = "notebook" in figure.dataset; // its address is not ours
  const address = new URLSearchParams(notebook ? "" : location.search);
  const first = Object.hasOwn(models, figure.dataset.model) ? figure.dataset.model : names[0];
  const SIDE = Math.max(...names.map((name) => models[name].sketch)); // of a sketch; or 0
  const state = { model: first, seed: 0, prompt: image.dataset.prompt,
    strength: 2, ...usual(first) }; // at 1 words without a place often outweigh a sketch
  if (SIDE && figure.dataset.sketch) state.sketch = minidiff.sketches.read(figure.dataset.sketch, SIDE);
  let asked = 0, speed = 0, result = null, loaded = "";

  function usual(name) {
    return { steps: models[name].steps, guidance: models[name].guidance };
  }

  // What is there to see
  const head = make("div", figure, { className: "live-head" });
  const label = make("label", head, { textContent: "Say what the picture shows" });
  const line = make("div", head, { className: "live-line" });
  const marks = make("div", line, { className: "live-marks" }, { "aria-hidden": "true" });
  const input = make("input", line, { type: "text", maxLength: 300, autocomplete: "off",
    spellcheck: false, enterKeyHint: "done", id: `live-prompt-${Math.random().toString(36).slice(2)}` });
  label.htmlFor = input.id;
  const unseen = make("p", head, { className: "live-unseen" }, { "aria-live": "polite" });
  const examples = make("div", head, { className: "live-examples" },
    { role: "group", "aria-label": "example prompts" });
  for (const text of JSON.parse(figure.dataset.examples ?? "[]")) {
    make("button", examples, { type: "button", textContent: text,
      onclick: () => { input.value = text; change({ prompt: text }); } });
  }
  const box = make("div", figure, { className: "live-box" });
  const frame = make("div", box, { className: "live-picture" });
  const canvas = make("canvas", frame, {}, { role: "img" });
  const bar = make("div", frame, { className: "live-bar" });
  const pad = SIDE && minidiff.pad(box, SIDE, (sketch, done) => change({ sketch }, done), edges);
  const side = make("div", box, { className: "live-side" });
  const controls = make("div", side, { className: "live-controls" });
  const range = (name, min, max, step) => {
    const row = make("label", controls, { textContent: name });
    const slider = make("input", row, { type: "range", min, max, step }, { "aria-label": name });
    const output = make("output", row, {}, { "aria-live": "off" }); // the slider says it
    slider.oninput = () => change({ [name]: Number(slider.value) });
    return () => {
      row.hidden = name === "strength" && !models[state.model].sketch;
      if (name === "steps") slider.max = models[state.model].most;
      slider.value = state[name];
      output.textContent = state[name];
    };
  };
  const showSteps = range("steps", 1, 1, 1), showGuidance = range("guidance", 1, 8, 0.1);
  const showStrength = range("strength", 0, 3, 0.1); // of a sketch
  const row = make("label", controls, { textContent: "seed" });
  const seed = make("input", row, { type: "number", min: 0, step: 1 });
  seed.onchange = () => change({ seed: Math.max(0, Math.floor(Number(seed.value)) || 0) });
  const again = make("button", row, { type: "button", textContent: "again" },
    { title: "another seed" });
  again.onclick = () => change({ seed: Math.floor(Math.random() * 2 ** 32) });
  let choice;
  if (names.length > 1) {
    choice = make("select", make("label", controls, { textContent: "model" }));
    for (const name of names) make("option", choice, { value: name, textContent: name });
    choice.onchange = () => change({ model: choice.value, ...usual(choice.value) });
  }
  const actions = make("div", side, { className: "live-actions" });
  const save = make("button", actions, { type: "button", textContent: "Save as PNG" });
  const link = make("button", actions,
    { type: "button", textContent: "Copy link", hidden: notebook });
  if (figure.dataset.inside) {
    const inside = make("a", actions, { textContent: "Look inside", href: figure.dataset.inside });
    inside.onclick = () => { inside.href = `${figure.dataset.inside}${location.search}`; };
  }
  const status = make("p", side, { className: "live-status" }, { role: "status" });
  const rows = make("div", figure, { className: "live-tokens" });
  const caption = figure.querySelector(":scope > figcaption");

  // What happens
  function change(more, done = true) {
    Object.assign(state, more);
    show();
    if (done) remember();
    run();
  }

  function show() {
    showSteps();
    showGuidance();
    showStrength();
    seed.value = state.seed;
    if (choice) choice.value = state.model;
    if (pad) pad.box.hidden = !models[state.model].sketch;
  }

  async function edges() {
    if (!result) await run();
    return minidiff.canny(canvas.getContext("2d").getImageData(0, 0, SIDE, SIDE).data, SIDE);
  }

  // What the model is asked: an empty sketch is none.
  function asking() {
    const { sketch, strength, ...request } = state;
    const asked = models[state.model].sketch && sketch?.includes(1);
    return asked ? { ...request, sketch, strength } : request;
  }

  function remember() {
    if (notebook) return;
    const { prompt, seed, steps, guidance, model } = state;
    const kept = new URLSearchParams(location.search);
    const now = { prompt, seed, steps, guidance, model };
    for (const [name, value] of Object.entries(now)) kept.set(name, value);
    const { sketch, strength } = asking();
    for (const name of ["sketch", "strength"]) kept.delete(name);
    if (sketch) {
      kept.set("sketch", minidiff.sketches.write(sketch));
      kept.set("strength", strength);
    }
    history.replaceState(null, "", `?${kept}${location.hash}`);
  }

  function recall() {
    for (const name of ["prompt", "model"]) if (address.has(name)) state[name] = address.get(name);
    if (!Object.hasOwn(models, state.model)) state.model = first;
    Object.assign(state, usual(state.model));
    const numbers = { seed: Number.MAX_SAFE_INTEGER, steps: models[state.model].most, guidance: 8,
      strength: 3 };
    for (const [name, most] of Object.entries(numbers)) {
      const value = Number(address.get(name)?.trim() || NaN); // Number("") is 0
      if (value >= 0 && value <= most) state[name] = value;
    }
    if (SIDE && address.has("sketch")) {
      try {
        state.sketch = minidiff.sketches.read(address.get("sketch"), SIDE);
      } catch { /* what is no sketch is none */ }
    }
    state.seed = Math.floor(state.seed);
    state.steps = Math.max(1, Math.floor(state.steps));
  }

  // A draft at once where the whole drawing takes longer, then the drawing.
  async function run() {
    const turn = ++asked, request = asking();
    try {
      if (!result && turn === 1) status.textContent = "loading the model …";
      const { about, seconds } = await minidiff.open(state.model);
      loaded = `; loaded in ${seconds.toFixed(1)} s`;
      mark(about);
      const calls = request.guidance > 1 ? 2 : 1;
      const affordable = Math.max(2, Math.floor(DRAFT / (speed || 60) / calls));
      if (affordable < request.steps) await picture(turn, { ...request, steps: affordable }, true);
      await picture(turn, request, false);
    } catch (error) {
      if (turn === asked) status.textContent = `Nothing drawn: ${error.message}.`;
    }
  }

  async function picture(turn, request, draft) {
    if (turn !== asked) return;
    const progress = ({ step, pixels }) => {
      if (turn !== asked) return;
      paint(pixels);
      bar.style.width = `${(100 * (step + 1)) / request.steps}%`;
    };
    if (!draft) status.textContent = `drawing, ${request.steps} steps …`;
    const drawn = await minidiff.draw({ ...request, watch: draft ? 0 : 400 }, progress);
    if (!drawn || turn !== asked) return;
    result = drawn;
    const calls = request.steps * (request.guidance > 1 ? 2 : 1);
    speed = drawn.times.steps / calls;
    paint(drawn.pixels);
    bar.style.width = draft ? "8%" : "0";
    canvas.setAttribute("aria-label", `the picture drawn for “${request.prompt}”`);
    const seconds = ((drawn.times.steps + drawn.times.decoder) / 1000).toFixed(2);
    status.textContent = draft ? `a draft of ${request.steps} steps, ${seconds} s …`
      : `drawn in ${seconds} s: ${request.steps} steps, ${speed.toFixed(0)} ms for each of `
        + `${calls} calls of the transformer, ${drawn.times.decoder.toFixed(0)} ms for the decoder${loaded}`;
    figure.dataset.drawn = draft ? "draft" : "whole";
    await tokens(request, drawn);
    if (!draft) figure.dispatchEvent(new CustomEvent("drawn", { detail: { request, drawn } }));
  }

  function paint(pixels) {
    const width = Math.sqrt(pixels.length / 4);
    if (canvas.width !== width) canvas.width = canvas.height = width;
    canvas.getContext("2d").putImageData(new ImageData(pixels, width), 0, 0);
    image.hidden = true;
    canvas.hidden = false;
  }

  // Mark the words that the model has never seen.
  function mark({ words }) {
    const found = minidiff.unseen(input.value, words);
    marks.replaceChildren();
    let done = 0;
    for (const { start, end } of found) {
      marks.append(input.value.slice(done, start));
      make("mark", marks, { textContent: input.value.slice(start, end) });
      done = end;
    }
    marks.append(input.value.slice(done));
    const named = [...new Set(found.map(({ word }) => word))].join(", ");
    unseen.textContent = named ? `never seen in training: ${named}` : "";
  }

  // The ids of the three readers as chips, padding counted.
  async function tokens({ model }, { ids }) {
    const { about } = await minidiff.open(model);
    rows.replaceChildren();
    ["CLIP-L", "CLIP-G", "T5"].forEach((name, i) => {
      const { pieces, eos } = about.tokenizers[i], end = ids[i].indexOf(eos) + 1;
      const list = make("div", rows, {}, { role: "group", "aria-label": `tokens of ${name}` });
      make("b", list, { textContent: name });
      for (const id of ids[i].slice(0, end)) {
        const text = pieces[id].replace("</w>", "");
        make("span", list, { textContent: text, title: `id ${id}` });
      }
      const padding = ids[i].length - end;
      if (padding) make("i", list, { textContent: `+ ${padding} × padding` });
    });
  }

  input.oninput = () => change({ prompt: input.value });
  input.onscroll = () => { marks.scrollLeft = input.scrollLeft; };
  save.onclick = async () => {
    const { about } = await minidiff.open(state.model);
    if (!result) await run();
    const { prompt, seed, steps, guidance, strength } = state, side = canvas.width;
    const weights = about.weights && { weights: about.weights };
    const file = await minidiff.png(canvas, { model: state.model, ...weights, dtype: "float32",
      ...(asking().sketch && { control: `edges sketch.png, strength ${strength}, 0 to 1` }),
      prompt, negative_prompt: "", num_inference_steps: steps, guidance_scale: Math.max(1, guidance),
      height: side, width: side, seed, max_sequence_length: about.lengths[2],
      sampler: "euler", version: about.version });
    make("a", null, { href: URL.createObjectURL(file), download: "picture.png" }).click();
  };
  link.onclick = async () => {
    remember();
    try {
      await navigator.clipboard.writeText(location.href);
      status.textContent = "The link is copied: it draws the same picture.";
    } catch {
      status.textContent = "The link stands in the address: it draws the same picture.";
    }
  };

  recall();
  if (state.sketch) pad.replace(state.sketch);
  input.value = state.prompt;
  show();
  canvas.hidden = true;
  frame.prepend(image);
  if (caption) figure.append(caption);
  figure.dataset.ready = "1";
  figure.addEventListener("wanted", run);
  if (address.has("prompt") || address.has("open")) run();
};

// Bring to life what is on the page and was not yet.
minidiff.start = () => {
  const kinds = { "minidiff-live:has(img)": "line", "minidiff-inside": "inside", "minidiff-plane": "plane" };
  for (const [name, kind] of Object.entries(kinds)) {
    document.querySelectorAll(`.${name}`).forEach((figure) => {
      if (!figure.dataset[`${kind}Begun`]) minidiff[kind](figure);
      figure.dataset[`${kind}Begun`] = "1";
    });
  }
};
if (document.readyState !== "complete") addEventListener("DOMContentLoaded", minidiff.start);
