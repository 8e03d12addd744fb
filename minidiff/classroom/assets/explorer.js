(() => {
  const make = (tag, parent, props = {}) =>
    parent.appendChild(Object.assign(document.createElement(tag), props));
  const decode = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

  const build = (figure) => {
    figure.dataset.ready = "1";
    const data = JSON.parse(figure.querySelector("script[type='application/json']").textContent);
    const maps = decode(data.maps), reads = decode(data.reads), palette = decode(data.palette);
    const [rows, columns] = data.grid, [height, width] = data.size;
    const count = data.words.length, area = rows * columns;
    const state = { block: data.blocks.length - 1, step: data.steps.length - 1, word: 0,
      patch: null };

    const box = make("div", figure, { className: "minidiff-box minidiff-explorer" });
    const left = make("div", box), right = make("div", box);
    const canvas = make("canvas", left, { width, height, tabIndex: 0 });
    canvas.setAttribute("role", "application");
    const words = make("div", right, { className: "minidiff-words" });
    words.setAttribute("role", "group");
    words.setAttribute("aria-label", "words of the prompt");
    const note = make("div", right, { className: "minidiff-note" });
    note.setAttribute("aria-live", "polite");
    const slider = (name, names) => {
      const controls = make("div", right, { className: "minidiff-controls" });
      const label = make("label", controls, { textContent: name + " " });
      const input = make("input", label,
        { type: "range", min: 0, max: names.length - 1, step: 1, value: state[name] });
      input.setAttribute("aria-label", name);
      const output = make("output", controls);
      output.setAttribute("aria-live", "off");  // the slider says it
      input.oninput = () => { state[name] = Number(input.value); draw(); };
      return () => {
        output.textContent = names[state[name]];
        input.setAttribute("aria-valuetext", names[state[name]]);
      };
    };
    const showBlock = slider("block", data.blocks);
    const showStep = slider("step", data.steps);
    make("div", right, { className: "minidiff-note",
      textContent: "Hover, tap or focus a word (Enter, while a patch is chosen); click a "
        + "patch, or move over the picture with the arrow keys, for the words it reads "
        + "(Esc: back to the word)." });

    const buttons = data.words.map((word, i) => {
      const button = make("button", words, { type: "button", textContent: word });
      const choose = () => { state.word = i; state.patch = null; draw(); };
      button.onclick = button.onpointerenter = choose;
      button.onfocus = () => { if (state.patch === null) choose(); };
      return button;
    });

    const sprite = new Image();
    sprite.onload = () => draw();
    sprite.src = data.sprite;
    const context = canvas.getContext("2d", { willReadFrequently: true });

    const picture = () => {
      const frame = data.pictures > 1 ? state.step : 0;
      context.drawImage(sprite, frame * width, 0, width, height, 0, 0, width, height);
    };
    const overlay = (at) => {
      const pixels = context.getImageData(0, 0, width, height), p = pixels.data;
      for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) {
        const patch = Math.floor(y * rows / height) * columns + Math.floor(x * columns / width);
        const i = 4 * (y * width + x), heat = 3 * maps[at + patch];
        const grey = (p[i] + p[i + 1] + p[i + 2]) / 3;
        for (let c = 0; c < 3; c++) p[i + c] = Math.round(0.3 * grey + 0.7 * palette[heat + c]);
      }
      context.putImageData(pixels, 0, 0);
    };
    const frame = () => {
      const w = width / columns, h = height / rows;
      const x = state.patch % columns * w, y = Math.floor(state.patch / columns) * h;
      context.lineWidth = Math.max(1, width / 64);
      context.strokeStyle = "#ffffff";
      context.strokeRect(x, y, w, h);
    };
    const weigh = (at) => {
      const most = Math.max(...reads.subarray(at, at + count), 1);
      buttons.forEach((button, i) => {
        const share = reads[at + i] / most;
        button.style.background = `rgba(224, 118, 43, ${(0.5 * share).toFixed(3)})`;
        button.dataset.share = share.toFixed(3);
        button.setAttribute("aria-pressed", "false");
      });
      const best = buttons.map((_, i) => i).sort((a, b) => reads[at + b] - reads[at + a]);
      return best.slice(0, 3).map((i) => data.words[i]).join(", ");
    };

    const draw = () => {
      showBlock(); showStep();
      const base = state.block * data.steps.length + state.step;
      const place = `${data.blocks[state.block]}, ${data.steps[state.step]}`;
      const loaded = sprite.complete && sprite.naturalWidth;
      if (loaded) picture();
      if (state.patch === null) {
        buttons.forEach((button, i) => {
          button.style.background = "";
          delete button.dataset.share;
          button.setAttribute("aria-pressed", String(i === state.word));
        });
        if (loaded) overlay((base * count + state.word) * area);
        note.textContent = `“${data.words[state.word]}” in the picture`;
      } else {
        const read = weigh((base * area + state.patch) * count);
        if (loaded) frame();
        const row = Math.floor(state.patch / columns), column = state.patch % columns;
        note.textContent = `the patch in row ${row}, column ${column} reads most: ${read}`;
      }
      canvas.setAttribute("aria-label", `${note.textContent}, ${place}`);
      Object.assign(figure.dataset, { block: state.block, step: state.step,
        word: state.word, patch: state.patch ?? "" });
    };

    canvas.onclick = (event) => {
      const at = canvas.getBoundingClientRect();
      const x = Math.floor((event.clientX - at.left) / at.width * columns);
      const y = Math.floor((event.clientY - at.top) / at.height * rows);
      const clamp = (v, n) => Math.min(Math.max(v, 0), n - 1);
      state.patch = clamp(y, rows) * columns + clamp(x, columns);
      draw();
    };
    canvas.onkeydown = (event) => {
      const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0],
        ArrowDown: [1, 0] };
      if (event.key === "Escape") state.patch = null;
      else if (event.key in moves) {
        const patch = state.patch ?? Math.floor(rows / 2) * columns + Math.floor(columns / 2);
        const [dy, dx] = moves[event.key];
        const y = (Math.floor(patch / columns) + dy + rows) % rows;
        state.patch = y * columns + (patch % columns + dx + columns) % columns;
      } else return;
      event.preventDefault();
      event.stopPropagation();
      draw();
    };
    // JupyterLab must not take the arrow keys for its own
    for (const element of figure.querySelectorAll("input, button, canvas"))
      element.dataset.lmSuppressShortcuts = "true";
    figure.querySelector(".minidiff-strip").style.display = "none";
    draw();
  };

  document.querySelectorAll(".minidiff-figure[data-kind=explorer]:not([data-ready])")
    .forEach(build);
})();
