/* The map of mean |z|, one row of bars per block and one bar per channel, in which channels are picked. */
class LiveMap {
  /* picked(block, channel) is called for a click or Enter; told(text) describes the bar under pointer or cursor. */
  constructor(canvas, { picked, told }) {
    Object.assign(this, { canvas, told, blocks: 0, channels: 0, cursor: null, data: null, block: 0, dims: [], top: 1 });
    canvas.addEventListener("pointermove", (event) => this.point(this.under(event)));
    canvas.addEventListener("pointerleave", () => this.point(null));
    canvas.addEventListener("click", (event) => {
      const bar = this.under(event);
      if (bar) picked(bar.block, bar.channel);
    });
    canvas.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
      if (event.altKey || event.ctrlKey || event.metaKey || !this.data) return;
      const at = this.cursor ?? { block: this.block, channel: this.dims[0] ?? 0 };
      if (event.key in moves) {
        const [down, right] = moves[event.key];
        const within = (value, size) => Math.min(Math.max(value, 0), size - 1);
        this.point({ block: within(at.block + down, this.blocks), channel: within(at.channel + right, this.channels) });
      } else if (event.key === "Enter" || event.key === " ") picked(at.block, at.channel);
      else return;
      event.preventDefault();
    });
    new ResizeObserver(() => this.draw()).observe(canvas.parentElement);
    new MutationObserver(() => this.draw()).observe(document.documentElement, { attributeFilter: ["data-theme"] });
  }

  /* What to show: magnitude and energy (blocks x channels), the edited block and channels, and the largest ratio. */
  show(content) {
    Object.assign(this, content);
    this.draw();
  }

  point(bar) {
    this.cursor = bar;
    this.told(bar && this.data ? this.describe(bar) : "");
    this.draw();
  }

  row(values, block) {
    return values.subarray(block * this.channels, (block + 1) * this.channels);
  }

  static median(values) {
    const ordered = Float32Array.from(values).sort();
    const middle = ordered.length / 2;
    return (ordered[Math.ceil(middle) - 1] + ordered[Math.floor(middle)]) / 2;
  }

  ratio({ block, channel }) {
    const row = this.row(this.data.magnitude, block);
    return row[channel] / LiveMap.median(row);
  }

  describe(bar) {
    const energy = this.row(this.data.energy, bar.block);
    const share = energy[bar.channel] / energy.reduce((a, b) => a + b, 0);
    return `block ${bar.block}, channel ${bar.channel}: ${this.ratio(bar).toFixed(1)} times the median, ${(100 * share).toFixed(0)} % of the energy`;
  }

  get layout() {
    const width = this.canvas.parentElement.clientWidth;
    const left = 26, high = Math.max(26, Math.min(46, 340 / Math.max(this.blocks, 1)));
    return { width, left, high, top: high, bar: (width - left) / Math.max(this.channels, 1) };
  }

  /* The bar at the pointer: the largest within a few pixels, so that a spike is easily hit. */
  under(event) {
    if (!this.data) return null;
    const { left, high, bar, top } = this.layout;
    const box = this.canvas.getBoundingClientRect();
    const block = Math.floor((event.clientY - box.top - top) / high);
    const at = (event.clientX - box.left - left) / bar;
    if (block < 0 || block >= this.blocks || at < -1 || at > this.channels) return null;
    const row = this.row(this.data.magnitude, block);
    const near = 5 / bar;
    const first = Math.max(0, Math.floor(at - near)), last = Math.min(this.channels - 1, Math.floor(at + near));
    let channel = Math.min(Math.max(Math.floor(at), 0), this.channels - 1);
    const ordinary = 3 * LiveMap.median(row);
    for (let i = first; i <= last; i++) if (row[i] > ordinary && row[i] > row[channel]) channel = i;
    return { block, channel };
  }

  draw() {
    if (!this.blocks) return;
    const { width, left, high, bar, top } = this.layout;
    const height = top + high * this.blocks + 2, dense = devicePixelRatio || 1;
    Object.assign(this.canvas, { width: width * dense, height: height * dense });
    Object.assign(this.canvas.style, { width: `${width}px`, height: `${height}px` });
    const paint = this.canvas.getContext("2d");
    const colour = (name) => getComputedStyle(this.canvas).getPropertyValue(`--live-${name}`).trim();
    paint.scale(dense, dense);
    paint.font = "11px system-ui, sans-serif";
    paint.textBaseline = "alphabetic";
    for (let block = 0; block < this.blocks; block++) {
      const base = top + high * (block + 1);
      if (block === this.block) {
        paint.fillStyle = colour("chosen");
        paint.fillRect(0, base - high + 1, width, high);
      }
      paint.fillStyle = colour("text");
      paint.fillText(String(block), 6, base - 3);
      paint.fillStyle = colour("line");
      paint.fillRect(left, base, width - left, 1);
      if (!this.data) continue;
      const row = this.row(this.data.magnitude, block), median = LiveMap.median(row);
      row.forEach((value, channel) => {
        const ratio = value / median, edited = block === this.block && this.dims.includes(channel);
        const long = Math.max(1, (ratio / this.top) * (2 * high - 8));
        paint.fillStyle = colour(edited ? "zeroed" : ratio >= LiveMap.LARGE ? "large" : "bar");
        paint.fillRect(left + channel * bar, base - long, Math.max(bar - (bar > 4 ? 1 : 0.4), 1), long);
        if (edited) {
          paint.beginPath();
          paint.arc(left + (channel + 0.5) * bar, base - long - 4, 3, 0, 7);
          paint.fill();
        }
      });
    }
    if (this.cursor) {
      paint.strokeStyle = colour("text");
      paint.strokeRect(left + this.cursor.channel * bar - 1.5, top + high * this.cursor.block + 1.5, Math.max(bar, 1) + 3, high - 2);
    }
  }
}
LiveMap.LARGE = 5; // times the median: what `dgkit.record` takes for massive
