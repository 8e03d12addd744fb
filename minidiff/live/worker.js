// The worker: answers the page's messages { id, task, … } with { id, result } or
// { id, error }, and while it draws with { id, progress }.
"use strict";

let model, latest, turn = Promise.resolve();

const tasks = {
  // Open a model: { about, kernel, parts: { name: ArrayBuffer or base64 } }.
  async open({ about, kernel, parts }) {
    const bytes = Object.entries(parts).map(([name, data]) => [name, toBuffer(data)]);
    model = await makeModel(about, toBuffer(kernel), Object.fromEntries(bytes));
  },

  // Draw, one after the other; a later drawing ends this one, whose result is null then.
  draw({ request }, { id, progress }) {
    latest = id;
    const drawing = turn.then(() => latest === id ? drawOne(request, id, progress) : null);
    turn = drawing.catch(() => {});
    return drawing;
  },

  picture: ({ latents }) => toPixels(decodeLatents(model, latents)),

  noise: ({ seed }) => randn(
    model.about.transformer.in_channels * model.about.transformer.sample_size ** 2, seed),

  context: ({ texts }) => encodeTexts(model, texts),

  // The mean size of the picture's gates, (blocks, steps) for attention and for the MLP.
  gates: ({ request }) => gatesOf(model, request),

  maps: ({ request, latents, step, block }) => attentionAt(model, request, latents, step, block),
};

async function drawOne(request, id, progress) {
  const begun = performance.now(), trace = [];
  let shown = begun, x;
  for (const state of draw(model, request)) {
    x = state.x;
    trace.push(state);
    if (request.watch && performance.now() - shown > request.watch) {
      progress({ step: state.step, pixels: toPixels(decodeLatents(model, state.x0)) });
      shown = performance.now();
    }
    await breath();
    if (latest !== id) return null;
  }
  const drawn = performance.now(), pixels = toPixels(decodeLatents(model, x));
  const times = { steps: drawn - begun, decoder: performance.now() - drawn };
  const ids = idsOf(model, Array(3).fill(request.prompt));
  return { pixels, side: pixelSide(model.about), latents: x, ids, times, trace };
}

function toBuffer(data) {
  if (typeof data !== "string") return data;
  const text = atob(data), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes.buffer;
}

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
