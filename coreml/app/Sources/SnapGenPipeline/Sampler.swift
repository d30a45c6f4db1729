// Sampler.swift: flow.py on the phone. Times from 1 (noise) to 0 (picture), Euler steps, guidance, and sample.py's noise.
import Foundation

#if canImport(CryptoKit)
    import CryptoKit
#endif

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

    #if canImport(CryptoKit)
        /// The generator's seed that common/seeds.py makes of a seed: so that the phone draws sample.py's picture.
        public static func generator(seed: Int) -> UInt32 {
            SHA256.hash(data: Data("(\(seed),)".utf8)).prefix(4).reversed().reduce(0) { $0 << 8 | UInt32($1) }
        }
    #endif

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
