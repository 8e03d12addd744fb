// Chapter 6: the levels of noise to visit, guidance, and the solvers that walk them.
"use strict";

// Noise levels moved towards 1.
const shiftSigma = (sigma, shift) => (shift * sigma) / (1 + (shift - 1) * sigma);

// The steps + 1 levels of a drawing, from 1 down to 0: evenly spaced from 1 to the shifted
// lowest level of training, then shifted again.
function sigmaSchedule(steps, { shift, num_train_timesteps: count }) {
  const f = Math.fround, tiny = f(1 / count);
  const lowest = f(f(f(shift) * tiny) / f(1 + f(f(shift - 1) * tiny)));
  const gap = (lowest - 1) / (steps - 1 || 1);
  const even = Array.from({ length: steps }, (_, i) =>
    i < Math.floor(steps / 2) || steps === 1 ? 1 + gap * i : lowest - gap * (steps - 1 - i));
  return [...even.map((sigma) => f(shiftSigma(sigma, shift))), 0];
}

// a + scale · (b − a), number by number.
const guide = (a, b, scale) => a.map((value, i) => value + scale * (b[i] - value));

// The data that velocity v at x and level sigma points back to.
const denoised = (x, v, sigma) => x.map((value, i) => value - sigma * v[i]);

// The solvers yield { step, sigma, x, v, x0 } after each step, x being where it led.

function* euler(velocity, x, sigmas) {
  for (let step = 0; step + 1 < sigmas.length; step++) {
    const sigma = sigmas[step], h = Math.fround(sigmas[step + 1] - sigma);
    const v = velocity(x, sigma, step), x0 = denoised(x, v, sigma);
    x = x.map((value, i) => value + h * v[i]);
    yield { step, sigma, x, v, x0 };
  }
}

function* heun(velocity, x, sigmas) {
  for (let step = 0; step + 1 < sigmas.length; step++) {
    const sigma = sigmas[step], next = sigmas[step + 1], h = Math.fround(next - sigma);
    let v = velocity(x, sigma, step);
    const x0 = denoised(x, v, sigma);
    if (next > 0) {
      const ahead = velocity(x.map((value, i) => value + h * v[i]), next, step + 1);
      v = v.map((value, i) => (value + ahead[i]) / 2);
    }
    x = x.map((value, i) => value + h * v[i]);
    yield { step, sigma, x, v, x0 };
  }
}

function* dpmpp2m(velocity, x, sigmas) {
  let last, lastH;
  for (let step = 0; step + 1 < sigmas.length; step++) {
    const sigma = sigmas[step], next = sigmas[step + 1], h = Math.log(sigma / next);
    const v = velocity(x, sigma, step), x0 = denoised(x, v, sigma), before = last;
    const target = before && next > 0
      ? x0.map((value, i) => value + (h / (2 * lastH)) * (value - before[i])) : x0;
    const shrink = next / sigma;
    x = x.map((value, i) => shrink * value + (1 - shrink) * target[i]);
    [last, lastH] = [x0, h];
    yield { step, sigma, x, v, x0 };
  }
}

const SAMPLERS = { euler, heun, dpmpp_2m: dpmpp2m };
