(() => {
  const make = (tag, parent, props = {}) =>
    parent.appendChild(Object.assign(document.createElement(tag), props));

  const build = (figure) => {
    figure.dataset.ready = "1";
    const data = JSON.parse(figure.querySelector("script[type='application/json']").textContent);
    const box = make("div", figure, { className: "minidiff-box" });
    const controls = make("div", box, { className: "minidiff-controls" });
    const play = make("button", controls, { type: "button", textContent: "▶ play" });
    const label = make("label", controls, { textContent: "step " });
    const last = data.sigmas.length - 1;
    const slider = make("input", label,
      { type: "range", min: 0, max: last, step: 1, value: last });
    slider.setAttribute("aria-label", "denoising step");
    const output = make("output", controls);
    output.setAttribute("aria-live", "off");  // the slider says it
    const panels = make("div", box, { className: "minidiff-panels" });

    const views = data.rows.map((row) => {
      const panel = make("div", panels);
      const [height, width] = row.size;
      const canvas = make("canvas", panel, { width, height });
      canvas.setAttribute("role", "img");
      make("div", panel, { textContent: row.name });
      const sprite = new Image();
      sprite.onload = () => draw();
      sprite.src = row.sprite;
      return { row, canvas, sprite };
    });

    const draw = () => {
      const step = Number(slider.value);
      const text = `${step} of ${last}, σ = ${data.sigmas[step].toFixed(2)}`;
      output.textContent = text;
      slider.setAttribute("aria-valuetext", text);
      for (const { row, canvas, sprite } of views) {
        canvas.setAttribute("aria-label", `${row.name} at step ${text}`);
        if (!sprite.complete || !sprite.naturalWidth) continue;
        const { width: w, height: h } = canvas;
        canvas.getContext("2d").drawImage(sprite, step * w, 0, w, h, 0, 0, w, h);
      }
      figure.dataset.step = step;
    };

    let timer = null;
    const stop = () => {
      clearInterval(timer);
      timer = null;
      play.textContent = "▶ play";
    };
    const tick = () => {
      if (Number(slider.value) >= last || !figure.isConnected) return stop();
      slider.value = Number(slider.value) + 1;
      draw();
    };
    play.onclick = () => {
      if (timer) return stop();
      if (Number(slider.value) >= last) slider.value = 0;
      draw();
      play.textContent = "❚❚ pause";
      timer = setInterval(tick, 150);
    };
    slider.oninput = () => { stop(); draw(); };
    // JupyterLab must not take the arrow keys for its own
    for (const element of figure.querySelectorAll("input, button, canvas"))
      element.dataset.lmSuppressShortcuts = "true";
    figure.querySelector(".minidiff-strip").style.display = "none";
    draw();
  };

  document.querySelectorAll(".minidiff-figure[data-kind=scrubber]:not([data-ready])")
    .forEach(build);
})();
