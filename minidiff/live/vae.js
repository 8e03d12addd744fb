// Chapter 3: the decoder of the autoencoder, from latents to pixels.
"use strict";

// A picture with its channels side by side and a rim of one cell around it, so that a
// convolution is nine products with the whole picture, shifted by a cell each way. Only
// what comes out of `normalized` and `enlarged` has zeros in the rim.
class Picture extends Matrix {
  constructor(height, width, channels) {
    super((height + 2) * (width + 2) + 2, channels);
    this.height = height;
    this.width = width;
  }

  // The first number of the cell in row y and column x.
  at(y, x) {
    return ((y + 1) * (this.width + 2) + x + 1) * this.columns;
  }

  // Call f(start, end) with the place of each row of cells, without the rim.
  eachRow(f) {
    for (let y = 0; y < this.height; y++) f(this.at(y, 0), this.at(y, this.width));
  }
}

// Latents (C, h, w) as a picture.
function pictureOf(latents, channels, height, width) {
  const x = new Picture(height, width, channels);
  x.data.fill(0);
  for (let c = 0; c < channels; c++) {
    for (let i = 0; i < height * width; i++) {
      x.data[x.at(Math.floor(i / width), i % width) + c] = latents[c * height * width + i];
    }
  }
  return x;
}

// A 3 × 3 convolution: weights (9, N / 8, C, 8).
function convolve(x, weights, name) {
  const taps = weights[`${name}.weight`], [, panels, inner] = taps.shape;
  const y = new Picture(x.height, x.width, PANEL * panels);
  for (let i = 0; i < y.rows; i++) y.data.set(weights[`${name}.bias`], i * y.columns);
  const first = x.width + 3, last = x.height * (x.width + 2) + x.width + 1;
  for (let tap = 0; tap < 9; tap++) {
    const shift = (Math.floor(tap / 3) - 1) * (x.width + 2) + (tap % 3) - 1;
    const size = panels * inner * PANEL;
    const w = Object.assign(taps.subarray(tap * size, (tap + 1) * size), { shape: taps.shape });
    const cells = { columns: x.columns, data: x.data.subarray((first + shift) * x.columns) };
    const out = { columns: y.columns, data: y.data.subarray(first * y.columns) };
    addProduct(cells, w, out, 0, last - first);
  }
  return y;
}

// Group normalisation, then SiLU unless told otherwise; zeros in the rim.
function normalized(x, weights, name, groups, activate = silu) {
  const weight = weights[`${name}.weight`], bias = weights[`${name}.bias`];
  const y = new Picture(x.height, x.width, x.columns), size = x.columns / groups;
  const sums = new Float64Array(groups), squares = new Float64Array(groups);
  const each = (f) => x.eachRow((start, end) => {
    for (let at = start, c = 0; at < end; at++, c = c + 1 === x.columns ? 0 : c + 1) f(at, c);
  });
  const group = Uint16Array.from({ length: x.columns }, (_, c) => Math.floor(c / size));
  const count = x.height * x.width * size;
  each((at, c) => { sums[group[c]] += x.data[at]; });
  const mean = sums.map((sum) => sum / count);
  each((at, c) => { squares[group[c]] += (x.data[at] - mean[group[c]]) ** 2; });
  const scale = squares.map((square) => 1 / Math.sqrt(square / count + 1e-6));
  y.data.fill(0);
  each((at, c) => {
    const g = group[c];
    y.data[at] = activate((x.data[at] - mean[g]) * scale[g] * weight[c] + bias[c]);
  });
  return y;
}

function resnetBlock(x, weights, name, groups) {
  let h = convolve(normalized(x, weights, `${name}.norm1`, groups), weights, `${name}.conv1`);
  h = convolve(normalized(h, weights, `${name}.norm2`, groups), weights, `${name}.conv2`);
  const shortcut = `${name}.nin_shortcut`;
  if (`${shortcut}.weight` in weights) {
    x = linear(x, weights, shortcut, new Picture(x.height, x.width, h.columns));
  }
  return add(h, x);
}

// Every cell attends to every other, with one head.
function attentionBlock(x, weights, name, groups) {
  const h = normalized(x, weights, `${name}.norm`, groups, (value) => value);
  const tokens = new Matrix(x.height * x.width, x.columns);
  let at = 0;
  h.eachRow((start, end) => {
    tokens.data.set(h.data.subarray(start, end), at);
    at += end - start;
  });
  const qkv = project(tokens, weights, ["q", "k", "v"].map((part) => `${name}.${part}`));
  const read = linear(attend(qkv, 1), weights, `${name}.proj_out`);
  at = 0;
  x.eachRow((start, end) => {
    for (let i = start; i < end; i++) x.data[i] += read.data[at++];
  });
  return x;
}

// Twice the sides, each cell four times; zeros in the rim.
function enlarged(x) {
  const y = new Picture(2 * x.height, 2 * x.width, x.columns);
  y.data.fill(0);
  for (let row = 0; row < y.height; row++) {
    for (let column = 0; column < y.width; column++) {
      const from = x.at(row >> 1, column >> 1);
      y.data.set(x.data.subarray(from, from + x.columns), y.at(row, column));
    }
  }
  return y;
}

// Scaled latents (C, h, w) → pixels (H·W, 3) in [0, 1].
function decode(latents, height, width, weights, config) {
  const groups = config.norm_num_groups, levels = config.block_out_channels.length;
  const unscaled = latents.map((x) => x / config.scaling_factor + config.shift_factor);
  let x = pictureOf(unscaled, config.latent_channels, height, width);
  x = convolve(x, weights, "conv_in");
  x = resnetBlock(x, weights, "mid.block_1", groups);
  x = attentionBlock(x, weights, "mid.attn_1", groups);
  x = resnetBlock(x, weights, "mid.block_2", groups);
  for (let level = levels - 1; level >= 0; level--) { // up.0 is the finest
    for (let i = 0; i <= config.layers_per_block; i++) {
      x = resnetBlock(x, weights, `up.${level}.block.${i}`, groups);
    }
    if (level) x = convolve(enlarged(x), weights, `up.${level}.upsample.conv`);
  }
  x = convolve(normalized(x, weights, "norm_out", groups), weights, "conv_out");
  const pixels = new Float32Array(3 * x.height * x.width);
  for (let i = 0; i < pixels.length; i++) {
    const cell = Math.floor(i / 3), value = x.data[
      x.at(Math.floor(cell / x.width), cell % x.width) + (i % 3)];
    pixels[i] = Math.min(Math.max(value / 2 + 0.5, 0), 1);
  }
  return pixels;
}
