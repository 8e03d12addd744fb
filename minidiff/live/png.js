// A PNG file with its settings inside, as `minidiff sample` writes them.
"use strict";

minidiff.png = (() => {
  const CRC = Uint32Array.from({ length: 256 }, (_, n) => {
    for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
    return n;
  });
  const crc = (bytes) => ~bytes.reduce((c, b) => CRC[(c ^ b) & 255] ^ (c >>> 8), -1) >>> 0;

  // length, kind and data, checksum
  function chunk(kind, data) {
    const bytes = new Uint8Array(data.length + 12), view = new DataView(bytes.buffer);
    view.setUint32(0, data.length);
    bytes.set(new TextEncoder().encode(kind), 4);
    bytes.set(data, 8);
    view.setUint32(data.length + 8, crc(bytes.subarray(4, data.length + 8)));
    return bytes;
  }

  // keyword, not compressed, no language, no translated keyword, UTF-8
  const text = (name, value) =>
    chunk("iTXt", new TextEncoder().encode(`${name}\0\0\0\0\0${value}`));

  // The canvas as a file (Blob) that carries `settings` behind its header, 33 bytes.
  return async (canvas, settings) => {
    const drawn = await new Promise((done) => canvas.toBlob(done, "image/png"));
    const bytes = new Uint8Array(await drawn.arrayBuffer());
    const texts = Object.entries(settings).map(([name, value]) => text(name, value));
    const parts = [bytes.slice(0, 33), ...texts, bytes.slice(33)];
    return new Blob(parts, { type: "image/png" });
  };
})();
