// Chapter 8: the pipeline, from a prompt to a picture.
"use strict";

// A model from its exported table and the bytes of its parts.
async function makeModel(about, kernel, bytes) {
  const tables = Object.entries(about.parts);
  const count = Object.values(bytes).reduce((sum, part) => sum + part.byteLength / 2 + 8, 0);
  await openMemory(kernel, count);
  const weights = {};
  for (const [part, { table }] of tables) weights[part] = readWeights(table, bytes[part]);
  const tokenizers = about.tokenizers.map((table) => makeTokenizer(table, about.unicode));
  return { about, weights, tokenizers };
}

// What CLIP-L, CLIP-G and T5 make of their texts: the context (L + L_t, D) that the
// transformer reads, the pooled vector, and the ids. Plain arrays, kept outside memory.
function encodeTexts(model, texts) {
  return scratch(() => {
    const { weights, about } = model;
    const ids = idsOf(model, texts);
    const [left, right] = ["text_encoder", "text_encoder_2"].map((part, i) =>
      clip(ids[i], weights[part], about.text_encoders[i]));
    const rows = t5(ids[2], weights.text_encoder_3, about.text_encoders[2]);
    const context = assemble(left.states, right.states, rows);
    return {
      ids, rows: context.rows, context: context.data.slice(),
      pooled: Float32Array.of(...left.pooled.data, ...right.pooled.data),
    };
  });
}

const idsOf = ({ tokenizers, about }, texts) => tokenizers.map((tokenizer, i) =>
  tokenizer.encode(texts[i], about.lengths[i]));

// Where padding stands among the context's rows: behind each text's end.
function paddingOf(model, texts) {
  const [first, second, third] = model.tokenizers.map((tokenizer, i) =>
    Math.min(tokenizer.count(texts[i]), model.about.lengths[i]));
  const clips = Math.max(first, second), [length, , lengthT5] = model.about.lengths;
  return [...range(clips, length), ...range(length + third, length + lengthT5)];
}

const range = (start, end) => Array.from({ length: end - start }, (_, i) => start + i);

const pixelSide = ({ transformer, vae }) =>
  transformer.sample_size * 2 ** (vae.block_out_channels.length - 1);

// Numbers in [0, 1] as a picture's bytes, red, green, blue and opaque.
function toPixels(values) {
  const pixels = new Uint8ClampedArray((values.length / 3) * 4).fill(255);
  for (let i = 0, at = 0; i < values.length; i++) {
    pixels[at++] = 255 * values[i];
    if (i % 3 === 2) at++;
  }
  return pixels;
}

// Latents (C, h, w) → the picture's numbers (H·W·3) in [0, 1].
const decodeLatents = (model, latents) => scratch(() => decode(latents,
  model.about.transformer.sample_size, model.about.transformer.sample_size,
  model.weights.vae, model.about.vae));

// The levels of a drawing, and the times that the network is told at them.
function schedule(steps, scheduler) {
  if (scheduler.jumps) return jumpSchedule(steps, scheduler);
  const sigmas = sigmaSchedule(steps, scheduler);
  return { sigmas, times: sigmas.slice(0, -1) };
}

// A drawing, as a generator: it yields after each step what the solver does.
//
// request: { prompt, negative_prompt, seed, steps, guidance, sampler, changes }; latents
// replace the seed's noise, and with `from` they are those that step `from` begins with.
// sketch: side² numbers, 1 on an edge, for a model that has a net to read it, and its
// strength, 1 where nothing is said.
// changes take something away: those of `velocity` and { texts: of each encoder, pooled:
// another prompt's, mask: hide the padding, exchange: { step, prompt }, free: guidance
// below 1 too }.
function* draw(model, request) {
  const { about, weights } = model, { transformer: config } = about;
  const changes = request.changes ?? {};
  const from = request.from ?? 0;
  const plan = schedule(request.steps, about.scheduler);
  const sigmas = plan.sigmas.slice(from), times = plan.times.slice(from);
  const count = config.in_channels * config.sample_size ** 2;
  const noise = request.latents ?? randn(count, request.seed);
  const guided = request.guidance > 1 || changes.free;
  const sketch = request.sketch && {
    strength: request.strength ?? 1,
    condition: scratch(() =>
      encodeSketch(request.sketch, pixelSide(about), weights.encoder, about.vae)),
  };
  const top = memory.top;
  try {
    const read = (texts, pooledOf) => {
      const text = encodeTexts(model, texts);
      const pooled = pooledOf ? encodeTexts(model, Array(3).fill(pooledOf)).pooled : text.pooled;
      return {
        context: Matrix.from(text.rows, text.context.length / text.rows, text.context),
        modulations: modulations(times, pooled, weights.transformer, config),
        steer: sketch && steering(sketch, config.sample_size / config.patch_size,
          times, pooled, weights.control, about.control, config.num_layers),
        hidden: changes.mask ? paddingOf(model, texts) : undefined,
      };
    };
    const prompts = changes.texts ?? Array(3).fill(request.prompt);
    const positive = read(prompts, changes.pooled);
    const later = changes.exchange && read(Array(3).fill(changes.exchange.prompt));
    const negative = guided && read(Array(3).fill(request.negative_prompt ?? ""));
    const ask = (x, step, text) => scratch(() => velocity(x, step, text, weights.transformer,
      config, { ...changes, hidden: text.hidden }, text === negative ? undefined : request.record));
    const follow = (x, sigma, step) => {
      const v = ask(x, step, later && from + step >= changes.exchange.step ? later : positive);
      return guided ? guide(ask(x, step, negative), v, request.guidance) : v;
    };
    yield* SAMPLERS[request.sampler ?? "euler"](follow, noise, sigmas);
  } finally {
    memory.top = top;
  }
}

// The attention of a block at latents x of a step: { weights (H, L, L), heads, length }.
function attentionAt(model, request, x, step, block) {
  const { num_attention_heads: heads } = model.about.transformer;
  const maps = [];
  let length = 0;
  const record = (i, head, map) => {
    if (i !== block) return;
    length = map.rows;
    for (let row = 0; row < map.rows; row++) {
      maps.push(map.data.slice(row * map.columns, row * map.columns + length));
    }
  };
  const drawing = draw(model, { ...request, latents: x, record, from: step });
  drawing.next();
  drawing.return();
  const weights = new Float32Array(heads * length * length);
  maps.forEach((row, i) => weights.set(row, i * length));
  return { weights, heads, length };
}

// The mean size of the gates of the picture's stream: { attention, mlp }, each with a row
// for each block and a number for each step.
function gatesOf(model, { prompt, steps }) {
  const { transformer: config, scheduler } = model.about;
  const { times } = schedule(steps, scheduler);
  const { pooled } = encodeTexts(model, Array(3).fill(prompt));
  return scratch(() => {
    const { blocks } = modulations(times, pooled, model.weights.transformer, config);
    const width = config.num_attention_heads * config.attention_head_dim;
    const size = (row) => row.reduce((sum, value) => sum + Math.abs(value), 0) / width;
    const of = (part) => blocks.map(({ x }) => times.map((_, i) => size(chunks(x, i, width)[part])));
    return { attention: of(2), mlp: of(5) };
  });
}
