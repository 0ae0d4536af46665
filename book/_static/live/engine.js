/* Loads the exported models and their runtime, on demand, and runs them in a worker. Everything comes as scripts and
   everything runs from texts, because a page opened as a file may read neither other files nor worker scripts. */
const dgLive = (() => {
  const base = new URL("data/", document.currentScript.src).href;
  const texts = {}; // base64 by name, one per script
  const loaded = new Map(); // name: promise
  const pending = new Map(); // id: { resolve, reject, step }
  let offered = null, worker = null, count = 0;

  /* Called by data/models.js: what there is, and the sizes of its scripts. */
  const offer = (content) => (offered = content);

  /* Called by the scripts of models and runtime. */
  const take = (name, index, text) => ((texts[name] ??= [])[index] = text);

  function script(file) {
    return new Promise((resolve, reject) => {
      const element = document.createElement("script");
      element.src = base + file;
      element.onload = resolve;
      element.onerror = () => reject(new Error(`The file ${file} could not be loaded. Check the connection and try again.`));
      document.head.append(element);
    }).finally(() => document.querySelector(`script[src="${base + file}"]`)?.remove());
  }

  const scriptsOf = (name) => (name === "runtime" ? offered.runtime : offered.models[name].scripts);
  const sizeOf = (name) => (loaded.has(name) ? 0 : scriptsOf(name).reduce((sum, [, bytes]) => sum + bytes, 0));

  /* Bytes still to be loaded before a model can run. */
  const size = (name) => sizeOf("runtime") + sizeOf(name);

  async function fetched(name, progress) {
    for (const [file, bytes] of scriptsOf(name)) {
      await script(file);
      progress(bytes);
    }
    const text = texts[name].join("");
    delete texts[name];
    return text;
  }

  function once(name, load) {
    if (!loaded.has(name)) {
      loaded.set(name, load().catch((error) => {
        loaded.delete(name); // may be tried again
        throw error;
      }));
    }
    return loaded.get(name);
  }

  /* Makes a model ready; progress is told the bytes that have come. */
  async function load(name, progress) {
    for (const [thing, word] of [[self.WebAssembly, "WebAssembly"], [self.Worker, "workers"], [self.DecompressionStream, "DecompressionStream"]]) {
      if (!thing) throw new Error(`This browser has no ${word}, without which the model cannot run. A current one has.`);
    }
    await once("runtime", async () => ask("runtime", { text: await fetched("runtime", progress) }));
    await once(name, async () => ask("model", { name, text: await fetched(name, progress) }));
  }

  function start() {
    const source = `const noise = (${liveNoise})(), tokenizer = (${liveTokenizer})();
      (${liveWorker})((${liveSampler})(noise, tokenizer));`;
    const address = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
    worker = new Worker(address);
    worker.onmessage = ({ data }) => {
      const asked = pending.get(data.id);
      if (data.step) return asked.step(data.step);
      pending.delete(data.id);
      return data.error ? asked.reject(new Error(data.error)) : asked.resolve(data.done);
    };
    worker.onerror = (event) => {
      const reason = event.message || "the browser does not let this page start a worker";
      for (const { reject } of pending.values()) reject(new Error(`The model stopped: ${reason}.`));
      pending.clear();
      loaded.clear(); // a new worker has nothing
      worker.terminate();
      worker = null;
    };
  }

  /* One question to the worker, see worker.js; step is told of every sampling step. */
  function ask(kind, content, step) {
    if (!worker) start();
    const id = ++count;
    return new Promise((resolve, reject) => {
      pending.set(id, { resolve, reject, step });
      worker.postMessage({ id, kind, ...content });
    });
  }

  const strip = (name) => `${base}${name}.png`;

  return { offer, take, load, size, strip, ask, get models() { return offered?.models ?? null; } };
})();
