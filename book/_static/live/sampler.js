/* Sampling with the exported models. Runs in the worker, where `noise` and `tokenizer` are. */
function liveSampler(noise, tokenizer) {
  /* What each panel does in a step in which channels are zeroed: c and u are the predictions with and without the
     condition, m the one with the condition and the channels zeroed. */
  const PANELS = { plain: "c", disrupted: "m", dg: "cm", cfg: "cu", "cfg-dg": "cum" };

  class Model {
    constructor(constants, sessions, Tensor) {
      Object.assign(this, { constants, sessions, Tensor, encoded: new Map() });
      this.tokenizers = (constants.tokenizers ?? []).map(tokenizer.make);
      this.size = constants.latent.reduce((a, b) => a * b);
    }

    remarks(caption) {
      return tokenizer.remarks(this.tokenizers, caption);
    }

    /* The inputs that the condition is, by name: of a caption, or of a class (null for none). */
    async condition(value) {
      if (!this.tokenizers.length) return { class_labels: BigInt64Array.of(BigInt(value ?? this.constants.null)) };
      const caption = value ?? "";
      if (!this.encoded.has(caption)) {
        const ids = this.tokenizers.map((one) => BigInt64Array.from(one.encode(caption), BigInt));
        const feeds = ids.map((data, i) => [`ids_${i}`, new this.Tensor("int64", data, [1, data.length])]);
        const outputs = await this.sessions.text.run(Object.fromEntries(feeds));
        this.encoded.set(caption, Object.fromEntries(Object.entries(outputs).map(([name, t]) => [name, t.data.slice()])));
      }
      return this.encoded.get(caption);
    }

    /* One call of the transformer. rows: { latents, condition, zeroed }; in zeroed ones `dims` of `block` are zero. */
    async call(rows, timestep, block, dims) {
      const { latent, blocks, channels, conditions, integerTimestep } = this.constants;
      const stacked = (parts, Kind) => {
        const data = new Kind(parts.reduce((sum, part) => sum + part.length, 0));
        parts.reduce((at, part) => (data.set(part, at), at + part.length), 0);
        return data;
      };
      const type = (data) => (data instanceof Float32Array ? "float32" : "int64");
      const count = rows.length;
      const mask = new Float32Array(blocks * count * channels).fill(1);
      rows.forEach((row, i) => {
        if (row.zeroed) for (const dim of dims) mask[(block * count + i) * channels + dim] = 0;
      });
      const time = integerTimestep
        ? new BigInt64Array(count).fill(BigInt(timestep))
        : new Float32Array(count).fill(timestep);
      const feeds = {
        latents: new this.Tensor("float32", stacked(rows.map((row) => row.latents), Float32Array), [count, ...latent]),
        timestep: new this.Tensor(type(time), time, [count]),
        mask: new this.Tensor("float32", mask, [blocks, count, channels]),
      };
      for (const [name, shape] of Object.entries(conditions)) {
        const data = stacked(rows.map((row) => row.condition[name]), rows[0].condition[name].constructor);
        feeds[name] = new this.Tensor(type(data), data, [count, ...shape]);
      }
      const { prediction, magnitude, energy } = await this.sessions.transformer.run(feeds);
      const ofFirst = (values) => {
        const own = new Float32Array(blocks * channels);
        for (let i = 0; i < blocks; i++) own.set(values.subarray(i * count * channels, (i * count + 1) * channels), i * channels);
        return own;
      };
      return {
        predictions: rows.map((_, i) => prediction.data.subarray(i * this.size, (i + 1) * this.size)),
        magnitude: ofFirst(magnitude.data),
        energy: ofFirst(energy.data),
      };
    }

    /* RGBA pixels of latents, by panel. */
    async decode(latents) {
      const names = Object.keys(latents);
      const images = {};
      const distinct = new Map(); // panels that are still the same share one
      for (const name of names) {
        if (!distinct.has(latents[name])) {
          const feed = new this.Tensor("float32", latents[name], [1, ...this.constants.latent]);
          distinct.set(latents[name], (await this.sessions.decoder.run({ latents: feed })).image);
        }
        const { data, dims } = distinct.get(latents[name]);
        const area = dims[2] * dims[3];
        const pixels = new Uint8ClampedArray(4 * area); // rounds
        for (let i = 0; i < area; i++) {
          for (let c = 0; c < 3; c++) pixels[4 * i + c] = 255 * data[c * area + i];
          pixels[4 * i + 3] = 255;
        }
        images[name] = pixels;
      }
      return images;
    }

    /* All panels from the same noise, one call of the transformer a step.

       settings: condition, seed, steps, block, dims, w, s, and start and stop of the part of the steps in which channels
       are zeroed. each(step) is told after every step what it found, and stops the run where it returns false.
       Returns the finished latents by panel, or null. */
    async sample(settings, each) {
      const { steps, block, dims, w, s, start, stop } = settings;
      const table = this.constants.tables[steps - 1];
      const [c, u] = [await this.condition(settings.condition), await this.condition(null)];
      const first = noise.normal(settings.seed, this.size);
      let latents = Object.fromEntries(Object.keys(PANELS).map((name) => [name, first]));
      for (let i = 0; i < steps; i++) {
        const [timestep, a, b, p, q] = table[i];
        const active = dims.length > 0 && Math.trunc(start * steps) <= i && i < Math.trunc(stop * steps);
        const rows = [], places = new Map();
        const place = (x, kind) => {
          const key = `${latentIds.get(x)} ${kind}`;
          if (!places.has(key)) {
            places.set(key, rows.length);
            rows.push({ latents: x, condition: kind === "u" ? u : c, zeroed: kind === "m" });
          }
          return places.get(key);
        };
        const latentIds = new Map();
        for (const x of Object.values(latents)) if (!latentIds.has(x)) latentIds.set(x, latentIds.size);
        // the plain panel first: the map shows its row
        const plans = Object.entries(PANELS).map(([name, kinds]) => {
          let needed = s === 1 ? kinds.replace("u", "") : kinds;
          if (needed === "m") needed = active ? "m" : "c";
          else if (!active || w === 0) needed = needed.replace("m", "");
          const x = latents[name];
          return { name, x, key: `${latentIds.get(x)} ${needed}`, at: [...needed].map((kind) => [kind, place(x, kind)]) };
        });
        const { predictions, magnitude, energy } = await this.call(rows, timestep, block, dims);
        const following = new Map(), clean = {}, next = {};
        for (const { name, x, key, at } of plans) {
          if (!following.has(key)) {
            const of = Object.fromEntries(at.map(([kind, row]) => [kind, predictions[row]]));
            const v = this.guided(of, w, s);
            following.set(key, [x.map((value, j) => a * value + b * v[j]), x.map((value, j) => p * value + q * v[j])]);
          }
          [next[name], clean[name]] = following.get(key);
        }
        latents = next;
        if (!(await each({ step: i + 1, steps, timestep, magnitude, energy, clean }))) return null;
      }
      return latents;
    }

    /* Eq. 4 and Eq. 5 of the paper, with s = lambda + 1. */
    guided({ c, u, m }, w, s) {
      if (!c) return m;
      return c.map((value, j) => (u ? u[j] + s * (value - u[j]) : value) + (m ? w * (value - m[j]) : 0));
    }
  }

  return { Model };
}
