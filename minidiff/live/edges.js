// Chapter 11: edges of a picture, as its `canny` finds them.
"use strict";

// pixels: side²·4 bytes → Uint8Array (side²), 1 on an edge.
minidiff.canny = (pixels, side, low = 100, high = 200) => {
  const inside = (n) => Math.min(Math.max(n, 0), side - 1);
  const each = (f) => Float32Array.from({ length: side ** 2 }, (_, i) =>
    f(Math.floor(i / side), i % side, i));
  const gray = each((y, x, i) =>
    Math.round([0.299, 0.587, 0.114].reduce((sum, part, c) => sum + part * pixels[4 * i + c], 0)));
  const at = (y, x) => gray[inside(y) * side + inside(x)];
  const slope = (f) => each((y, x) => [1, 2, 1].reduce((sum, weight, i) =>
    sum + weight * (f(y, x, i - 1, 1) - f(y, x, i - 1, -1)), 0));
  const right = slope((y, x, along, across) => at(y + along, x + across));
  const down = slope((y, x, along, across) => at(y + across, x + along));
  const size = each((y, x, i) => Math.abs(right[i]) + Math.abs(down[i]));
  const sizeAt = (y, x) => inside(y) === y && inside(x) === x ? size[y * side + x] : 0;
  const steepest = each((y, x, i) => { // across the slope; else 0
    const level = Math.abs(down[i]) < (Math.SQRT2 - 1) * Math.abs(right[i]);
    const upright = Math.abs(down[i]) > (Math.SQRT2 + 1) * Math.abs(right[i]);
    const [dy, dx] = level ? [0, 1] : upright ? [1, 0] : [1, right[i] * down[i] >= 0 ? 1 : -1];
    const before = sizeAt(y - dy, x - dx), after = sizeAt(y + dy, x + dx);
    const ridge = level || upright ? size[i] > before && size[i] >= after
      : size[i] > before && size[i] > after;
    return ridge ? size[i] : 0;
  });
  const edges = new Uint8Array(side ** 2), waiting = [];
  const grow = (y, x) => {
    const i = y * side + x;
    if (inside(y) !== y || inside(x) !== x || edges[i] || steepest[i] <= low) return;
    edges[i] = 1;
    waiting.push([y, x]);
  };
  steepest.forEach((size, i) => { if (size > high) grow(Math.floor(i / side), i % side); });
  while (waiting.length) {
    const [y, x] = waiting.pop();
    for (const dy of [-1, 0, 1]) for (const dx of [-1, 0, 1]) grow(y + dy, x + dx);
  }
  return edges;
};
