// Chapter 11: a ControlNet, which reads a sketch and says where its edges go.
"use strict";

// A sketch of side² numbers, 1 on an edge and 0 elsewhere, → its scaled latents (C, h, w).
function encodeSketch(sketch, side, weights, config) {
  const picture = new Float32Array(config.in_channels * side ** 2);
  for (let i = 0; i < picture.length; i++) picture[i] = 2 * sketch[i % side ** 2] - 1;
  return encode(picture, side, side, weights, config);
}

// A block of the picture's stream alone: its patches read one another. In place.
function imageBlock(x, m, weights, name, heads) {
  const qkv = new Matrix(x.rows, 3 * x.columns);
  const normed = modulate(layerNorm(x, 1e-6), m[0], m[1]);
  projectHeads(normed, weights, `${name}.attn`, qkv, x.columns);
  takeUp(x, attend(qkv, heads), m, weights, name);
}

// One of the net's answers for each block of the transformer but the last.
const spread = (said, blocks) => Array.from({ length: blocks - 1 }, (_, i) =>
  said[Math.floor((i * said.length) / blocks)]);

// What the net adds behind `blocks` blocks of a transformer, times `strength`: a function
// of the tokens (N, D), which have their places already, and a step.
function steering({ condition, strength }, side, times, pooled, weights, config, blocks) {
  const name = (k) => `transformer_blocks.${k}`, count = [...Array(config.num_layers).keys()];
  const c = conditioning(times, pooled, weights);
  const modulation = count.map((k) => linear(c, weights, `${name(k)}.adaLN_modulation.1`));
  const seen = embedPatches(condition, side, side, weights, "pos_embed_input", config);
  return (tokens, step) => {
    const x = add(tokens.copy(), seen);
    const said = count.map((k) => {
      const m = chunks(modulation[k], step, x.columns);
      scratch(() => imageBlock(x, m, weights, name(k), config.num_attention_heads));
      return scaled(linear(x, weights, `controlnet_blocks.${k}`), strength);
    });
    return spread(said, blocks);
  };
}
