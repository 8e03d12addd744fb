// Chapter 2: from ids to a context, a row for each token, and a pooled vector.
"use strict";

// Rows of a table (vocabulary, D) for ids.
function embed(table, ids) {
  const width = table.shape[1], x = new Matrix(ids.length, width);
  ids.forEach((id, i) => x.data.set(table.subarray(id * width, (id + 1) * width), i * width));
  return x;
}

// Queries, keys and values (L, 3·D) of three linear layers.
function project(x, weights, names) {
  const width = PANEL * weights[`${names[0]}.weight`].shape.at(-3);
  const qkv = new Matrix(x.rows, 3 * width);
  names.forEach((name, i) => linear(x, weights, name, qkv, i * width));
  return qkv;
}

// CLIP's text tower: the states (L, D) that enter its last layer, and the pooled vector.
function clip(ids, weights, config) {
  const norm = (x, name) => layerNorm(x, config.layer_norm_eps,
    weights[`${name}.weight`], weights[`${name}.bias`]);
  const activation = { quick_gelu: quickGelu, gelu }[config.hidden_act];
  const later = Float32Array.from({ length: ids.length ** 2 }, (_, at) =>
    at % ids.length > Math.floor(at / ids.length) ? -Infinity : 0);
  const root = "text_model";
  let x = embed(weights[`${root}.embeddings.token_embedding.weight`], ids);
  const places = weights[`${root}.embeddings.position_embedding.weight`];
  add(x, { data: places.subarray(0, x.data.length) });
  let states = x;
  for (let i = 0; i < config.num_hidden_layers; i++) {
    const layer = `${root}.encoder.layers.${i}`;
    states = x.copy();
    const qkv = project(norm(x, `${layer}.layer_norm1`), weights,
      ["q", "k", "v"].map((part) => `${layer}.self_attn.${part}_proj`));
    const read = attend(qkv, config.num_attention_heads, { bias: later });
    add(x, linear(read, weights, `${layer}.self_attn.out_proj`));
    const inner = linear(norm(x, `${layer}.layer_norm2`), weights, `${layer}.mlp.fc1`);
    add(x, linear(activation(inner), weights, `${layer}.mlp.fc2`));
  }
  const end = config.eos_token_id === 2 // the first of the largest ids, as of old
    ? ids.indexOf(Math.max(...ids)) : Math.max(0, ids.indexOf(config.eos_token_id));
  const last = norm(x.part(end, end + 1), `${root}.final_layer_norm`);
  return { states, pooled: linear(last, weights, "text_projection") };
}

// T5's encoder: states (L, D). Nothing is scaled, and a bias by distance tells the order.
function t5(ids, weights, config) {
  const norm = (x, name) => {
    const y = x.copy();
    rmsNorm(y.data, 0, y.data.length, weights[`${name}.weight`], config.layer_norm_epsilon);
    return y;
  };
  const x = embed(weights["shared.weight"], ids);
  const bias = positionBias(ids.length, weights, config);
  for (let i = 0; i < config.num_layers; i++) {
    const [first, second] = [0, 1].map((j) => `encoder.block.${i}.layer.${j}`);
    const qkv = project(norm(x, `${first}.layer_norm`), weights,
      ["q", "k", "v"].map((part) => `${first}.SelfAttention.${part}`));
    const read = attend(qkv, config.num_heads, { scale: 1, bias });
    add(x, linear(read, weights, `${first}.SelfAttention.o`));
    const normed = norm(x, `${second}.layer_norm`);
    const gate = geluTanh(linear(normed, weights, `${second}.DenseReluDense.wi_0`));
    const value = linear(normed, weights, `${second}.DenseReluDense.wi_1`);
    for (let j = 0; j < gate.data.length; j++) gate.data[j] *= value.data[j];
    add(x, linear(gate, weights, `${second}.DenseReluDense.wo`));
  }
  return norm(x, "encoder.final_layer_norm");
}

// What each head adds to the product of each query with each key: (H, L, L).
function positionBias(length, weights, config) {
  const table = weights["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"];
  const [rows, heads] = table.shape, bias = new Float32Array(heads * length * length);
  let at = 0;
  for (let h = 0; h < heads; h++) {
    for (let query = 0; query < length; query++) {
      for (let key = 0; key < length; key++) {
        const row = bucketOf(key - query, rows, config.relative_attention_max_distance);
        bias[at++] = table[row * heads + h];
      }
    }
  }
  return bias;
}

// The row for a key `offset` places after the query: exact near by, logarithmic far off.
function bucketOf(offset, buckets, reach) {
  const half = buckets / 2, exact = half / 2, n = Math.abs(offset);
  const ahead = offset > 0 ? half : 0;
  if (n < exact) return n + ahead;
  const fraction = Math.fround(Math.fround(Math.log(n / exact)) / Math.log(reach / exact));
  return Math.min(exact + Math.floor(fraction * (half - exact)), half - 1) + ahead;
}

// CLIP-L beside CLIP-G, filled up to T5's width, then T5's rows: (L + L_t, D).
function assemble(clipL, clipG, rowsT5) {
  const context = new Matrix(clipL.rows + rowsT5.rows, rowsT5.columns);
  context.data.fill(0);
  const room = Math.max(0, context.columns - clipL.columns);
  for (let i = 0; i < clipL.rows; i++) {
    const left = clipL.data.subarray(i * clipL.columns, (i + 1) * clipL.columns);
    const right = clipG.data.subarray(i * clipG.columns, (i + 1) * clipG.columns);
    context.data.set(left.subarray(0, context.columns), i * context.columns);
    context.data.set(right.subarray(0, room), i * context.columns + clipL.columns);
  }
  context.data.set(rowsT5.data, clipL.rows * context.columns);
  return context;
}
