// CasesTests.swift: what export_coreml.py's Python computes, computed again in Swift. See ../../README.md.
import XCTest

@testable import SnapGenPipeline

/// Resources/cases.json of coreml/pipeline.py, named as in the file; or build/cases.json where SNAPGEN_BUILD names an exported folder.
struct Cases: Decodable {
    struct Tokens: Decodable { let tokenizer, text: String, ids: [Int], padded: [Int32] }
    struct Times: Decodable { let steps: Int, shift: Float, times: [Float] }
    struct Noise: Decodable { let seed: Int, generator: UInt32, count: Int, first, last: [Float] }
    struct Euler: Decodable { let guidance: Float, times, noise: [Float], velocities, latents: [[Float]] }
    struct Pixels: Decodable { let height, width: Int, values: [Float], rgb: [UInt8] }
    let length: Int, tokens: [Tokens], times: [Times], noise: [Noise], euler: [Euler], picture: Pixels
}

final class CasesTests: XCTestCase {
    static let build = ProcessInfo.processInfo.environment["SNAPGEN_BUILD"].map { URL(fileURLWithPath: $0) }

    func cases() throws -> Cases {
        let committed = Bundle.module.url(forResource: "cases", withExtension: "json")
        let file = try XCTUnwrap(Self.build?.appendingPathComponent("cases.json") ?? committed)
        return try JSONDecoder().decode(Cases.self, from: Data(contentsOf: file))
    }

    func tokenizer(_ name: String) throws -> Tokenizer {
        var root = URL(fileURLWithPath: #filePath)  // ROOT/coreml/app/Tests/SnapGenPipelineTests/CasesTests.swift
        for _ in 0..<5 { root.deleteLastPathComponent() }
        let folder = Self.build ?? root.appendingPathComponent("assets/toy-sd3")
        return try Tokenizer(folder: folder.appendingPathComponent(name))
    }

    func assertClose(_ found: [Float], _ expected: [Float], within tolerance: Float, line: UInt = #line) {
        XCTAssertEqual(found.count, expected.count, line: line)
        for (a, b) in zip(found, expected) { XCTAssertEqual(a, b, accuracy: tolerance, line: line) }
    }

    func testTokensAreThoseOfTransformers() throws {
        let cases = try cases()
        for (name, group) in Dictionary(grouping: cases.tokens, by: \.tokenizer) {
            let tokenizer = try tokenizer(name)
            for one in group {
                XCTAssertEqual(tokenizer.encode(one.text), Array(one.ids.dropFirst().dropLast()), "\(name): \(one.text)")
                XCTAssertEqual(tokenizer.padded(one.text, length: cases.length), one.padded, "\(name): \(one.text)")
            }
        }
        XCTAssertGreaterThan(cases.tokens.count, 20)
    }

    func testTimesAreThoseOfFlow() throws {
        for one in try cases().times {
            assertClose(Sampler.times(steps: one.steps, shift: one.shift), one.times, within: 1e-6)
        }
    }

    func testNoiseIsTorchs() throws {
        for one in try cases().noise {
            let noise = Sampler.noise(count: one.count, generator: one.generator)
            assertClose(Array(noise.prefix(16)), one.first, within: 1e-5)
            assertClose(Array(noise.suffix(16)), one.last, within: 1e-5)
        }
    }

    func testGeneratorOfASeedIsThatOfSeeds() throws {
        for one in try cases().noise { XCTAssertEqual(Sampler.generator(seed: one.seed), one.generator) }
        XCTAssertEqual(firstWordOfSHA256(Array("abc".utf8)), 0xba78_16bf)  // FIPS 180-4's own example
    }

    func testEulerStepsAreThoseOfFlow() throws {
        for one in try cases().euler {
            var x = one.noise
            for (i, velocities) in one.velocities.enumerated() {
                let v = one.guidance == 1 ? velocities : Sampler.guide(velocities, scale: one.guidance)
                x = Sampler.euler(x, v, from: one.times[i], to: one.times[i + 1])
                assertClose(x, one.latents[i], within: 1e-5)
            }
            XCTAssertEqual(one.velocities.count, one.latents.count)
        }
    }

    func testBytesOfAPicture() throws {
        let one = try cases().picture
        let picture = try Picture(values: one.values, width: one.width, height: one.height)
        XCTAssertEqual(picture.bytes.enumerated().filter { $0.offset % 4 != 3 }.map(\.element), one.rgb)
    }

    func testWhatCannotBeAPictureIsToldInASentence() {
        XCTAssertThrowsError(try Picture(values: [1, 2, .nan], width: 1, height: 1)) {
            XCTAssertTrue($0.localizedDescription.contains("half precision"), $0.localizedDescription)
        }
        XCTAssertThrowsError(try Picture(values: [1, 2], width: 1, height: 1))
    }

    func testAMissingOrForeignFileIsNamed() throws {
        let folder = FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString)
        try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
        defer { try? FileManager.default.removeItem(at: folder) }
        XCTAssertThrowsError(try Plan(folder: folder)) {
            XCTAssertTrue($0.localizedDescription.contains("There is no pipeline.json"), $0.localizedDescription)
        }
        try Data(#"{"weights": "random"}"#.utf8).write(to: folder.appendingPathComponent("pipeline.json"))
        XCTAssertThrowsError(try Plan(folder: folder)) {
            XCTAssertTrue($0.localizedDescription.contains("trained student"), $0.localizedDescription)
        }
    }
}
