// The worker: answers the page's messages { id, task, … } with { id, result } or
// { id, error }, and while it draws with { id, progress }.
"use strict";

let model, latest;

const tasks = {
  // Open a model: { about, kernel, parts: { name: ArrayBuffer or base64 } }.
  async open({ about, kernel, parts }) {
    const bytes = Object.entries(parts).map(([name, data]) => [name, toBuffer(data)]);
    model = await makeModel(about, toBuffer(kernel), Object.fromEntries(bytes));
  },

  // Draw; a later drawing ends it, and its result is null then.
  async draw({ request }, { id, progress }) {
    latest = id;
    const begun = performance.now(), trace = [];
    let shown = begun, x;
    for (const state of draw(model, request)) {
      x = state.x;
      if (request.trace) trace.push(state);
      if (request.watch && performance.now() - shown > request.watch) {
        progress({ step: state.step, pixels: toPixels(decodeLatents(model, state.x0)) });
        shown = performance.now();
      }
      await breath();
      if (latest !== id) return null;
    }
    const drawn = performance.now(), values = decodeLatents(model, x);
    const { ids } = encodeTexts(model, Array(3).fill(request.prompt));
    const times = { steps: drawn - begun, decoder: performance.now() - drawn };
    return { pixels: toPixels(values), side: pixelSide(model.about), latents: x, ids, times, trace };
  },

  tokens: ({ text }) => model.tokenizers.map((tokenizer, i) =>
    tokenizer.encode(text, model.about.lengths[i])),

  picture: ({ latents }) => toPixels(decodeLatents(model, latents)),

  maps: ({ request, latents, step, block }) => attentionAt(model, request, latents, step, block),
};

const toBuffer = (data) => typeof data === "string"
  ? Uint8Array.from(atob(data), (c) => c.charCodeAt(0)).buffer : data;

// Let messages that came meanwhile be heard.
const breath = () => new Promise((done) => {
  const { port1, port2 } = new MessageChannel();
  port1.onmessage = () => { port1.close(); done(); };
  port2.postMessage(null);
});

onmessage = async ({ data: { id, task, ...given } }) => {
  const progress = (state) => postMessage({ id, progress: state });
  try {
    postMessage({ id, result: await tasks[task](given, { id, progress }) });
  } catch (error) {
    postMessage({ id, error: error.message });
  }
};
