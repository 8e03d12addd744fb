// The pad to sketch on: lines of one pixel, white on black, as a ControlNet reads them.
"use strict";

// A sketch (side²) of 0 and 1 as text for an address, and back.
minidiff.sketches = {
  write: (lines) => {
    const bytes = Uint8Array.from({ length: lines.length / 8 }, (_, i) =>
      lines.subarray(8 * i, 8 * i + 8).reduce((byte, bit) => 2 * byte + bit, 0));
    return btoa(String.fromCharCode(...bytes)).replace(/\+/g, "-").replace(/\//g, "_");
  },
  read: (text, side) => {
    const bytes = atob(text.replace(/-/g, "+").replace(/_/g, "/"));
    if (bytes.length !== side ** 2 / 8) throw new Error("the sketch is of another size");
    return Uint8Array.from({ length: side ** 2 }, (_, i) =>
      (bytes.charCodeAt(i >> 3) >> (7 - (i & 7))) & 1);
  },
};

// A pad in `parent`. changed(lines, done) is called while a line is drawn and, with
// done, when it ends; edges() is a promise of those of the picture beside it.
minidiff.pad = (parent, side, changed, edges) => {
  const { make } = minidiff, box = make("div", parent, { className: "live-pad" });
  const frame = make("div", box, { className: "live-picture" });
  const canvas = make("canvas", frame, { width: side, height: side },
    { role: "img", "aria-label": "the sketch" });
  const context = canvas.getContext("2d"), lines = new Uint8Array(side ** 2);
  let last = null, erasing = false;

  function paint() {
    const picture = context.createImageData(side, side);
    lines.forEach((on, i) => picture.data.fill(255 * on, 4 * i, 4 * i + 3));
    for (let i = 3; i < picture.data.length; i += 4) picture.data[i] = 255;
    context.putImageData(picture, 0, 0);
  }

  function replace(all) {
    lines.set(all);
    paint();
  }

  const inside = (n) => Math.min(Math.max(Math.floor(n), 0), side - 1);

  function cell({ clientX, clientY }) {
    const { left, top, width, height } = canvas.getBoundingClientRect();
    return [inside(((clientX - left) / width) * side), inside(((clientY - top) / height) * side)];
  }

  function stroke(from, to) {
    const steps = Math.max(...to.map((end, i) => Math.abs(end - from[i])), 1);
    const around = erasing ? [-2, -1, 0, 1, 2] : [0];
    for (let i = 0; i <= steps; i++) {
      const [x, y] = from.map((start, k) => Math.round(start + ((to[k] - start) * i) / steps));
      for (const dy of around) {
        for (const dx of around) lines[inside(y + dy) * side + inside(x + dx)] = erasing ? 0 : 1;
      }
    }
    paint();
    changed(lines.slice(), false);
  }

  canvas.onpointerdown = (event) => {
    canvas.setPointerCapture(event.pointerId);
    last = cell(event);
    stroke(last, last);
  };
  canvas.onpointermove = (event) => {
    if (!last) return;
    const now = cell(event);
    stroke(last, now);
    last = now;
  };
  canvas.onpointerup = canvas.onpointercancel = () => {
    if (last) changed(lines.slice(), true);
    last = null;
  };

  const buttons = make("div", box, { className: "live-actions" });
  const set = (all) => { replace(all); changed(lines.slice(), true); };
  const rubber = make("button", buttons, { type: "button", textContent: "Rubber" },
    { "aria-pressed": false });
  rubber.onclick = () => {
    erasing = !erasing;
    rubber.setAttribute("aria-pressed", erasing);
  };
  make("button", buttons, { type: "button", textContent: "Clear",
    onclick: () => set(new Uint8Array(side ** 2)) });
  make("button", buttons, { type: "button", textContent: "The picture's edges",
    onclick: async () => set(await edges()) });
  make("button", buttons, { type: "button", textContent: "Save sketch", onclick: () =>
    canvas.toBlob((file) => make("a", null,
      { href: URL.createObjectURL(file), download: "sketch.png" }).click()) });
  paint();
  return { box, replace };
};
