// Picture.swift: from the decoder's numbers to a picture, and what can go wrong, in words.
import Foundation

#if canImport(CoreGraphics)
    import CoreGraphics
#endif

/// Red, green, blue and an unused byte for every pixel, row by row.
public struct Picture: Sendable {
    public let width, height: Int
    public let bytes: [UInt8]

    /// `values`: all red, then all green, then all blue, 0 to 255; beyond is cut, halves go to the even number as in PyTorch.
    public init(values: [Float], width: Int, height: Int) throws {
        let pixels = width * height
        guard values.count == 3 * pixels else {
            throw Problem("The decoder gave \(values.count) numbers for \(width) x \(height) pixels. Export its package again.")
        }
        guard values.allSatisfy({ !$0.isNaN }) else {
            throw Problem("The picture holds numbers that are none (NaN): something overflowed in half precision.")
        }
        var bytes = [UInt8](repeating: 255, count: 4 * pixels)
        for channel in 0..<3 {
            for i in 0..<pixels {
                let value = values[channel * pixels + i].rounded(.toNearestOrEven)
                bytes[4 * i + channel] = UInt8(min(max(value, 0), 255))
            }
        }
        (self.width, self.height, self.bytes) = (width, height, bytes)
    }

    #if canImport(CoreGraphics)
        public var cgImage: CGImage? {
            guard let provider = CGDataProvider(data: Data(bytes) as CFData) else { return nil }
            return CGImage(
                width: width, height: height, bitsPerComponent: 8, bitsPerPixel: 32, bytesPerRow: 4 * width,
                space: CGColorSpaceCreateDeviceRGB(), bitmapInfo: CGBitmapInfo(rawValue: CGImageAlphaInfo.noneSkipLast.rawValue),
                provider: provider, decode: nil, shouldInterpolate: false, intent: .defaultIntent)
        }
    #endif
}

/// What went wrong, as one sentence for the screen.
public struct Problem: LocalizedError, Sendable {
    public let errorDescription: String?
    public init(_ sentence: String) { errorDescription = sentence }
}

/// A JSON file as a `type`. Throws a Problem that names the file.
func read<T: Decodable>(_ type: T.Type, from file: URL) throws -> T {
    guard let data = try? Data(contentsOf: file) else {
        throw Problem("There is no \(file.lastPathComponent) in \(file.deletingLastPathComponent().path).")
    }
    do {
        return try JSONDecoder().decode(type, from: data)
    } catch DecodingError.keyNotFound(let key, _) {
        throw Problem("\(file.lastPathComponent) has no \(key.stringValue): export a trained student, with all three parts.")
    } catch {
        throw Problem("\(file.lastPathComponent) cannot be read: \(error)")
    }
}
