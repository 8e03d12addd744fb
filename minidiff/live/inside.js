// Inside a picture: the stations of the pipeline, open, for the drawing above them.
"use strict";

minidiff.inside = (figure) => {
  const { make } = minidiff;
  const notebook = "notebook" in figure.dataset;
  const address = new URLSearchParams(notebook ? "" : location.search);
  // What is shown; the address keeps it under the same names.
  const at = { step: Infinity, block: 0, head: -1, word: null, patch: null };
  for (const name of ["step", "block", "head", "patch"]) {
    if (/^\d+$/.test(address.get(name) ?? "")) at[name] = Number(address.get(name));
  }
  at.word = address.get("word");
  let about, call, request, drawn, showNow = () => {};
  let arriving = address.has("open");  // at a station, which is then scrolled to

  const tabs = make("div", figure, { className: "inside-tabs" },
    { role: "tablist", "aria-label": "stations of the pipeline" });
  const panel = make("div", figure, { className: "inside-panel" }, { role: "tabpanel" });
  const stations = { steps, attention, gates, context, bench };
  const names = { steps: "Steps", attention: "Attention", gates: "Gates",
    context: "Context", bench: "The bench" };
  const buttons = Object.keys(stations).map((name) => make("button", tabs,
    { type: "button", textContent: names[name], onclick: () => open(name) }, { role: "tab" }));
  tabs.onkeydown = ({ key }) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[key];
    if (!move) return;
    const next = (buttons.indexOf(document.activeElement) + move + buttons.length) % buttons.length;
    buttons[next].focus();
    buttons[next].click();
  };
  panel.append(figure.querySelector(".inside-frames") ?? "");
  figure.append(figure.querySelector(":scope > figcaption") ?? "");

  function open(name) {
    choose(name);
    if (drawn) keep();
    else figure.dispatchEvent(new Event("wanted"));
  }

  // The address of what is shown.
  function keep() {
    if (notebook) return;
    const kept = new URLSearchParams(location.search);
    for (const [name, value] of Object.entries({ ...at, open: figure.dataset.open })) {
      if (value === null || value === -1) kept.delete(name);
      else kept.set(name, value);
    }
    history.replaceState(null, "", `?${kept}${location.hash}`);
  }

  // Show the change of `more`.
  function see(more) {
    Object.assign(at, more);
    keep();
    showNow();
  }

  function choose(name) {
    buttons.forEach((button, i) => {
      const chosen = Object.keys(stations)[i] === name;
      button.setAttribute("aria-selected", chosen);
      button.tabIndex = chosen ? 0 : -1;
    });
    panel.setAttribute("aria-label", names[name]);
    figure.dataset.open = name;
    if (!drawn) return;
    panel.replaceChildren();
    showNow = stations[name]();
    showNow();
  }

  figure.addEventListener("drawn", async ({ detail }) => {
    ({ request, drawn } = detail);
    ({ about, call } = await minidiff.open(request.model));
    at.step = Math.min(at.step, request.steps - 1);
    const { num_layers: blocks, num_attention_heads: heads, sample_size, patch_size } = about.transformer;
    at.block = Math.min(at.block, blocks - 1);
    at.head = Math.min(at.head, heads - 1);
    if (at.patch >= (sample_size / patch_size) ** 2) at.patch = null;
    choose(figure.dataset.open);
    if (arriving) tabs.scrollIntoView();
    arriving = false;
  });
  choose([address.get("open"), figure.dataset.open].find((name) => Object.hasOwn(stations, name)) ?? "steps");

  // What the stations share

  const say = (text) => make("p", panel, { textContent: text });
  const views = () => make("div", panel, { className: "inside-row" });

  function view(row, title, large = false) {
    const box = make("div", row, { className: `inside-view${large ? " large" : ""}` });
    const canvas = make("canvas", box, {}, { role: "img", "aria-label": title });
    const caption = make("figcaption", box, { textContent: title });
    return { canvas, caption };
  }

  function paint(canvas, pixels) {
    const side = Math.sqrt(pixels.length / 4);
    canvas.width = canvas.height = side;
    canvas.getContext("2d").putImageData(new ImageData(pixels, side), 0, 0);
  }

  // A select or a slider for `name` in `at`; the panel follows it.
  function slider(row, name, count, tell) {
    const label = make("label", row, { textContent: name });
    const input = make("input", label, { type: "range", min: 0, max: count - 1, step: 1 },
      { "aria-label": name });
    const output = make("output", label, {}, { "aria-live": "off" }); // the slider says it
    const show = () => {
      input.value = at[name];
      output.textContent = tell(at[name]);
      input.setAttribute("aria-valuetext", output.textContent);
    };
    input.oninput = () => { see({ [name]: Number(input.value) }); show(); };
    show();
    return show;
  }

  function select(row, name, options) {
    const input = make("select", make("label", row, { textContent: name }));
    options.forEach(([value, text]) => make("option", input, { value, textContent: text }));
    input.value = at[name];
    input.onchange = () => see({ [name]: Number(input.value) });
  }

  const controls = () => make("div", panel, { className: "inside-controls" });
  const levelOf = (step) => `${step + 1} of ${request.steps}, σ = ${drawn.trace[step].sigma.toFixed(3)}`;
  const count = () => request.steps;
  const noise = () => call("noise", { seed: request.seed });

  // The channels of latents (C, h, w) as tiles of grey, black at −reach, white at reach.
  function tiles(latents, reach) {
    const side = about.transformer.sample_size, across = Math.ceil(Math.sqrt(about.transformer.in_channels));
    const pixels = new Uint8ClampedArray(4 * (across * side) ** 2).fill(255);
    latents.forEach((value, i) => {
      const channel = Math.floor(i / side ** 2), cell = i % side ** 2;
      const y = Math.floor(channel / across) * side + Math.floor(cell / side);
      const x = (channel % across) * side + (cell % side);
      pixels.fill(127.5 * (1 + value / reach), 4 * (y * across * side + x), 4 * (y * across * side + x) + 3);
    });
    return pixels;
  }

  // Steps: what the solver has, what the network says, and where that leads

  function steps() {
    say("The solver starts from noise. At each step the network names a velocity v; back along it "
      + "lies its estimate x̂₀ = x − σ·v of the finished picture. Early estimates are blurred: "
      + "many pictures still fit.");
    const row = controls();
    const show = slider(row, "step", count(), levelOf);
    const play = make("button", row, { type: "button", textContent: "▶ play" });
    const box = views(), x = view(box, ""), v = view(box, ""), x0 = view(box, ""), end = view(box, "");
    let timer;
    play.onclick = () => {
      if (timer) { clearInterval(timer); timer = null; play.textContent = "▶ play"; return; }
      if (at.step === count() - 1) at.step = -1;
      play.textContent = "❚❚ pause";
      timer = setInterval(() => {
        if (!panel.contains(play) || at.step >= count() - 1) {
          clearInterval(timer); timer = null; play.textContent = "▶ play"; return;
        }
        see({ step: at.step + 1 });
        show();
      }, matchMedia("(prefers-reduced-motion: reduce)").matches ? 1000 : 300);
    };
    return async () => {
      const state = drawn.trace[at.step], step = at.step;
      const before = step ? drawn.trace[step - 1].x : await noise();
      paint(x.canvas, tiles(before, 3));
      paint(v.canvas, tiles(state.v, 3));
      paint(x0.canvas, tiles(state.x0, 3));
      x.caption.textContent = `latent x, ${about.transformer.in_channels} channels`;
      v.caption.textContent = "velocity v";
      x0.caption.textContent = "estimate x̂₀";
      end.caption.textContent = "x̂₀, decoded";
      const pixels = await call("picture", { latents: state.x0 });
      if (step === at.step) paint(end.canvas, pixels);
    };
  }

  // Attention: which patches read a word, and what a patch reads

  // The context's rows: CLIP's two tokens share one; then T5's.
  function rowsOfContext() {
    const [first, , third] = about.tokenizers, [ids, , idsT5] = drawn.ids;
    const rows = (tokenizer, row, reader) => {
      const end = row.indexOf(tokenizer.eos) + 1;
      return row.map((id, i) => ({ reader, padding: i >= end,
        text: i < end ? tokenizer.pieces[id].replace("</w>", "") : "padding" }));
    };
    return [...rows(first, ids, "CLIP"), ...rows(third, idsT5, "T5")];
  }

  function attention() {
    say("Click a word: how much of its attention does each patch give to it? Click a patch: what "
      + "does it read? Shares are absolute: those of a patch add up to 100 %, over both texts, "
      + "their padding and the picture.");
    const row = controls();
    slider(row, "step", count(), levelOf);
    slider(row, "block", about.transformer.num_layers, (i) => String(i));
    const heads = Array.from({ length: about.transformer.num_attention_heads }, (_, i) => [i, `head ${i}`]);
    select(row, "head", [[-1, "mean of the heads"], ...heads]);
    const box = views(), side = Math.sqrt(drawn.pixels.length / 4);
    const picture = view(box, "the picture", true);
    const right = make("div", box, { className: "live-side" });
    const words = make("div", right, { className: "inside-words" }, { role: "group", "aria-label": "tokens" });
    const shares = make("div", right, { className: "inside-shares" });
    const tokens = rowsOfContext();
    const grid = about.transformer.sample_size / about.transformer.patch_size;
    const rowOf = (word) => /^\d+$/.test(word ?? "") ? Number(word)
      : tokens.findIndex(({ text }) => text === word);
    const word = () => tokens[rowOf(at.word)]?.padding === false ? rowOf(at.word)
      : tokens[2].padding ? 1 : 2;
    const chips = tokens.map((token, i) => {
      if (token.padding) return null;
      if (i && token.reader !== tokens[i - 1].reader) make("b", words, { textContent: token.reader });
      return make("button", words, { type: "button", textContent: token.text,
        onclick: () => see({ word: String(i), patch: null }) });
    });
    words.prepend(make("b", null, { textContent: "CLIP" }));
    const canvas = picture.canvas;
    canvas.tabIndex = 0;
    canvas.style.cursor = "crosshair";
    canvas.onclick = ({ clientX, clientY }) => {
      const area = canvas.getBoundingClientRect();
      const cell = (value, length) => Math.min(grid - 1, Math.max(0, Math.floor((value / length) * grid)));
      see({ patch: cell(clientY - area.top, area.height) * grid + cell(clientX - area.left, area.width) });
    };
    canvas.onkeydown = (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -grid, ArrowDown: grid }[event.key];
      if (!move && event.key !== "Escape") return;
      event.preventDefault();
      see({ patch: move ? ((at.patch ?? 0) + move + grid * grid) % (grid * grid) : null });
    };
    let kept = "", maps;
    return async () => {
      const key = `${at.step} ${at.block}`;
      if (kept !== key) {
        kept = key;
        maps = drawn.maps(at.block, at.step);
      }
      const { weights, heads: all, length } = await maps;
      const chosen = at.head < 0 ? Array.from({ length: all }, (_, i) => i) : [at.head];
      const share = (query, keyAt) => chosen.reduce((sum, h) =>
        sum + weights[(h * length + query) * length + keyAt], 0) / chosen.length;
      chips.forEach((chip, i) => chip?.setAttribute("aria-pressed", at.patch === null && i === word()));
      if (at.patch === null) heat(canvas, tokens, word(), share, grid, side, picture.caption);
      else reads(canvas, tokens, share, grid, side, picture.caption);
      list(shares, tokens, share, grid);
    };
  }

  function heat(canvas, tokens, word, share, grid, side, caption) {
    const values = Array.from({ length: grid * grid }, (_, i) => share(tokens.length + i, word));
    const most = Math.max(...values);
    paint(canvas, drawn.pixels);
    const pixels = canvas.getContext("2d").getImageData(0, 0, side, side), { data } = pixels;
    for (let i = 0; i < side * side; i++) {
      const patch = Math.floor((Math.floor(i / side) * grid) / side) * grid + Math.floor(((i % side) * grid) / side);
      const grey = (data[4 * i] + data[4 * i + 1] + data[4 * i + 2]) / 3, t = values[patch] / most;
      const ramp = [[0, 0, 4], [120, 28, 109], [237, 105, 37], [252, 255, 164]];
      const place = Math.min(2.999, 3 * t), low = Math.floor(place), f = place - low;
      for (let c = 0; c < 3; c++) {
        data[4 * i + c] = 0.25 * grey + 0.75 * (ramp[low][c] * (1 - f) + ramp[low + 1][c] * f);
      }
    }
    canvas.getContext("2d").putImageData(pixels, 0, 0);
    caption.textContent = `“${tokens[word].text}” (${tokens[word].reader}): black is 0, pale yellow `
      + `${(100 * most).toPrecision(2)} % of a patch's attention`;
    canvas.setAttribute("aria-label", caption.textContent);
  }

  function reads(canvas, tokens, share, grid, side, caption) {
    paint(canvas, drawn.pixels);
    const context = canvas.getContext("2d"), cell = side / grid;
    context.strokeStyle = "#fff";
    context.lineWidth = 1;
    context.strokeRect((at.patch % grid) * cell + 0.5, Math.floor(at.patch / grid) * cell + 0.5, cell - 1, cell - 1);
    caption.textContent = `the patch in row ${Math.floor(at.patch / grid) + 1}, column ${(at.patch % grid) + 1}`;
    canvas.setAttribute("aria-label", caption.textContent);
  }

  // What the chosen patch reads, or all patches on average: sums, and the first words.
  function list(box, tokens, share, grid) {
    const all = Array.from({ length: grid * grid }, (_, i) => i);
    const patches = at.patch === null ? all : [at.patch];
    const mean = (keyAt) => patches.reduce((sum, i) => sum + share(tokens.length + i, keyAt), 0) / patches.length;
    const rows = tokens.map((token, i) => ({ ...token, share: mean(i) }));
    const sum = (some) => some.reduce((total, { share }) => total + share, 0);
    const said = rows.filter((row) => !row.padding), padding = rows.filter((row) => row.padding);
    const shown = [
      [at.patch === null ? "all patches: the picture" : "the picture", 1 - sum(rows)],
      [`padding (${padding.length} rows)`, sum(padding)], ["tokens of the text", sum(said)],
      ...said.sort((a, b) => b.share - a.share).slice(0, 8).map((row) => [`  ${row.text} (${row.reader})`, row.share]),
    ];
    box.replaceChildren();
    for (const [name, value] of shown) {
      make("span", box, { textContent: name });
      make("i", box).style.width = `${100 * Math.max(0, value)}%`;
      make("span", box, { textContent: `${(100 * value).toFixed(1)} %` });
    }
  }

  // Gates: how loudly each block speaks, from step to step

  function gates() {
    say("Time and the pooled text set a gate for each block's answers, channel by channel. The "
      + "curves show its mean size in the picture's stream, a curve for each block: from noise "
      + "(left) to the picture (right).");
    const box = views();
    return async () => {
      const { attention: first, mlp } = await call("gates", { request });
      box.replaceChildren();
      const most = Math.max(...first.flat(), ...mlp.flat());
      chart(box, "gate of attention", first, most);
      chart(box, "gate of the MLP", mlp, most);
    };
  }

  function chart(row, title, curves, most) {
    const colors = ["#3f88c5", "#e0762b", "#2f9e6e", "#d6495f", "#9267d0", "#b08a1e", "#1d98a7"];
    const box = make("div", row, { className: "inside-view large" }), last = request.steps - 1 || 1;
    const lines = curves.map((curve, i) => {
      const points = curve.map((value, j) => `${30 + (250 * j) / last} ${150 - (135 * value) / most}`);
      const color = colors[i % colors.length];
      return `<path stroke="${color}" d="M${points.join("L")}"/>`
        + `<text x="284" y="${153 - (135 * curve.at(-1)) / most}" style="fill:${color}">${i}</text>`;
    });
    box.innerHTML = `<svg class="inside-chart" viewBox="0 0 300 170" role="img" aria-label="${title}, by block">`
      + `<path stroke="currentColor" d="M30 10V150H284"/><text x="2" y="18">${most.toFixed(2)}</text>`
      + `<text x="2" y="153">0</text><text x="30" y="165">step 1</text>`
      + `<text x="250" y="165">step ${request.steps}</text>${lines.join("")}</svg>`;
    make("figcaption", box, { textContent: title });
  }

  // Context: the rows that the transformer reads

  function context() {
    say("What the text encoders hand on: a row of numbers for each token. CLIP-L fills the first "
      + "columns of the upper rows and CLIP-G the next; what is left there is zero. T5 fills the "
      + "lower rows. Padding has rows too, and nothing hides them.");
    const box = views();
    return async () => {
      const text = await call("context", { texts: Array(3).fill(request.prompt) });
      const width = text.context.length / text.rows, tokens = rowsOfContext();
      box.replaceChildren();
      const shown = make("div", box, { className: "inside-view" }, { style: "flex: 1 1 100%" });
      const canvas = make("canvas", shown, { width, height: text.rows },
        { role: "img", "aria-label": "the context's rows", style: "image-rendering: pixelated; cursor: crosshair" });
      const image = new ImageData(width, text.rows);
      text.context.forEach((value, i) => {
        const t = Math.max(-1, Math.min(1, value / 3)), strength = Math.abs(t);
        const color = t < 0 ? [63, 136, 197] : [224, 118, 43];
        image.data.set([...color, 255 * Math.sqrt(strength)], 4 * i);
      });
      canvas.getContext("2d").putImageData(image, 0, 0);
      const caption = make("figcaption", shown);
      const tell = (i) => {
        caption.textContent = `row ${i}: ${tokens[i].text} (${tokens[i].reader}). Blue is −3 and below, orange 3 and above, clear 0.`;
      };
      canvas.onpointermove = ({ offsetY }) =>
        tell(Math.min(text.rows - 1, Math.max(0, Math.floor((offsetY / canvas.clientHeight) * text.rows))));
      tell(1);
    };
  }

  // The bench: something is taken away, and the same seed drawn again

  function bench() {
    say("Each switch takes something away or changes it; then the same noise is drawn again. Left "
      + "the picture as it is, right what the change makes of it.");
    const blocks = Array.from({ length: about.transformer.num_layers }, (_, i) => i);
    const heads = Array.from({ length: about.transformer.num_attention_heads }, (_, i) => i);
    const on = new Set(), board = make("div", panel, { className: "inside-bench" }), inputs = {};
    const texts = Array(3).fill(request.prompt);
    const number = (key) => Number(inputs[key].value);
    const switches = [
      ["skip", "Skip a block", "What do the others still draw without it?", { block: blocks },
        () => ({ skip: [number("skip block")] })],
      ["silence", "Silence a head", "One head of one block reads nothing; most are hardly missed.",
        { block: blocks, head: heads },
        () => ({ silence: { block: number("silence block"), head: number("silence head") } })],
      ["t5", "Empty T5", "T5 reads nothing: do colours still find their things?", {}, null],
      ["clipL", "Empty CLIP-L", "Its rows and its half of the pooled vector are those of no text.", {}, null],
      ["clipG", "Empty CLIP-G", "The same for the larger CLIP.", {}, null],
      ["pooled", "Pooled vector of another prompt", "It sets the gates: how much can it overrule the rows?",
        { prompt: "a black boot on a yellow background" }, () => ({ pooled: inputs["pooled prompt"].value })],
      ["shuffle", "Shuffle the positions", "Each patch is given another's place.", {}, () => ({ order: shuffled() })],
      ["mask", "Hide the padding", "Padding's rows are read by nobody; the weights expect them.", {}, () => ({ mask: true })],
      ["exchange", "Exchange the prompt at a step", "From which step on is it too late?",
        { prompt: "a green coat on a red background", step: Math.floor(request.steps / 4) },
        () => ({ exchange: { prompt: inputs["exchange prompt"].value, step: number("exchange step") } })],
      ["guidance", "Guidance from −2 to 12", "Below 0 away from the prompt; far above, colours burn.", { scale: 0 },
        () => ({ free: true })],
    ];
    const asked = (address.get("switch") ?? "").split(" ");
    for (const [key, title, look, fields] of switches) {
      const box = make("div", board, { className: "inside-switch" });
      const label = make("label", box);
      const check = make("input", label, { type: "checkbox" });
      label.append(title);
      const turn = (now) => {
        on[now ? "add" : "delete"](key);
        box.classList.toggle("on", now);
      };
      check.onchange = () => { turn(check.checked); again(); };
      if (asked.includes(key)) turn(check.checked = true);
      for (const [field, value] of Object.entries(fields)) {
        const name = `${key} ${field}`, labelled = { "aria-label": `${title}: ${field}` };
        if (Array.isArray(value)) {
          inputs[name] = make("select", box, {}, labelled);
          value.forEach((i) => make("option", inputs[name], { value: i, textContent: `${field} ${i}` }));
          inputs[name].value = Math.max(0, at[field]);
        } else {
          const kind = typeof value === "number" ? { type: "number", step: field === "scale" ? 0.5 : 1 } : { type: "text" };
          inputs[name] = make("input", box, { ...kind, value }, labelled);
        }
        inputs[name].onchange = () => { if (on.has(key)) again(); };
      }
      make("p", box, { textContent: look });
    }
    const box = views(), left = view(box, "as it is"), right = view(box, "changed");
    const painter = view(box, "the noise: paint on it");
    const told = make("p", panel, {}, { role: "status" });
    let start, painted = false;
    const undo = make("button", panel, { type: "button", textContent: "The seed's noise again" });
    undo.onclick = async () => { start = await noise(); painted = false; showNoise(); again(); };
    const showNoise = () => paint(painter.canvas, tiles(start, 3));
    brush(painter.canvas, () => start, () => { painted = true; showNoise(); }, again);

    function shuffled() {
      const size = about.transformer.sample_size / about.transformer.patch_size;
      return Array.from({ length: size * size }, (_, i) => (i * 37 + 11) % (size * size));
    }

    // The parts of the request that the switches change
    function changes() {
      const read = [on.has("clipL"), on.has("clipG"), on.has("t5")].map((empty, i) => empty ? "" : texts[i]);
      const parts = switches.filter(([key, , , , make]) => make && on.has(key)).map(([, , , , make]) => make());
      return Object.assign({ texts: read }, ...parts);
    }

    async function again() {
      told.textContent = "drawing …";
      const asked = { ...request, changes: changes(), latents: painted ? start : undefined };
      if (on.has("guidance")) asked.guidance = Math.max(-2, Math.min(12, number("guidance scale")));
      try {
        const found = await minidiff.draw(asked);
        if (!found) return;
        paint(right.canvas, found.pixels);
        let sum = 0;
        found.pixels.forEach((value, i) => { sum += Math.abs(value - drawn.pixels[i]); });
        const mean = sum / (0.75 * found.pixels.length) / 2.55;
        told.textContent = `drawn again: on average a channel differs by ${mean.toFixed(1)} % of its range`;
        figure.dataset.bench = [...on].join(" ") || "none";
      } catch (error) {
        told.textContent = `Nothing drawn: ${error.message}.`;
      }
    }

    return async () => {
      paint(left.canvas, drawn.pixels);
      paint(right.canvas, drawn.pixels);
      start = await noise();
      showNoise();
      if (on.size) again();
    };
  }

  // Painting on the noise: what the brush covers becomes zero, in every channel.
  function brush(canvas, latents, changed, done) {
    canvas.style.cursor = "crosshair";
    canvas.style.touchAction = "none";
    const size = about.transformer.sample_size, channels = about.transformer.in_channels;
    const across = Math.ceil(Math.sqrt(channels));
    const put = ({ offsetX, offsetY }) => {
      const cell = (value, length) => Math.floor((value / length) * across * size) % size;
      const x = cell(offsetX, canvas.clientWidth), y = cell(offsetY, canvas.clientHeight);
      for (let c = 0; c < channels; c++) {
        for (let dy = -1; dy <= 1; dy++) {
          for (let dx = -1; dx <= 1; dx++) {
            const [row, column] = [y + dy, x + dx];
            if (row >= 0 && column >= 0 && row < size && column < size) {
              latents()[(c * size + row) * size + column] = 0;
            }
          }
        }
      }
      changed();
    };
    canvas.onpointerdown = (event) => { canvas.setPointerCapture(event.pointerId); put(event); };
    canvas.onpointermove = (event) => { if (event.buttons) put(event); };
    canvas.onpointerup = done;
  }
};
