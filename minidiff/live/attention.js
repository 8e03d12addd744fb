// Chapter 4: softmax(q kᵀ / √d) v in every head.
"use strict";

// Attention over `length` tokens whose queries, keys and values lie side by side in the
// rows of qkv (length, 3·D): what each token has read, (length, D), heads side by side.
//
// bias: numbers (H or 1, length, length) added to the scaled products, for order (T5),
// causality (CLIP) and masks. record(head, weights) sees each head's weights, a Matrix
// whose rows are queries and whose first `length` columns are keys.
function attend(qkv, heads, { scale, bias, record } = {}) {
  const length = qkv.rows, width = qkv.columns / 3, d = width / heads;
  const read = new Matrix(length, width);
  read.data.fill(0);
  scale ??= 1 / Math.sqrt(d);
  for (let h = 0; h < heads; h++) {
    scratch(() => {
      const keys = panelsOfKeys(qkv, width + h * d, d, scale);
      const weights = new Matrix(length, PANEL * keys.shape[0]);
      weights.data.fill(0);
      const queries = column(qkv, h * d);
      addProduct(queries, keys, weights);
      softmaxRows(weights, length, bias, bias?.length > length * length ? h * length * length : 0);
      record?.(h, weights);
      addProduct(weights, panelsOfValues(qkv, 2 * width + h * d, d), read, h * d);
    });
  }
  return read;
}

// The same rows, seen from a later column on: the kernel steps from row to row.
const column = (x, start) =>
  ({ rows: x.rows, columns: x.columns, data: x.data.subarray(start) });

// Keys (L, d), scaled, as the kernel's right side: (⌈L / 8⌉, d, 8), the rest zeros.
function panelsOfKeys(x, start, d, scale) {
  const panels = Math.ceil(x.rows / PANEL), packed = floats(panels * d * PANEL);
  packed.fill(0);
  for (let i = 0; i < x.rows; i++) {
    const to = Math.floor(i / PANEL) * d * PANEL + (i % PANEL), from = i * x.columns + start;
    for (let c = 0; c < d; c++) packed[to + c * PANEL] = scale * x.data[from + c];
  }
  return Object.assign(packed, { shape: [panels, d, PANEL] });
}

// Values (L, d) as the kernel's right side: (d / 8, L rounded up, 8), the rest zeros.
function panelsOfValues(x, start, d) {
  const rows = Math.ceil(x.rows / PANEL) * PANEL, packed = floats(rows * d);
  packed.fill(0);
  for (let i = 0; i < x.rows; i++) {
    for (let c = 0; c < d; c += PANEL) {
      const from = i * x.columns + start + c;
      packed.set(x.data.subarray(from, from + PANEL), c * rows + i * PANEL);
    }
  }
  return Object.assign(packed, { shape: [d / PANEL, rows, PANEL] });
}

// In place: each row's first `length` numbers, plus bias, through a softmax.
function softmaxRows(x, length, bias, from) {
  const { data, columns } = x;
  for (let i = 0; i < x.rows; i++) {
    const at = i * columns, b = from + i * length;
    let most = -Infinity, total = 0;
    for (let j = 0; bias && j < length; j++) data[at + j] += bias[b + j];
    for (let j = 0; j < length; j++) most = Math.max(most, data[at + j]);
    memory.exp(data.byteOffset + 4 * at, length, most);
    for (let j = 0; j < length; j++) total += data[at + j];
    for (let j = 0; j < length; j++) data[at + j] /= total;
    data.fill(0, at + length, at + columns);
  }
}
