/* The live page: controls, address, pictures. What is computed is in the worker. */
document.addEventListener("DOMContentLoaded", () => {
  const root = document.getElementById("live");
  if (!root) return;
  root.hidden = false;
  document.body.classList.add("live-runs"); // the strip then is for print alone
  const part = Object.fromEntries([...root.querySelectorAll("[data-live]")].map((e) => [e.dataset.live, e]));
  const input = Object.fromEntries([...root.querySelectorAll("[name]")].map((e) => [e.name, e]));

  const PANELS = {
    plain: ["Plain", "c"],
    disrupted: ["Channels zeroed", "c\u2098"],
    dg: ["DG", "c + w(c \u2212 c\u2098)"],
    cfg: ["CFG", "u + s(c \u2212 u)"],
    "cfg-dg": ["CFG + DG", "u + s(c \u2212 u) + w(c \u2212 c\u2098)"],
  };
  /* The settings that the address holds, with how each is read; what is missing there is the model's preset. */
  const READ = {
    caption: String, class: Number, seed: Number, steps: Number, block: Number, w: Number, s: Number, start: Number,
    stop: Number, left: String, right: String,
    dims: (text) => (text === "ordinary" ? text : text.split(/[\s,]+/).filter(Boolean).map(Number)),
  };

  let now = null; // all settings
  let run = null; // { settings, steps: [{ magnitude, energy, timestep }] } of the last one that began
  let ready = null; // the model that can run
  let zoom = null, timer = 0;
  const pictures = {}; // ImageData by panel

  if (!dgLive.models) return fail("The models are not here: `make book` exports them into the page's folder.");

  // ---- settings and address

  function preset(model) {
    const { preset: given, captions } = dgLive.models[model];
    return {
      model, seed: 0, steps: given.steps, block: given.block, dims: given.dims, w: given.scale, s: given.guidance,
      start: 0, stop: 1, left: "plain", right: "disrupted", ...(captions ? { caption: captions[0] } : { class: 0 }),
    };
  }

  /* The settings of an address, or the first thing in it that is not allowed, in words. */
  function parse(hash) {
    const given = new URLSearchParams(hash.slice(1));
    const model = given.get("model") ?? Object.keys(dgLive.models)[0];
    if (!(model in dgLive.models)) return `Model "${model}" is not here: there are ${Object.keys(dgLive.models).join(", ")}.`;
    const settings = preset(model);
    for (const [name, read] of Object.entries(READ)) {
      if (name in settings && given.has(name)) settings[name] = read(given.get(name));
    }
    return refusal(settings) ?? settings;
  }

  function refusal(settings) {
    const { blocks, channels, maxSteps, classes } = dgLive.models[settings.model];
    const whole = (value, low, high) => Number.isInteger(value) && low <= value && value <= high;
    const number = (value, low, high) => Number.isFinite(value) && low <= value && value <= high;
    const rules = [
      ["Seed", settings.seed, whole(settings.seed, 0, 4294967295), "a whole number from 0 to 4294967295"],
      ["Steps", settings.steps, whole(settings.steps, 1, maxSteps), `a whole number from 1 to ${maxSteps}`],
      ["Block", settings.block, whole(settings.block, 0, blocks - 1), `a block from 0 to ${blocks - 1}`],
      ["w", settings.w, number(settings.w, 0, 100), "a number from 0 to 100"],
      ["s", settings.s, number(settings.s, 1, 100), "a number from 1 (no CFG) to 100"],
      ["From", settings.start, number(settings.start, 0, 1), "a part of the steps from 0 to 1"],
      ["To", settings.stop, number(settings.stop, settings.start, 1), "a part of the steps from where it begins to 1"],
      ["Left", settings.left, settings.left in PANELS, `one of ${Object.keys(PANELS).join(", ")}`],
      ["Right", settings.right, settings.right in PANELS, `one of ${Object.keys(PANELS).join(", ")}`],
    ];
    if (classes) rules.push(["Class", settings.class, whole(settings.class, 0, classes.length - 1), `a class from 0 to ${classes.length - 1}`]);
    const bad = rules.find(([, , good]) => !good);
    if (bad) return `${bad[0]} ${bad[1]} is not possible: give ${bad[3]}.`;
    if (settings.dims === "ordinary") return null;
    const dim = settings.dims.find((value) => !whole(value, 0, channels - 1));
    if (dim !== undefined) return `Channel ${dim} is not there: this model has 0 to ${channels - 1}.`;
    if (new Set(settings.dims).size < settings.dims.length) return "A channel is named twice.";
    return null;
  }

  function address() {
    const usual = preset(now.model), given = new URLSearchParams({ model: now.model });
    for (const name of Object.keys(READ)) {
      if (name in now && String(now[name]) !== String(usual[name])) given.set(name, String(now[name]));
    }
    return `#${given}`;
  }

  /* Takes settings over, shows them, and draws anew where that is needed. */
  function set(change) {
    const wanted = { ...now, ...change };
    const bad = refusal(wanted);
    if (bad) return fail(bad);
    const drawnBefore = now && JSON.stringify({ ...now, left: 0, right: 0 });
    now = wanted;
    history.replaceState(null, "", address());
    clear();
    show();
    if (ready === now.model && JSON.stringify({ ...now, left: 0, right: 0 }) !== drawnBefore) soon();
    return undefined;
  }

  function soon() {
    clearTimeout(timer);
    timer = setTimeout(draw, 150);
  }

  function fail(words) {
    part.error.textContent = words;
    part.error.hidden = false;
  }

  function clear() {
    part.error.hidden = true;
  }

  // ---- what is shown of the settings

  const map = new LiveMap(root.querySelector(".live-map canvas"), {
    picked(block, channel) {
      const same = block === now.block && now.dims !== "ordinary";
      const dims = same ? now.dims.filter((dim) => dim !== channel) : [];
      set({ block, dims: same && dims.length < now.dims.length ? dims : [...dims, channel] });
    },
    told: (text) => (part.told.textContent = text),
  });

  function show() {
    const model = dgLive.models[now.model];
    for (const radio of root.querySelectorAll("[name=model]")) radio.checked = radio.value === now.model;
    input.caption.closest("label").hidden = !model.captions;
    input.class.closest("label").hidden = !model.classes;
    if (model.captions) {
      input.caption.value = now.caption;
      part.captions ??= root.querySelector("#live-captions");
      if (part.captions.dataset.of !== now.model) {
        part.captions.replaceChildren(...model.captions.map((caption) => new Option(caption)));
        part.captions.dataset.of = now.model;
      }
    } else {
      input.class.replaceChildren(...model.classes.map((name, i) => new Option(name, i)));
      input.class.value = now.class;
    }
    input.block.max = model.blocks - 1;
    input.steps.max = model.maxSteps;
    for (const name of ["seed", "steps", "block", "w", "s", "start", "stop", "left", "right"]) input[name].value = now[name];
    input.dims.value = now.dims === "ordinary" ? "" : now.dims.join(", ");
    part.block.textContent = `${now.block} of 0 to ${model.blocks - 1}`;
    part.w.textContent = now.w;
    part.s.textContent = now.s === 1 ? "1 (off)" : now.s;
    const first = Math.trunc(now.start * now.steps), last = Math.trunc(now.stop * now.steps);
    part["start-at"].textContent = first < last ? first + 1 : "none";
    part["stop-at"].textContent = first < last ? last : "none";
    const missing = dgLive.size(now.model);
    input.run.textContent = `Run ${now.model} in this page`;
    const loads = missing ? `Loads ${(missing / 1e6).toFixed(1)} MB from this book, once.` : "Loaded already.";
    part.size.textContent = `${loads} Nothing you enter leaves the page.`;
    part.start.hidden = ready === now.model;
    if (part.strip.dataset.of !== now.model) {
      const image = Object.assign(new Image(), { src: dgLive.strip(now.model), className: "dark-light" });
      image.alt = `Five pictures from the same noise, ${now.model} as it is set at first: ${Object.values(PANELS).map(([title]) => title).join(", ")}`;
      part.strip.replaceChildren(image);
      part.strip.dataset.of = now.model;
    }
    part.on.hidden = !run;
    root.classList.toggle("live-stale", Boolean(run) && ready !== now.model);
    showStep();
    compare();
  }

  /* The map, the energy and the chips at the chosen step. */
  function showStep() {
    if (!run || run.settings.model !== now.model || !run.steps.length) return;
    const { blocks, channels } = dgLive.models[now.model];
    const index = Math.min(Number(input.step.value), run.steps.length) - 1;
    const { magnitude, energy, timestep } = run.steps[index];
    const dims = now.dims === "ordinary" ? [] : now.dims;
    map.show({ blocks, channels, data: { magnitude, energy }, block: now.block, dims, top: run.top });
    part.step.textContent = `${index + 1} of ${run.settings.steps}, t = ${Number(timestep.toPrecision(3))}`;
    input.step.setAttribute("aria-valuetext", `step ${part.step.textContent}`);
    const shares = run.steps.map((step) => {
      const row = map.row(step.energy, now.block);
      return dims.reduce((sum, dim) => sum + row[dim], 0) / row.reduce((a, b) => a + b, 0);
    });
    part["share-block"].textContent = now.block;
    part.share.textContent = `${(100 * shares[index]).toFixed(0)} % at this step`;
    const x = (i) => (200 * (i + 0.5)) / run.settings.steps, y = (share) => 58 - 56 * share;
    const line = shares.map((share, i) => `${x(i).toFixed(1)} ${y(share).toFixed(1)}`).join("L");
    root.querySelector(".live-curve").setAttribute("d", `M${line}`);
    root.querySelector(".live-area").setAttribute("d", `M${x(0)} 58L${line}L${x(shares.length - 1)} 58Z`);
    root.querySelector(".live-now").setAttribute("d", `M${x(index)} 0V60`);
    chips(magnitude);
  }

  /* Channels to pick without the map: the largest of the block, and as many ordinary ones as are picked now. */
  function chips(magnitude) {
    const row = map.row(magnitude, now.block);
    const order = [...row.keys()].sort((a, b) => row[b] - row[a]);
    const picked = now.dims === "ordinary" ? [] : now.dims;
    const buttons = order.slice(0, 3).map((channel) => {
      const ratio = map.ratio({ block: now.block, channel });
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: `${channel} (${ratio.toFixed(1)}\u00d7)` });
      button.setAttribute("aria-pressed", picked.includes(channel));
      button.setAttribute("aria-label", `channel ${channel}, ${ratio.toFixed(1)} times the median`);
      button.onclick = () => pick(channel);
      return button;
    });
    const ordinary = Object.assign(document.createElement("button"), { type: "button", textContent: "ordinary ones" });
    ordinary.title = "As many channels nearest to the block's median";
    ordinary.onclick = () => set({ dims: ordinaryDims(magnitude) });
    const focused = [...part.chips.children].indexOf(document.activeElement);
    part.chips.replaceChildren(...buttons, ordinary);
    if (focused >= 0) part.chips.children[focused].focus();
  }

  function pick(channel) {
    const dims = now.dims === "ordinary" ? [] : now.dims;
    set({ dims: dims.includes(channel) ? dims.filter((dim) => dim !== channel) : [...dims, channel] });
  }

  /* As many channels as the preset has (or are picked), those nearest to the block's median. */
  function ordinaryDims(magnitude) {
    const row = map.row(magnitude, now.block), median = LiveMap.median(row);
    const count = Math.max(1, (now.dims === "ordinary" ? preset(now.model).dims : now.dims).length);
    const order = [...row.keys()].sort((a, b) => Math.abs(row[a] - median) - Math.abs(row[b] - median));
    return order.slice(0, count).sort((a, b) => a - b);
  }

  // ---- pictures

  const panels = root.querySelector(".live-panels");
  for (const [name, [title, formula]] of Object.entries(PANELS)) {
    const figure = document.createElement("figure");
    const canvas = Object.assign(document.createElement("canvas"), { className: "live-picture" });
    canvas.setAttribute("role", "img");
    canvas.dataset.panel = name;
    const caption = document.createElement("figcaption");
    caption.innerHTML = `<b>${title}</b> <span>${formula}</span>`;
    figure.append(canvas, caption);
    panels.append(figure);
    for (const side of ["left", "right"]) input[side].append(new Option(title, name));
  }

  function paint(canvas, image, label) {
    if (canvas.width !== image.width || canvas.height !== image.height) Object.assign(canvas, { width: image.width, height: image.height });
    canvas.getContext("2d").putImageData(image, 0, 0);
    canvas.setAttribute("aria-label", label);
  }

  function showPictures(images) {
    const { side } = dgLive.models[run.settings.model];
    const subject = run.settings.caption ?? dgLive.models[run.settings.model].classes[run.settings.class];
    for (const [name, pixels] of Object.entries(images)) {
      pictures[name] = new ImageData(pixels, side, side);
      paint(panels.querySelector(`[data-panel="${name}"]`), pictures[name], `${PANELS[name][0]}: ${subject}`);
    }
    compare();
  }

  /* Two pictures under a divider, and how they differ. */
  function compare() {
    const [left, right] = [pictures[now.left], pictures[now.right]];
    if (!left || !right || left.width !== right.width) return;
    if (!zoom) {
      zoom = document.createElement("img-comparison-slider");
      zoom.setAttribute("keyboard", "disabled");
      for (const slot of ["first", "second"]) {
        const side = Object.assign(document.createElement("div"), { slot });
        side.append(Object.assign(document.createElement("img"), { className: "dark-light" }), document.createElement("span"));
        zoom.append(side);
      }
      part.slider.append(zoom);
    }
    [...zoom.children].forEach((side, i) => {
      const name = [now.left, now.right][i];
      side.firstChild.src = source(pictures[name]);
      side.firstChild.alt = PANELS[name][0];
      side.lastChild.textContent = PANELS[name][0];
    });
    if (zoom.hasAttribute("role")) zoom.setAttribute("aria-label", `${PANELS[now.left][0]} | ${PANELS[now.right][0]}`);
    else describe(zoom); // of looking.js: keys and roles
    const difference = new ImageData(left.width, left.height);
    let sum = 0, largest = 0;
    const values = new Float32Array(left.width * left.height).map((_, i) => {
      const value = [0, 1, 2].reduce((most, c) => Math.max(most, Math.abs(left.data[4 * i + c] - right.data[4 * i + c])), 0);
      sum += [0, 1, 2].reduce((total, c) => total + Math.abs(left.data[4 * i + c] - right.data[4 * i + c]), 0);
      largest = Math.max(largest, value);
      return value;
    });
    const gain = Math.max(1, Math.floor(255 / Math.max(largest, 1)));
    values.forEach((value, i) => difference.data.set([gain * value, gain * value, gain * value, 255], 4 * i));
    const shown = gain > 1 && largest ? `, shown ${gain} times as bright` : "";
    const words = `Difference: ${(sum / (3 * values.length)).toFixed(1)} of 255 grey levels on average, ${largest} at most${shown}`;
    part.difference.textContent = words;
    paint(part["difference-image"], difference, words);
  }

  function source(image) {
    const canvas = Object.assign(document.createElement("canvas"), { width: image.width, height: image.height });
    canvas.getContext("2d").putImageData(image, 0, 0);
    return canvas.toDataURL();
  }

  // ---- running

  async function start() {
    const model = now.model, bar = root.querySelector("progress");
    clear();
    const whole = dgLive.size(model);
    bar.max = whole || 1;
    bar.value = 0;
    bar.hidden = false;
    input.run.disabled = true;
    try {
      await dgLive.load(model, (bytes) => {
        bar.value += bytes;
        part.size.textContent = `${(bar.value / 1e6).toFixed(1)} of ${(whole / 1e6).toFixed(1)} MB`;
      });
      ready = model;
      if (now.model === model) await draw();
    } catch (error) {
      fail(error.message);
      show();
    } finally {
      bar.hidden = true;
      input.run.disabled = false;
    }
  }

  async function draw() {
    const settings = { ...now };
    if (settings.dims === "ordinary") {
      if (run?.settings.model !== now.model || !run.steps.length) settings.dims = [];
      else return set({ dims: ordinaryDims(run.steps[run.steps.length - 1].magnitude) });
    }
    const mine = { settings, steps: [], top: 1 };
    const follow = !run || run.settings.model !== settings.model || Number(input.step.value) >= run.steps.length;
    const begun = performance.now();
    run = mine;
    root.setAttribute("aria-busy", "true");
    const condition = settings.caption ?? settings.class;
    const asked = dgLive.ask("sample", { settings: { ...settings, condition } }, (step) => {
      if (run !== mine) return;
      mine.steps.push(step);
      mine.top = Math.max(mine.top, largestRatio(step.magnitude));
      input.step.max = settings.steps;
      if (follow) input.step.value = step.step;
      if (step.step === 1) {
        part.on.hidden = false;
        part.start.hidden = true;
        root.classList.remove("live-stale");
      }
      if (step.images) showPictures(step.images);
      showStep();
    });
    if (settings.caption !== undefined) remark(settings);
    try {
      const done = await asked;
      if (!done || run !== mine) return undefined;
      showPictures(done.images);
      root.dataset.seconds = ((performance.now() - begun) / 1000).toFixed(2);
      root.removeAttribute("aria-busy");
      if (now.dims === "ordinary") return draw();
      if (!follow) await look();
    } catch (error) {
      root.removeAttribute("aria-busy");
      if (run === mine) {
        ready = null;
        run = null;
        show();
        fail(`The picture could not be drawn: ${error.message}`);
      }
    }
    return undefined;
  }

  function largestRatio(magnitude) {
    const { blocks, channels } = dgLive.models[run.settings.model];
    let largest = 1;
    for (let block = 0; block < blocks; block++) {
      const row = magnitude.subarray(block * channels, (block + 1) * channels);
      largest = Math.max(largest, Math.max(...row) / LiveMap.median(row));
    }
    return largest;
  }

  async function remark({ model, caption }) {
    const { unknown, cut } = await dgLive.ask("remarks", { model, caption });
    const words = [];
    if (!caption.trim()) words.push("Without a caption the model draws whatever it has learnt.");
    if (unknown.length) words.push(`Not in the model's vocabulary, so read letter by letter: ${unknown.join(", ")}.`);
    if (cut) words.push("The caption is longer than the model reads: its end is cut off.");
    part.remark.textContent = words.join(" ");
  }

  /* The pictures that the model had in mind after the chosen step. */
  async function look() {
    showStep();
    const mine = run, step = Number(input.step.value);
    if (root.hasAttribute("aria-busy") || step > mine.steps.length) return;
    const { images } = await dgLive.ask("look", { step });
    if (run === mine && Number(input.step.value) === step) showPictures(images);
  }

  // ---- events

  const offered = root.querySelector(".live-models");
  for (const name of Object.keys(dgLive.models)) {
    const label = document.createElement("label");
    label.append(Object.assign(document.createElement("input"), { type: "radio", name: "model", value: name }), ` ${name}`);
    offered.append(label);
    label.firstChild.addEventListener("change", () => {
      part.remark.textContent = "";
      now = null;
      set(preset(name));
      if (!dgLive.size(name)) start();
    });
  }
  for (const form of root.querySelectorAll("form")) form.addEventListener("submit", (event) => event.preventDefault());
  const numbers = { seed: "change", steps: "change", block: "input", w: "input", s: "input", start: "input", stop: "input" };
  for (const [name, event] of Object.entries(numbers)) {
    input[name].addEventListener(event, () => {
      const change = { [name]: input[name].value === "" ? NaN : Number(input[name].value) };
      if (name === "start") change.stop = Math.max(now.stop, change.start);
      if (name === "stop") change.start = Math.min(now.start, change.stop);
      set(change);
    });
  }
  for (const side of ["left", "right"]) input[side].addEventListener("change", () => set({ [side]: input[side].value }));
  input.caption.addEventListener("change", () => set({ caption: input.caption.value }));
  input.class.addEventListener("change", () => set({ class: Number(input.class.value) }));
  input.dims.addEventListener("change", () => set({ dims: READ.dims(input.dims.value) }));
  input.step.addEventListener("input", look);
  input.run.addEventListener("click", start);
  input.preset.addEventListener("click", () => {
    const { block, dims, w, s, start, stop } = preset(now.model);
    set({ block, dims, w, s, start, stop });
  });
  input.another.addEventListener("click", () => {
    const { captions } = dgLive.models[now.model];
    set({ caption: captions[Math.floor(Math.random() * captions.length)] });
  });
  input.link.addEventListener("click", async () => {
    await navigator.clipboard?.writeText(location.href).catch(() => null);
    input.link.textContent = navigator.clipboard ? "Copied" : "It is in the address bar";
    setTimeout(() => (input.link.textContent = "Copy link"), 2000);
  });

  /* The links of the page are addresses with a query: one with "#model=..." is no place in the page for the theme. */
  for (const link of document.querySelectorAll('a[href^="?model="]')) {
    link.addEventListener("click", (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      history.pushState(null, "", `#${link.getAttribute("href").slice(1)}`);
      follow();
    });
  }

  function open() {
    const found = parse(location.hash.includes("=") ? location.hash : location.search);
    if (typeof found === "string") {
      now ??= preset(Object.keys(dgLive.models)[0]);
      show();
      return fail(found);
    }
    now = null;
    part.remark.textContent = "";
    set(found);
    return undefined;
  }
  function follow() {
    if (!location.hash.includes("=")) return; // a heading
    open();
    if (ready !== now.model && !dgLive.size(now.model)) start();
    root.scrollIntoView({ block: "start" });
  }
  addEventListener("hashchange", follow);
  addEventListener("popstate", follow);
  open();
  return undefined;
});
