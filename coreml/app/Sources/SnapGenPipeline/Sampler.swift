// Sampler.swift: flow.py on the phone. Times from 1 (noise) to 0 (picture), Euler steps, guidance, and sample.py's noise.
import Foundation

public enum Sampler {
    /// The steps + 1 times from 1 to 0: evenly spaced, then t' = s t / (1 + (s - 1) t).
    public static func times(steps: Int, shift: Float) -> [Float] {
        (0...steps).map { i in
            let t = 1 - Float(i) / Float(steps)
            return shift * t / (1 + (shift - 1) * t)
        }
    }

    /// One Euler step of dx/dt = v: x_s = x_t + (s - t) v. With s = 0 it is the picture that the model has in mind at t.
    public static func euler(_ x: [Float], _ velocity: [Float], from t: Float, to s: Float) -> [Float] {
        zip(x, velocity).map { $0 + (s - t) * $1 }
    }

    /// Classifier-free guidance on the velocities of the caption and of the empty caption, one behind the other.
    public static func guide(_ both: [Float], scale: Float) -> [Float] {
        zip(both.prefix(both.count / 2), both.suffix(both.count / 2)).map { $1 + scale * ($0 - $1) }
    }

    /// The generator's seed that common/seeds.py makes of a seed: so that the phone draws sample.py's picture.
    public static func generator(seed: Int) -> UInt32 {
        firstWordOfSHA256(Array("(\(seed),)".utf8)).byteSwapped
    }

    /// torch.randn of `count` numbers, a multiple of 16, on the CPU: a Mersenne twister's numbers by Box and Muller.
    public static func noise(count: Int, generator: UInt32) -> [Float] {
        precondition(count % 16 == 0, "torch draws its last numbers otherwise when \(count) is no multiple of 16")
        var twister = MersenneTwister(seed: generator)
        var values = (0..<count).map { _ in Float(twister.next() & 0xff_ffff) / 0x100_0000 }  // even, 0 to 1
        for block in stride(from: 0, to: count, by: 16) {
            for i in block..<block + 8 {
                let radius = (-2 * Foundation.log(1 - values[i])).squareRoot(), angle = 2 * Float.pi * values[i + 8]
                (values[i], values[i + 8]) = (radius * Foundation.cos(angle), radius * Foundation.sin(angle))
            }
        }
        return values
    }
}

/// The first 32 bits of the hash of at most 55 bytes (FIPS 180-4). CryptoKit has it whole, but on Apple's systems alone.
func firstWordOfSHA256(_ bytes: [UInt8]) -> UInt32 {
    precondition(bytes.count < 56, "one block of 64 bytes holds a text of 55")
    var primes: [Double] = []
    for n in 2... where primes.allSatisfy({ Double(n).truncatingRemainder(dividingBy: $0) != 0 }) {
        primes.append(Double(n))
        if primes.count == 64 { break }
    }
    func fraction(_ x: Double) -> UInt32 { UInt32((x - x.rounded(.down)) * 0x1_0000_0000) }
    func turn(_ x: UInt32, _ n: UInt32) -> UInt32 { x >> n | x << (32 - n) }
    let length = [UInt8(bytes.count * 8 >> 8), UInt8(bytes.count * 8 & 255)]  // in bits
    let block = bytes + [0x80] + [UInt8](repeating: 0, count: 61 - bytes.count) + length
    var w = stride(from: 0, to: 64, by: 4).map { i in block[i..<i + 4].reduce(UInt32(0)) { $0 << 8 | UInt32($1) } }
    for i in 16..<64 {
        let a = turn(w[i - 15], 7) ^ turn(w[i - 15], 18) ^ w[i - 15] >> 3
        let b = turn(w[i - 2], 17) ^ turn(w[i - 2], 19) ^ w[i - 2] >> 10
        w.append(w[i - 16] &+ a &+ w[i - 7] &+ b)
    }
    var s = primes.prefix(8).map { fraction($0.squareRoot()) }
    let start = s[0]
    for (prime, word) in zip(primes, w) {
        let mixed = turn(s[4], 6) ^ turn(s[4], 11) ^ turn(s[4], 25), chosen = s[4] & s[5] ^ ~s[4] & s[6]
        let one = s[7] &+ mixed &+ chosen &+ fraction(Foundation.cbrt(prime)) &+ word
        let two = (turn(s[0], 2) ^ turn(s[0], 13) ^ turn(s[0], 22)) &+ (s[0] & s[1] ^ s[0] & s[2] ^ s[1] & s[2])
        s = [one &+ two, s[0], s[1], s[2], s[3] &+ one, s[4], s[5], s[6]]
    }
    return start &+ s[0]
}

/// MT19937, 32 bits (Matsumoto and Nishimura, 1998).
struct MersenneTwister {
    private var state: [UInt32], place = 624

    init(seed: UInt32) {
        state = [seed]
        for i in 1..<624 { state.append(1_812_433_253 &* (state[i - 1] ^ state[i - 1] >> 30) &+ UInt32(i)) }
    }

    mutating func next() -> UInt32 {
        if place == 624 {
            for i in 0..<624 {
                let joined = state[i] & 0x8000_0000 | state[(i + 1) % 624] & 0x7fff_ffff
                state[i] = state[(i + 397) % 624] ^ joined >> 1 ^ (joined & 1 == 0 ? 0 : 0x9908_b0df)
            }
            place = 0
        }
        var y = state[place]
        place += 1
        y ^= y >> 11
        y ^= y << 7 & 0x9d2c_5680
        y ^= y << 15 & 0xefc6_0000
        return y ^ y >> 18
    }
}
