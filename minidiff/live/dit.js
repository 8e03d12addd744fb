// Chapter 5: the transformer, which tells the velocity of a noisy latent.
"use strict";

// Latents (C, h·p, w·p) → tokens (h·w, D), one for each patch.
function embedPatches(latents, height, width, weights, name, config) {
  const p = config.patch_size, channels = config.in_channels;
  const patches = new Matrix(height * width, channels * p * p);
  let at = 0;
  for (let row = 0; row < height; row++) {
    for (let column = 0; column < width; column++) {
      for (let c = 0; c < channels; c++) {
        for (let y = 0; y < p; y++) {
          const from = (c * height * p + row * p + y) * width * p + column * p;
          for (let x = 0; x < p; x++) patches.data[at++] = latents[from + x];
        }
      }
    }
  }
  return linear(patches, weights, `${name}.proj`);
}

// Tokens (h·w, p·p·C) → latents (C, h·p, w·p).
function unpatchify(tokens, height, width, p, channels) {
  const latents = new Float32Array(height * width * p * p * channels);
  for (let token = 0; token < height * width; token++) {
    const row = Math.floor(token / width) * p, column = (token % width) * p;
    let from = token * tokens.columns;
    for (let y = 0; y < p; y++) {
      for (let x = 0; x < p; x++) {
        for (let c = 0; c < channels; c++) {
          latents[(c * height * p + row + y) * width * p + column + x] = tokens.data[from++];
        }
      }
    }
  }
  return latents;
}

// Add the middle of the table of places to the tokens; `order` says whose place each
// patch is given.
function addPositions(x, height, width, weights, config, order) {
  const table = weights.pos_embed, size = config.pos_embed_max_size, d = x.columns;
  const top = Math.floor((size - height) / 2), left = Math.floor((size - width) / 2);
  for (let i = 0; i < x.rows; i++) {
    const place = order ? order[i] : i;
    const from = ((top + Math.floor(place / width)) * size + left + (place % width)) * d;
    for (let c = 0; c < d; c++) x.data[i * d + c] += table[from + c];
  }
}

// Timesteps in [0, 1000] → [cos, sin] features, a row of 256 each.
function timestepEmbedding(timesteps, width = 256) {
  const half = width / 2, features = new Matrix(timesteps.length, width);
  timesteps.forEach((t, i) => {
    for (let k = 0; k < half; k++) {
      const exponent = Math.fround(Math.fround(-Math.log(10000)) * k) / half;
      const angle = Math.fround(t * Math.fround(Math.exp(exponent)));
      features.data[i * width + k] = Math.cos(angle);
      features.data[i * width + half + k] = Math.sin(angle);
    }
  });
  return features;
}

// Two linear layers with SiLU between.
function embedder(x, weights, name) {
  const inner = silu(linear(x, weights, `${name}.mlp.0`));
  return linear(inner, weights, `${name}.mlp.2`);
}

// What time and pooled text say, at each of the `times`: a row for each, SiLU of it.
function conditioning(times, pooled, weights) {
  const thousandths = times.map((time) => Math.fround(1000 * time));
  const c = embedder(timestepEmbedding(thousandths), weights, "t_embedder");
  const text = embedder(Matrix.from(1, pooled.length, pooled), weights, "y_embedder");
  for (let i = 0; i < c.data.length; i++) c.data[i] += text.data[i % c.columns];
  return silu(c);
}

// What the network makes of it: for each block and the last layer a Matrix whose row i
// belongs to step i.
function modulations(times, pooled, weights, config) {
  const c = conditioning(times, pooled, weights);
  const of = (name) => linear(c, weights, `${name}.adaLN_modulation.1`);
  const blocks = Array.from({ length: config.num_layers }, (_, i) => ({
    context: of(`joint_blocks.${i}.context_block`), x: of(`joint_blocks.${i}.x_block`),
  }));
  return { blocks, final: of("final_layer") };
}

// The parts of row `step` of a modulation, D numbers each, in the order of the chapter:
// shift, scale, gate of attention, then of the MLP, then of dual attention.
function chunks(modulation, step, width) {
  const row = modulation.data.subarray(step * modulation.columns, (step + 1) * modulation.columns);
  return Array.from({ length: modulation.columns / width }, (_, i) =>
    row.subarray(i * width, (i + 1) * width));
}

// In place: x · (1 + scale) + shift.
function modulate(x, shift, scale) {
  const { data, columns } = x;
  for (let at = 0; at < data.length; at += columns) {
    for (let c = 0; c < columns; c++) data[at + c] = data[at + c] * (1 + scale[c]) + shift[c];
  }
  return x;
}

// In place: x + gate · update.
function addGated(x, gate, { data: update }) {
  const { data, columns } = x;
  for (let at = 0; at < data.length; at += columns) {
    for (let c = 0; c < columns; c++) data[at + c] += gate[c] * update[at + c];
  }
}

// Queries, keys and values of a stream into rows of qkv; SD3.5 normalises the first two.
function projectHeads(x, weights, name, qkv, width) {
  linear(x, weights, `${name}.qkv`, qkv);
  ["ln_q", "ln_k"].forEach((norm, i) => {
    const weight = weights[`${name}.${norm}.weight`];
    for (let row = 0; weight && row < x.rows; row++) {
      const at = row * qkv.columns + i * width;
      rmsNorm(qkv.data, at, at + width, weight, 1e-6);
    }
  });
}

// One block: two streams with their own weights, one attention over both. In place.
function jointBlock(context, x, modulation, step, weights, name, heads, options) {
  const width = x.columns, streams = [
    { tokens: context, name: `${name}.context_block`, m: chunks(modulation.context, step, width) },
    { tokens: x, name: `${name}.x_block`, m: chunks(modulation.x, step, width) },
  ];
  const qkv = new Matrix(context.rows + x.rows, 3 * width);
  let start = 0;
  for (const stream of streams) {
    const { tokens, m } = stream;
    const normed = modulate(layerNorm(tokens, 1e-6), m[0], m[1]);
    stream.start = start;
    start += tokens.rows;
    projectHeads(normed, weights, `${stream.name}.attn`, qkv.part(stream.start, start), width);
    if (m.length === 9) addDual(stream, weights, width, heads);
  }
  const read = attend(qkv, heads, options);
  if (options.silence !== undefined) silence(read, width / heads, options.silence);
  for (const stream of streams) {
    const { tokens, m } = stream;
    if (m.length === 2) continue; // the last block's text
    const own = read.part(stream.start, stream.start + tokens.rows);
    takeUp(tokens, own, m, weights, stream.name);
  }
}

// What the tokens of a stream have read, and the MLP; in place.
function takeUp(tokens, read, m, weights, name) {
  addGated(tokens, m[2], linear(read, weights, `${name}.attn.proj`));
  const normed = modulate(layerNorm(tokens, 1e-6), m[3], m[4]);
  const inner = geluTanh(linear(normed, weights, `${name}.mlp.fc1`));
  addGated(tokens, m[5], linear(inner, weights, `${name}.mlp.fc2`));
}

// MMDiT-X: the picture's tokens also attend to themselves alone.
function addDual({ tokens, name, m }, weights, width, heads) {
  const normed = modulate(layerNorm(tokens, 1e-6), m[6], m[7]);
  const qkv = new Matrix(tokens.rows, 3 * width);
  projectHeads(normed, weights, `${name}.attn2`, qkv, width);
  addGated(tokens, m[8], linear(attend(qkv, heads), weights, `${name}.attn2.proj`));
}

// What one head has read becomes zero.
function silence(read, d, head) {
  for (let row = 0; row < read.rows; row++) {
    const at = row * read.columns + head * d;
    read.data.fill(0, at, at + d);
  }
}

// The velocity (C, h, w) of latents at `step` of the modulations.
//
// changes: { skip: blocks left out, order: whose place each patch is given, hidden:
// which context rows nobody may read, silence: { block, head } }. record(block, head,
// weights) sees the attention. text.steer(x, step) says what to add behind the blocks.
function velocity(latents, step, text, weights, config, changes = {}, record) {
  const p = config.patch_size, heads = config.num_attention_heads;
  const side = config.sample_size / p;
  const x = embedPatches(latents, side, side, weights, "x_embedder", config);
  addPositions(x, side, side, weights, config, changes.order);
  const controls = text.steer?.(x, step) ?? [];
  const context = linear(text.context, weights, "context_embedder");
  const bias = changes.hidden && maskOf(changes.hidden, context.rows + x.rows);
  for (let i = 0; i < config.num_layers; i++) {
    if (changes.skip?.includes(i)) continue;
    const options = {
      bias, silence: changes.silence?.block === i ? changes.silence.head : undefined,
      record: record && ((head, map) => record(i, head, map)),
    };
    scratch(() => jointBlock(context, x, text.modulations.blocks[i], step, weights,
      `joint_blocks.${i}`, heads, options));
    if (controls[i]) add(x, controls[i]);
  }
  const [shift, scale] = chunks(text.modulations.final, step, x.columns);
  const last = linear(modulate(layerNorm(x, 1e-6), shift, scale), weights, "final_layer.linear");
  return unpatchify(last, side, side, p, config.out_channels);
}

// −∞ for every query at the hidden keys: (1, length, length).
function maskOf(hidden, length) {
  const bias = new Float32Array(length * length);
  for (let query = 0; query < length; query++) {
    for (const key of hidden) bias[query * length + key] = -Infinity;
  }
  return bias;
}
