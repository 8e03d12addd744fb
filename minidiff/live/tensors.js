// Memory that the kernel shares, matrices in it, and the layers that all chapters use.
"use strict";

const PANEL = 8; // columns that the kernel works on at once; it takes four rows
const SPACE_TO_WORK = 64 * 2 ** 20; // bytes for what one call of a network computes

const memory = {};

// Open memory for `floats` weights, and the kernel (its bytes) on it.
async function openMemory(kernel, floats) {
  const pages = Math.ceil((4 * floats + SPACE_TO_WORK) / 65536);
  try {
    memory.buffer = new WebAssembly.Memory({ initial: pages });
  } catch {
    throw new Error(`the browser gives no ${Math.ceil(pages / 16)} MB of memory for the model`);
  }
  memory.all = new Float32Array(memory.buffer.buffer);
  memory.top = 0; // in floats
  const imports = { minidiff: { memory: memory.buffer } };
  Object.assign(memory, (await WebAssembly.instantiate(kernel, imports)).instance.exports);
}

// `count` floats, not cleared, beginning at a multiple of 16 bytes.
function floats(count) {
  const start = memory.top;
  memory.top += Math.ceil(count / 4) * 4;
  if (memory.top > memory.all.length) throw new Error("out of memory for this model");
  return memory.all.subarray(start, start + count);
}

// What `work` returns; the matrices that it made are given back.
function scratch(work) {
  const top = memory.top;
  try {
    return work();
  } finally {
    memory.top = top;
  }
}

// Rows of `columns` numbers one after the other. The kernel may write to three more.
class Matrix {
  constructor(rows, columns) {
    this.rows = rows;
    this.columns = columns;
    this.data = floats((rows + 3) * columns).subarray(0, rows * columns);
  }

  // The rows from `start` up to `end`, in the same memory.
  part(start, end) {
    const { columns, data } = this;
    return Object.assign(Object.create(Matrix.prototype), {
      rows: end - start, columns, data: data.subarray(start * columns, end * columns),
    });
  }

  copy() {
    const copied = new Matrix(this.rows, this.columns);
    copied.data.set(this.data);
    return copied;
  }

  static from(rows, columns, values) {
    const made = new Matrix(rows, columns);
    made.data.set(values);
    return made;
  }
}

// The weights of a part: half-precision `bytes` (ArrayBuffer) as floats, by name. A
// table's entry is [offset, ...shape]; products' weights lie in the kernel's panels.
function readWeights(table, bytes) {
  const halves = new Uint16Array(bytes), all = floats(halves.length);
  for (let i = 0; i < halves.length; i++) all[i] = HALF[halves[i]];
  const weights = {};
  for (const [name, [offset, ...shape]] of Object.entries(table)) {
    const size = shape.reduce((a, b) => a * b, 1);
    weights[name] = Object.assign(all.subarray(offset, offset + size), { shape });
  }
  return weights;
}

// The value of each of the 65,536 half-precision numbers (IEEE 754, binary16).
const HALF = Float32Array.from({ length: 65536 }, (_, bits) => {
  const sign = bits >> 15 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
});

// x (rows, K) · w in panels (N / 8, K, 8), added to the columns of y from `column` on.
function addProduct(x, w, y, column = 0, rows = x.rows) {
  const [panels, inner] = w.shape.slice(-3);
  memory.matmul(x.data.byteOffset, w.byteOffset, y.data.byteOffset + 4 * column, rows,
    inner, PANEL * panels, 4 * x.columns, 4 * y.columns);
}

// x (rows, K) → (rows, N), nn.Linear `name`; into the columns of y from `column` on.
function linear(x, weights, name, y, column = 0) {
  const w = weights[`${name}.weight`], bias = weights[`${name}.bias`];
  const width = PANEL * w.shape.at(-3);
  y ??= new Matrix(x.rows, width);
  for (let i = 0, at = column; i < x.rows; i++, at += y.columns) {
    if (bias) y.data.set(bias, at);
    else y.data.fill(0, at, at + width);
  }
  addProduct(x, w, y, column);
  return y;
}

// Each row to mean 0 and variance 1; times `weight` plus `bias` where there are any.
function layerNorm(x, eps, weight, bias) {
  const { rows, columns, data } = x, y = new Matrix(rows, columns), normed = y.data;
  for (let i = 0, at = 0; i < rows; i++, at += columns) {
    let mean = 0, variance = 0;
    for (let j = 0; j < columns; j++) mean += data[at + j];
    mean /= columns;
    for (let j = 0; j < columns; j++) variance += (data[at + j] - mean) ** 2;
    const scale = 1 / Math.sqrt(variance / columns + eps);
    for (let j = 0; j < columns; j++) {
      const value = (data[at + j] - mean) * scale;
      normed[at + j] = weight ? value * weight[j] + bias[j] : value;
    }
  }
  return y;
}

// In place, each group of weight.length numbers divided by its root mean square.
function rmsNorm(data, start, end, weight, eps) {
  const width = weight.length;
  for (let at = start; at < end; at += width) {
    let square = 0;
    for (let j = 0; j < width; j++) square += data[at + j] ** 2;
    const scale = 1 / Math.sqrt(square / width + eps);
    for (let j = 0; j < width; j++) data[at + j] *= scale * weight[j];
  }
}

// In place: x + y.
function add(x, { data: other }) {
  const { data } = x;
  for (let i = 0; i < data.length; i++) data[i] += other[i];
  return x;
}

// In place: factor · x.
function scaled(x, factor) {
  const { data } = x;
  for (let i = 0; i < data.length; i++) data[i] *= factor;
  return x;
}

// In place: x · sigmoid(a·x + b·x³), the form that most activations have.
function gate(x, a, b) {
  memory.gate(x.data.byteOffset, x.data.length, a, b);
  return x;
}

const silu = (x) => gate(x, 1, 0);
const quickGelu = (x) => gate(x, 1.702, 0);
const TWICE = 2 * Math.sqrt(2 / Math.PI);
const geluTanh = (x) => gate(x, TWICE, 0.044715 * TWICE); // (1 + tanh u) / 2 = sigmoid(2u)

// In place: x · (1 + erf(x / √2)) / 2.
function gelu(x) {
  const { data } = x;
  for (let i = 0; i < data.length; i++) data[i] *= 0.5 * (1 + erf(data[i] / Math.SQRT2));
  return x;
}

// The error function to 1.5e-7 (Abramowitz and Stegun 1964, 7.1.26).
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const sum = t * (0.254829592 + t * (-0.284496736
    + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
  return Math.sign(x) * (1 - sum * Math.exp(-x * x));
}
