// Chapter 6 in the plane: the exact velocity of a few points, and solvers that follow it.
"use strict";

// The velocity of least loss for data `points`, at all points of x (x0, y0, x1, y1, …).
const exactVelocity = (points) => (x, sigma) => {
  const v = new Float32Array(x.length);
  for (let i = 0; i < x.length; i += 2) {
    const scores = points.map(([px, py]) =>
      -((x[i] - (1 - sigma) * px) ** 2 + (x[i + 1] - (1 - sigma) * py) ** 2) / (2 * sigma ** 2));
    const most = Math.max(...scores), weights = scores.map((score) => Math.exp(score - most));
    const total = weights.reduce((sum, weight) => sum + weight, 0);
    const mean = (axis) => points.reduce((sum, p, j) => sum + weights[j] * p[axis], 0) / total;
    v[i] = (x[i] - mean(0)) / sigma;
    v[i + 1] = (x[i + 1] - mean(1)) / sigma;
  }
  return v;
};

// The velocity of a small network (field.py), whose `layers` have weights (out, in) and
// biases, for a prompt of two numbers, at all points of x (x0, y0, x1, y1, …).
const learnedVelocity = (layers, prompt) => (x, sigma) => {
  const waves = [1, 2, 4, 8].map((k) => Math.PI * k * sigma), v = new Float32Array(x.length);
  const told = [...waves.map(Math.sin), ...waves.map(Math.cos), ...prompt];
  for (let i = 0; i < x.length; i += 2) {
    let h = [x[i], x[i + 1], ...told];
    layers.forEach(({ weight, bias }, at) => {
      const next = bias.slice();
      for (let o = 0, w = 0; o < next.length; o++) {
        for (let j = 0; j < h.length; j++) next[o] += weight[w++] * h[j];
        if (at < layers.length - 1) next[o] /= 1 + Math.exp(-next[o]); // SiLU
      }
      h = next;
    });
    v.set(h, i);
  }
  return v;
};

// Two half circles of `count` points each, every axis with mean 0 and deviation 1.
function twoMoons(count) {
  const upper = Array.from({ length: count }, (_, i) => {
    const angle = (Math.PI * i) / (count - 1);
    return [Math.cos(angle), Math.sin(angle)];
  });
  const points = [...upper, ...upper.map(([x, y]) => [1 - x, 0.5 - y])];
  const scaled = [0, 1].map((axis) => {
    const values = points.map((point) => point[axis]);
    const mean = values.reduce((a, b) => a + b) / values.length;
    const square = values.reduce((sum, value) => sum + (value - mean) ** 2, 0);
    return values.map((value) => (value - mean) / Math.sqrt(square / (values.length - 1)));
  });
  return points.map((_, i) => [scaled[0][i], scaled[1][i]]);
}

minidiff.plane = (figure) => {
  const { make } = minidiff, SIDE = 420, REACH = 3.2, COUNT = 120;
  const data = twoMoons(COUNT / 2);
  // for each its points, and what the network is told
  const prompts = { "upper moon": [data.slice(0, COUNT / 2), [1, 0]],
    "lower moon": [data.slice(COUNT / 2), [0, 1]], "none: both": [data, [0, 0]] };
  const state = { field: "exact", prompt: "upper moon", solver: "euler", steps: 8, shift: 1,
    guidance: 1, at: 8 };
  const start = randn(2 * COUNT, 0);
  const box = make("div", figure, { className: "live-box" });
  const frame = make("div", box, { className: "live-picture" });
  const canvas = make("canvas", frame, { width: 2 * SIDE, height: 2 * SIDE }, { role: "img" });
  const side = make("div", box, { className: "live-side" });
  const rows = make("div", side, { className: "live-controls" });
  const said = make("p", side, { className: "live-status" }, { role: "status" });
  const shows = [];

  const choose = (name, options) => {
    const label = make("label", rows, { textContent: name });
    const input = make("select", label);
    options.forEach((value) => make("option", input, { value, textContent: value }));
    input.onchange = () => { state[name] = input.value; draw(); };
  };
  const slide = (name, min, max, step, tell = String) => {
    const label = make("label", rows, { textContent: name });
    const input = make("input", label, { type: "range", min, max, step }, { "aria-label": name });
    const output = make("output", label, {}, { "aria-live": "off" });
    input.oninput = () => {
      state[name] = Number(input.value);
      if (name === "steps") state.at = state.steps;
      draw();
    };
    shows.push(() => {
      if (name === "at") input.max = state.steps;
      input.value = state[name];
      output.textContent = tell(state[name]);
      input.setAttribute("aria-valuetext", output.textContent);
    });
  };
  choose("field", ["exact", "learned"]);
  choose("prompt", Object.keys(prompts));
  choose("solver", Object.keys(SAMPLERS));
  slide("steps", 1, 40, 1);
  slide("shift", 0.5, 6, 0.5);
  slide("guidance", -1, 8, 0.5);
  slide("at", 0, 40, 1, (step) => `step ${step}`);

  async function draw() {
    const [points] = prompts[state.prompt];
    if (state.field === "learned" && !minidiff.field) await minidiff.script("field.js");
    const [own, both] = [prompts[state.prompt], prompts["none: both"]].map(([points, prompt]) =>
      state.field === "exact" ? exactVelocity(points) : learnedVelocity(minidiff.field, prompt));
    const velocity = (x, sigma) => state.guidance === 1 ? own(x, sigma)
      : guide(both(x, sigma), own(x, sigma), state.guidance);
    const sigmas = Array.from({ length: state.steps + 1 }, (_, i) =>
      shiftSigma(1 - i / state.steps, state.shift));
    const path = [start];
    for (const { x } of SAMPLERS[state.solver](velocity, path[0], sigmas)) path.push(x);
    state.at = Math.min(state.at, state.steps);
    shows.forEach((show) => show());
    paint(path, points, velocity, sigmas[state.at]);
    const last = path.at(-1);
    const misses = Array.from({ length: COUNT }, (_, i) => Math.min(...points.map(([x, y]) =>
      Math.hypot(x - last[2 * i], y - last[2 * i + 1]))));
    const mean = misses.reduce((a, b) => a + b) / COUNT, hits = misses.filter((m) => m < 0.005);
    const calls = state.solver === "heun" ? 2 * state.steps - 1 : state.steps;
    said.textContent = `After ${calls} calls of the ${state.field} velocity the points end `
      + `${mean.toFixed(3)} away from the nearest point of the prompt's, on average; `
      + `${hits.length} of ${COUNT} end on it (within 0.005).`;
    canvas.setAttribute("aria-label", `the flow at step ${state.at}. ${said.textContent}`);
  }

  function paint(path, points, velocity, sigma) {
    const context = canvas.getContext("2d"), ink = getComputedStyle(figure).color;
    const across = (x) => SIDE * (1 + x / REACH), down = (y) => SIDE * (1 - y / REACH);
    context.clearRect(0, 0, 2 * SIDE, 2 * SIDE);
    const stroke = (color, width, alpha, trace) => {
      Object.assign(context, { strokeStyle: color, lineWidth: width, globalAlpha: alpha });
      context.beginPath();
      trace();
      context.stroke();
    };
    if (sigma > 0) stroke(ink, 2, 0.35, () => { // against the velocity: where the solver goes
      const grid = Array.from({ length: 15 }, (_, i) => (i - 7) * 0.43);
      for (const y of grid) for (const x of grid) {
        const v = velocity(Float32Array.of(x, y), sigma), size = Math.hypot(v[0], v[1]) || 1;
        const length = 0.28 * Math.min(1, size / 2) / size;
        context.moveTo(across(x), down(y));
        context.lineTo(across(x - length * v[0]), down(y - length * v[1]));
      }
    });
    for (let i = 0; i < 2 * COUNT; i += 2) stroke("#3f88c5", 1.5, 0.35, () => {
      path.slice(0, state.at + 1).forEach((x, step) =>
        context[step ? "lineTo" : "moveTo"](across(x[i]), down(x[i + 1])));
    });
    const dots = (color, points, radius) => {
      Object.assign(context, { fillStyle: color, globalAlpha: 1 });
      for (const [x, y] of points) {
        context.beginPath();
        context.arc(across(x), down(y), radius, 0, 2 * Math.PI);
        context.fill();
      }
    };
    const now = path[state.at];
    dots("#e0762b", points, 7);
    dots("#3f88c5", Array.from({ length: COUNT }, (_, i) => [now[2 * i], now[2 * i + 1]]), 5);
  }

  figure.prepend(box);
  figure.dataset.ready = "1";
  draw();
};
