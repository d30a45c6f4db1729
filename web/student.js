// What the page computes itself, as flow.py, common/seeds.py and transformers do: noise, times, steps, tokens.
// tests/test_web.py runs Python's own cases through every function here.

// ----------------------------------------------------------------------------------------------------
// Noise: SHA-256 of (seed,) seeds a Mersenne twister, whose numbers become normal by Box and Muller

// The first 32 bits of the hash. crypto.subtle would do, but is missing where a page comes by plain http.
export function generatorOf(seed) {
  const primes = [];
  for (let n = 2; primes.length < 64; n++) if (primes.every((p) => n % p)) primes.push(n);
  const fraction = (x) => ((x % 1) * 2 ** 32) | 0;
  const text = new TextEncoder().encode(`(${seed},)`), block = new DataView(new ArrayBuffer(64));
  text.forEach((byte, i) => block.setUint8(i, byte));
  block.setUint8(text.length, 0x80);
  block.setUint32(60, 8 * text.length);
  const turn = (x, n) => (x >>> n) | (x << (32 - n));
  const w = Array.from({ length: 16 }, (_, i) => block.getInt32(4 * i));
  for (let i = 16; i < 64; i++) {
    const a = w[i - 15], b = w[i - 2];
    const mixed = (turn(a, 7) ^ turn(a, 18) ^ (a >>> 3)) + (turn(b, 17) ^ turn(b, 19) ^ (b >>> 10));
    w.push((w[i - 16] + w[i - 7] + mixed) | 0);
  }
  const start = primes.slice(0, 8).map((p) => fraction(Math.sqrt(p)));
  let [a, b, c, d, e, f, g, h] = start;
  primes.forEach((p, i) => {
    const one = h + (turn(e, 6) ^ turn(e, 11) ^ turn(e, 25)) + ((e & f) ^ (~e & g))
      + fraction(Math.cbrt(p)) + w[i];
    const two = (turn(a, 2) ^ turn(a, 13) ^ turn(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
    [a, b, c, d, e, f, g, h] = [(one + two) | 0, a, b, c, (d + one) | 0, e, f, g];
  });
  block.setUint32(0, a + start[0]);
  return block.getUint32(0, true);
}

export function noise(generator, count) {
  const twister = new Uint32Array(624), values = new Float32Array(count);
  twister[0] = generator;
  for (let i = 1; i < 624; i++) {
    twister[i] = Math.imul(1812433253, twister[i - 1] ^ (twister[i - 1] >>> 30)) + i;
  }
  for (let n = 0; n < count; n++) {
    const i = n % 624;
    if (i === 0) {
      for (let k = 0; k < 624; k++) {
        const y = (twister[k] & 0x80000000) | (twister[(k + 1) % 624] & 0x7fffffff);
        twister[k] = twister[(k + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
      }
    }
    let y = twister[i];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    values[n] = ((y ^ (y >>> 18)) & 0xffffff) / 0x1000000; // even, 0 to 1
  }
  for (let n = 0; n < count; n++) {
    if (n % 16 >= 8) continue; // torch takes 16 numbers at a time, of which n and n + 8 make a pair
    const radius = Math.sqrt(-2 * Math.log(1 - values[n])), angle = 2 * Math.PI * values[n + 8];
    [values[n], values[n + 8]] = [radius * Math.cos(angle), radius * Math.sin(angle)];
  }
  return values;
}

// ----------------------------------------------------------------------------------------------------
// flow.py: times from 1 (noise) to 0 (picture), guidance, Euler steps

export function timesOf(steps, shift) {
  const even = Array.from({ length: steps + 1 }, (_, i) => 1 - i / steps);
  return even.map((t) => (shift * t) / (1 + (shift - 1) * t));
}

export const guide = (text, empty, scale) => text.map((v, i) => empty[i] + scale * (v - empty[i]));
export const euler = (x, v, t, s) => x.map((value, i) => value + (s - t) * v[i]);

// ----------------------------------------------------------------------------------------------------
// CLIP's byte-pair encoding, read from tokenizer.json and tokenizer_config.json

const WORDS = /'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\p{White_Space}\p{L}\p{N}]+/gu;
const PIECES = new RegExp(`<\\|startoftext\\|>|<\\|endoftext\\|>|${WORDS.source}`, "gu");
const VISIBLE = (() => { // GPT-2's visible characters of the 256 bytes
  let free = 256;
  const seen = (byte) => (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
  return Array.from({ length: 256 }, (_, byte) => String.fromCodePoint(seen(byte) ? byte : free++));
})();
const lower = (text) => [...text.normalize("NFC")].map((c) => c.toLowerCase()).join(""); // no final sigma

export class Tokenizer {
  constructor({ file, settings }) {
    this.ids = new Map(Object.entries(file.model.vocab));
    file.added_tokens.forEach((token) => this.ids.set(token.content, token.id));
    this.ranks = new Map(file.model.merges.map(([left, right], i) => [`${left} ${right}`, i]));
    const special = ["bos", "eos", "pad"].map((name) => this.ids.get(settings[`${name}_token`]));
    [this.start, this.end, this.padding] = special;
    const added = file.added_tokens.map((token) => token.content.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
    this.added = new RegExp(`(${added.sort((a, b) => b.length - a.length).join("|")})`, "u");
  }

  encode(text) { // all tokens, without start and end
    const some = (part) => this.words(part).flatMap((word) => this.merge(word));
    return text.split(this.added).flatMap((part, i) => (i % 2 ? [this.ids.get(part)] : some(part)));
  }

  words(text) {
    return (lower(text).match(PIECES) ?? []).flatMap((piece) => piece.match(WORDS));
  }

  merge(word) {
    const parts = [...new TextEncoder().encode(word)].map((byte) => VISIBLE[byte]);
    parts[parts.length - 1] += "</w>";
    for (;;) {
      let best = -1, lowest = Infinity;
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = this.ranks.get(`${parts[i]} ${parts[i + 1]}`) ?? Infinity;
        if (rank < lowest) [best, lowest] = [i, rank];
      }
      if (best < 0) return parts.map((part) => this.ids.get(part));
      parts.splice(best, 2, parts[best] + parts[best + 1]);
    }
  }

  padded(text, length) { // start, as many tokens as fit, end, padding
    const tokens = [this.start, ...this.encode(text).slice(0, length - 2), this.end];
    return Int32Array.from({ length }, (_, i) => tokens[i] ?? this.padding);
  }
}
