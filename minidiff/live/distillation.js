// Chapter 9: the schedule of a distilled model, which draws in jumps.
"use strict";

// The places (steps + 1) that a drawing visits, from 1 down to 0; the first jumps are the
// shorter.
function grid(steps) {
  const coarse = 2 ** Math.floor(Math.log2(steps)), places = [1];
  for (let i = 0; i < steps; i++) {
    places.push(places[i] - (i < 2 * (steps - coarse) ? 0.5 : 1) / coarse);
  }
  return places;
}

// The levels of a drawing and, for each of its jumps, the time that tells the network
// where it begins and how long it is.
function jumpSchedule(steps, { shift }) {
  const f = Math.fround, places = grid(steps);
  return {
    sigmas: places.map((place) => f(shiftSigma(place, shift))),
    times: places.slice(0, -1).map((place, i) =>
      f(shiftSigma(place - (place - places[i + 1]) / 8, shift))),
  };
}
