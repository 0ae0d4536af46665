/* The two kinds of tokenizers that the models' text encoders have, as the Python library `tokenizers` has them. Runs in
   the worker. */
function liveTokenizer() {
  const SPACE = "\\t-\\r \\u0085\\u00a0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000"; // Unicode's white space
  const SPACES = new RegExp(`[${SPACE}]+`, "gu");
  const WORDS = new RegExp(`'s|'t|'re|'ve|'m|'ll|'d|\\p{L}+|\\p{N}|[^${SPACE}\\p{L}\\p{N}]+`, "gu");
  const UNKNOWN_PENALTY = 10;

  /* GPT-2's names of bytes: printable ones stand for themselves. */
  const BYTES = [];
  for (let byte = 0, other = 256; byte < 256; byte++) {
    const printable = (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
    BYTES.push(String.fromCodePoint(printable ? byte : other++));
  }

  /* Text between typed special tokens, and those, in their order: [text, isSpecial]. */
  function parts(text, special) {
    const escaped = special.map((token) => token.replace(/[|\\{}()[\]^$+*?.]/g, "\\$&"));
    return text.split(new RegExp(`(${escaped.join("|")})`)).map((part, i) => [part, i % 2 === 1]);
  }

  class BytePairs {
    constructor(data) {
      this.data = data;
      this.ids = new Map(data.vocabulary.map((piece, id) => [piece, id]));
      this.ranks = new Map(data.merges.map((pair, rank) => [pair, rank]));
    }

    word(text) {
      const pieces = [...new TextEncoder().encode(text)].map((byte) => BYTES[byte]);
      pieces[pieces.length - 1] += "</w>";
      for (;;) {
        let best = Infinity, place = -1;
        for (let i = 0; i + 1 < pieces.length; i++) {
          const rank = this.ranks.get(`${pieces[i]} ${pieces[i + 1]}`) ?? Infinity;
          if (rank < best) [best, place] = [rank, i];
        }
        if (place < 0) return pieces.map((piece) => this.ids.get(piece) ?? this.data.unknown);
        pieces.splice(place, 2, pieces[place] + pieces[place + 1]);
      }
    }

    tokens(text) {
      return parts(text, this.data.special).flatMap(([part, special]) => {
        if (special) return [this.ids.get(part)];
        const plain = [...part.normalize("NFC").replace(SPACES, " ")].map((c) => c.toLowerCase()).join("");
        return (plain.match(WORDS) ?? []).flatMap((word) => this.word(word));
      });
    }
  }

  class Unigram {
    constructor(data) {
      this.data = data;
      this.pieces = new Map(data.vocabulary.map(([piece, score], id) => [piece, [score, id]]));
      this.longest = Math.max(...data.vocabulary.map(([piece]) => [...piece].length));
      this.unknown = Math.min(...data.vocabulary.map(([, score]) => score)) - UNKNOWN_PENALTY;
    }

    /* The most probable pieces (Viterbi); neighbouring unknown characters are one token. */
    word(text) {
      const characters = [...text];
      const best = characters.map(() => null);
      const score = (end) => (end ? best[end - 1].score : 0);
      for (let start = 0; start < characters.length; start++) {
        const offer = (length, value, id) => {
          const candidate = { start, id, score: score(start) + value };
          const end = start + length - 1;
          if (!best[end] || candidate.score > best[end].score) best[end] = candidate;
        };
        let piece = "";
        for (let length = 1; length <= this.longest && start + length <= characters.length; length++) {
          piece += characters[start + length - 1];
          if (this.pieces.has(piece)) offer(length, ...this.pieces.get(piece));
          else if (length === 1) offer(1, this.unknown, this.data.unknown);
        }
      }
      const ids = [];
      for (let end = characters.length; end > 0; end = best[end - 1].start) {
        const { id } = best[end - 1];
        if (id !== this.data.unknown || ids[0] !== id) ids.unshift(id);
      }
      return ids;
    }

    tokens(text) {
      return parts(text, this.data.special).flatMap(([part, special]) => {
        if (special) return [this.pieces.get(part)[1]];
        const words = part.split(SPACES).filter(Boolean).map((word) => (word.startsWith("▁") ? word : `▁${word}`));
        return words.flatMap((word) => word.match(/▁[^▁]*/gu)).flatMap((piece) => this.word(piece));
      });
    }
  }

  function make(data) {
    const { length, start, end, pad } = data;
    const model = data.kind === "bpe" ? new BytePairs(data) : new Unigram(data);
    const before = start === undefined ? [] : [start];
    const room = length - before.length - 1;
    return {
      /* The ids of a caption, cut and padded to the length that the models were trained with. */
      encode(text) {
        const ids = [...before, ...model.tokens(text).slice(0, room), end];
        return [...ids, ...Array(length - ids.length).fill(pad)];
      },
      count: (text) => model.tokens(text).length,
      room,
    };
  }

  /* What the reader should know of a caption: words that fall into parts, and whether its end is cut off. */
  function remarks(tokenizers, text) {
    const words = text.split(SPACES).filter(Boolean);
    const unknown = words.filter((word) => tokenizers.some((tokenizer) => tokenizer.count(word) > 1));
    return { unknown: [...new Set(unknown)], cut: tokenizers.some((tokenizer) => tokenizer.count(text) > tokenizer.room) };
  }

  return { make, remarks };
}
