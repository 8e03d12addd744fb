// Chapter 3: the autoencoder, from latents to pixels and back.
"use strict";

// A picture with its channels side by side and a rim of one cell around it, so that three
// neighbours in a row are one run of numbers. Only what comes out of `pictureOf`,
// `normalized`, `enlarged` and `rimmed` has zeros in the rim.
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

// A 3 × 3 convolution, weights (3, N / 8, 3·C, 8): for each row of the nine a product with
// the whole picture, whose rows of 3·C numbers overlap: a cell and its two neighbours.
function convolve(x, weights, name) {
  const kernel = weights[`${name}.weight`], bias = weights[`${name}.bias`];
  const [, panels, inner] = kernel.shape, size = panels * inner * PANEL;
  const y = new Picture(x.height, x.width, PANEL * panels);
  for (let i = 0; i < y.rows; i++) y.data.set(bias, i * y.columns);
  const first = x.width + 3, last = x.height * (x.width + 2) + x.width + 1;
  const out = { columns: y.columns, data: y.data.subarray(first * y.columns) };
  for (let row = 0; row < 3; row++) {
    const left = first + (row - 1) * (x.width + 2) - 1;
    const cells = { columns: x.columns, data: x.data.subarray(left * x.columns) };
    const part = kernel.subarray(row * size, (row + 1) * size);
    addProduct(cells, Object.assign(part, { shape: kernel.shape }), out, 0, last - first);
  }
  return y;
}

// Group normalisation, which is one factor and one term for each channel, then SiLU
// unless told otherwise; zeros in the rim.
function normalized(x, weights, name, groups, activate = silu) {
  const { columns, data } = x, y = new Picture(x.height, x.width, columns);
  const { factor, term } = normalization(x, weights, name, groups), normed = y.data;
  normed.fill(0);
  x.eachRow((start, end) => {
    for (let at = start; at < end; at += columns) {
      for (let c = 0; c < columns; c++) normed[at + c] = data[at + c] * factor[c] + term[c];
    }
  });
  return activate(y);
}

// What takes each group of channels to mean 0 and variance 1, with the layer's weights.
function normalization(x, weights, name, groups) {
  const { columns, data } = x, size = columns / groups, count = x.height * x.width * size;
  const weight = weights[`${name}.weight`], bias = weights[`${name}.bias`];
  const sums = new Float64Array(columns), squares = new Float64Array(columns);
  x.eachRow((start, end) => {
    for (let at = start; at < end; at += columns) {
      for (let c = 0; c < columns; c++) {
        sums[c] += data[at + c];
        squares[c] += data[at + c] ** 2;
      }
    }
  });
  const mean = (of, c) => { // over the group of channel c
    const first = c - (c % size);
    return of.subarray(first, first + size).reduce((a, b) => a + b) / count;
  };
  const factor = weight.map((w, c) =>
    w / Math.sqrt(mean(squares, c) - mean(sums, c) ** 2 + 1e-6));
  return { factor, term: bias.map((b, c) => b - mean(sums, c) * factor[c]) };
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

// The same picture with zeros in the rim.
function rimmed(x) {
  const y = new Picture(x.height, x.width, x.columns);
  y.data.fill(0);
  x.eachRow((start, end) => y.data.set(x.data.subarray(start, end), start));
  return y;
}

// Half the sides, of what a convolution made: the cells that a stride of 2 meets. They are
// the odd ones, because the chapter pads below and to the right alone.
function halved(x) {
  const y = new Picture(x.height / 2, x.width / 2, x.columns);
  for (let row = 0; row < y.height; row++) {
    for (let column = 0; column < y.width; column++) {
      const from = x.at(2 * row + 1, 2 * column + 1);
      y.data.set(x.data.subarray(from, from + x.columns), y.at(row, column));
    }
  }
  return y;
}

function middle(x, weights, groups) {
  x = resnetBlock(x, weights, "mid.block_1", groups);
  x = attentionBlock(x, weights, "mid.attn_1", groups);
  return resnetBlock(x, weights, "mid.block_2", groups);
}

// A picture (C, H, W) in [−1, 1] → the most likely latents (C, h, w), scaled.
function encode(picture, height, width, weights, config) {
  const groups = config.norm_num_groups, levels = config.block_out_channels.length;
  let x = pictureOf(picture, config.in_channels, height, width);
  x = convolve(x, weights, "conv_in");
  for (let level = 0; level < levels; level++) {
    for (let i = 0; i < config.layers_per_block; i++) {
      x = resnetBlock(x, weights, `down.${level}.block.${i}`, groups);
    }
    const name = `down.${level}.downsample.conv`;
    if (level < levels - 1) x = halved(convolve(rimmed(x), weights, name));
  }
  x = middle(x, weights, groups);
  x = convolve(normalized(x, weights, "norm_out", groups), weights, "conv_out");
  const latents = new Float32Array(config.latent_channels * x.height * x.width);
  for (let i = 0; i < latents.length; i++) {
    const cells = x.height * x.width, cell = i % cells;
    const mean = x.data[x.at(Math.floor(cell / x.width), cell % x.width) + Math.floor(i / cells)];
    latents[i] = (mean - config.shift_factor) * config.scaling_factor;
  }
  return latents;
}

// Scaled latents (C, h, w) → pixels (H·W, 3) in [0, 1].
function decode(latents, height, width, weights, config) {
  const groups = config.norm_num_groups, levels = config.block_out_channels.length;
  const unscaled = latents.map((x) => x / config.scaling_factor + config.shift_factor);
  let x = pictureOf(unscaled, config.latent_channels, height, width);
  x = convolve(x, weights, "conv_in");
  x = middle(x, weights, groups);
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
