/* torch's normal noise for a seed: its Mersenne twister and its Box-Muller transform, in which torch takes 16 values at a
   time. Runs in the worker. */
function liveNoise() {
  const SIZE = 624;

  /* torch.Generator().manual_seed(seed), as a function that gives the next 32 bits. */
  function twister(seed) {
    const state = new Uint32Array(SIZE);
    state[0] = seed >>> 0;
    for (let i = 1; i < SIZE; i++) state[i] = Math.imul(1812433253, state[i - 1] ^ (state[i - 1] >>> 30)) + i;
    let place = SIZE;
    return () => {
      if (place === SIZE) {
        for (let i = 0; i < SIZE; i++) {
          const mixed = (state[i] & 0x80000000) | (state[(i + 1) % SIZE] & 0x7fffffff);
          state[i] = state[(i + 397) % SIZE] ^ (mixed >>> 1) ^ (mixed & 1 ? 0x9908b0df : 0);
        }
        place = 0;
      }
      let bits = state[place++];
      bits ^= bits >>> 11;
      bits ^= (bits << 7) & 0x9d2c5680;
      bits ^= (bits << 15) & 0xefc60000;
      return (bits ^ (bits >>> 18)) >>> 0;
    };
  }

  function transform(values, from) {
    for (let i = from; i < from + 8; i++) {
      const radius = Math.sqrt(-2 * Math.log(1 - values[i]));
      const angle = 2 * Math.PI * values[i + 8];
      values[i] = radius * Math.cos(angle);
      values[i + 8] = radius * Math.sin(angle);
    }
  }

  /* torch.randn(count, generator=torch.Generator().manual_seed(seed)), for a count of 16 or more. */
  function normal(seed, count) {
    const next = twister(seed);
    const uniform = () => (next() & 0xffffff) / 0x1000000;
    const values = new Float32Array(count).map(uniform);
    for (let i = 0; i + 16 <= count; i += 16) transform(values, i);
    if (count % 16) {
      for (let i = count - 16; i < count; i++) values[i] = uniform();
      transform(values, count - 16);
    }
    return values;
  }

  return { normal };
}
