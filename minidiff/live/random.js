// PyTorch's random numbers on a CPU: the same seed gives the same noise as in Python.
"use strict";

// The Mersenne twister MT19937 (Matsumoto and Nishimura 1998): 32 random bits a call.
function mersenneTwister(seed) {
  const state = new Uint32Array(624);
  state[0] = Number(BigInt.asUintN(32, BigInt(seed)));
  for (let i = 1; i < 624; i++) {
    state[i] = Math.imul(1812433253, state[i - 1] ^ (state[i - 1] >>> 30)) + i;
  }
  let at = 624;
  const renew = () => {
    for (let i = 0; i < 624; i++) {
      const y = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7fffffff);
      state[i] = state[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
    }
    at = 0;
  };
  return () => {
    if (at === 624) renew();
    let y = state[at++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  };
}

// torch.randn(count, generator=torch.Generator().manual_seed(seed)).
//
// A uniform number is 24 of the 32 bits. Box and Muller (1958) make two normal numbers
// of two uniform ones. PyTorch fills the whole tensor with uniform numbers first; then
// in blocks of 16 the numbers j and j + 8 become a pair. What is left at the end and
// fills no block is drawn anew, as the last 16.
function randn(count, seed) {
  const bits = mersenneTwister(seed);
  if (count < 16) return fewNormals(count, bits);
  const values = new Float32Array(count);
  const uniform = () => (bits() & 0xffffff) / 2 ** 24;
  for (let i = 0; i < count; i++) values[i] = uniform();
  for (let i = 0; i + 16 <= count; i += 16) boxMuller(values, i);
  if (count % 16) {
    for (let i = count - 16; i < count; i++) values[i] = uniform();
    boxMuller(values, count - 16);
  }
  return values;
}

function boxMuller(values, start) {
  for (let j = start; j < start + 8; j++) {
    const radius = Math.sqrt(-2 * Math.log(1 - values[j]));
    const angle = 2 * Math.PI * values[j + 8];
    values[j] = radius * Math.cos(angle);
    values[j + 8] = radius * Math.sin(angle);
  }
}

// Fewer than 16 come one pair after the other, from uniform numbers of 53 bits.
function fewNormals(count, bits) {
  const uniform = () => ((bits() & 0x1fffff) * 2 ** 32 + bits()) / 2 ** 53;
  const values = [];
  while (values.length < count) {
    const angle = 2 * Math.PI * uniform(), radius = Math.sqrt(-2 * Math.log1p(-uniform()));
    values.push(radius * Math.cos(angle), radius * Math.sin(angle));
  }
  return Float32Array.from(values.slice(0, count));
}
