/* The worker: unpacks what the page has loaded, runs the models and answers the page. */
function liveWorker(sampler) {
  let ort = null, running = 0, shown = null;
  const models = new Map();

  /* Base64 text of a gzip file: JSON that names parts and their lengths, preceded by its own length, then the parts. */
  async function unpack(text) {
    let bytes;
    if (Uint8Array.fromBase64) bytes = Uint8Array.fromBase64(text);
    else {
      const binary = atob(text);
      bytes = new Uint8Array(binary.length);
      for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
    }
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const whole = await new Response(stream).arrayBuffer();
    const length = new DataView(whole).getUint32(0, true);
    const lengths = JSON.parse(new TextDecoder().decode(new Uint8Array(whole, 4, length)));
    let at = 4 + length;
    return Object.fromEntries(lengths.map(([name, size]) => [name, new Uint8Array(whole, (at += size) - size, size)]));
  }

  const answers = {
    async runtime({ text }) {
      const parts = await unpack(text);
      const address = URL.createObjectURL(new Blob([parts["ort.mjs"]], { type: "text/javascript" }));
      ort = await import(address);
      URL.revokeObjectURL(address);
      ort.env.wasm.numThreads = 1; // more need headers that static hosts do not send
      ort.env.wasm.wasmBinary = parts["ort.wasm"];
    },

    async model({ name, text }) {
      const parts = await unpack(text);
      const sessions = {};
      for (const part of Object.keys(parts).filter((part) => part !== "constants")) {
        sessions[part] = await ort.InferenceSession.create(parts[part], { executionProviders: ["wasm"] });
      }
      const constants = JSON.parse(new TextDecoder().decode(parts.constants));
      models.set(name, new sampler.Model(constants, sessions, ort.Tensor));
    },

    async remarks({ model, caption }) {
      return models.get(model).remarks(caption);
    },

    /* A newer run ends an older one, which then answers null. */
    async sample({ id, settings }) {
      running = id;
      const model = models.get(settings.model);
      const history = [];
      const latents = await model.sample(settings, async ({ clean, ...step }) => {
        history.push(clean);
        const images = step.step % 4 === 1 && step.step < step.steps ? await model.decode(clean) : null;
        postMessage({ id, step: { ...step, images } });
        await new Promise((resolve) => setTimeout(resolve)); // lets newer messages in
        return running === id;
      });
      if (!latents) return null;
      shown = { model, history };
      return { images: await model.decode(latents) };
    },

    /* What the shown run took for the finished image after one of its steps. */
    async look({ step }) {
      return { images: await shown.model.decode(shown.history[step - 1]) };
    },
  };

  onmessage = async ({ data }) => {
    try {
      postMessage({ id: data.id, done: await answers[data.kind](data) });
    } catch (error) {
      postMessage({ id: data.id, error: String(error?.message ?? error) });
    }
  };
}
