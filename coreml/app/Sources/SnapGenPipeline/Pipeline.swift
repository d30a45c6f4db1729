// Pipeline.swift: build/ as something that draws: text -> tokens -> states -> Euler steps -> picture, as coreml/pipeline.py does.
import Foundation

/// pipeline.json, named as in the file: all that an app needs to know beside the packages.
public struct Plan: Decodable, Sendable {
    public let steps: Int, times: [Float], shift, guidance: Float
    public let tokens: Int, tokenizers: [String]
    public let latent_channels: Int, latent_sizes: [Int], functions: [String: String]

    public init(folder: URL) throws {
        self = try read(Plan.self, from: folder.appendingPathComponent("pipeline.json"))
        guard tokenizers.count == 2, !latent_sizes.isEmpty else {
            throw Problem("pipeline.json has no tokenizers: export a student that reads its captions with CLIP.")
        }
    }

    /// The student's own times; other numbers of steps are spread as sample.py --steps does.
    public func times(steps: Int) -> [Float] { steps == self.steps ? times : Sampler.times(steps: steps, shift: shift) }
}

/// What is known after a step. Milliseconds are those of Core ML's predictions alone; `whole` is all that passed until now.
public struct Drawing: Sendable {
    public internal(set) var text = 0.0, steps: [Double] = [], decoder = 0.0, whole = 0.0
    public internal(set) var picture: Picture?
}

#if canImport(CoreML)
    import CoreML

    public actor Pipeline {
        public nonisolated let plan: Plan
        private let tokenizers: [Tokenizer]
        private let textEncoder, unet, decoder: MLModel

        /// Reads and compiles what export_coreml.py wrote to `folder`. The first time takes long: Core ML prepares the networks.
        public init(folder: URL, units: MLComputeUnits = .all) async throws {
            plan = try Plan(folder: folder)
            tokenizers = try plan.tokenizers.map { try Tokenizer(folder: folder.appendingPathComponent($0)) }
            let function = plan.functions[String(plan.latent_sizes[0])] ?? "main"
            textEncoder = try await Self.load("text_encoder", in: folder, function: "main", units: units)
            unet = try await Self.load("unet", in: folder, function: function, units: units)
            decoder = try await Self.load("decoder", in: folder, function: function, units: units)
        }

        private static func load(_ name: String, in folder: URL, function: String, units: MLComputeUnits) async throws -> MLModel {
            let configuration = MLModelConfiguration()
            configuration.computeUnits = units
            if function != "main" { configuration.functionName = function }  // one of several latent sizes
            let package = folder.appendingPathComponent("\(name).mlpackage")
            return try await MLModel.load(contentsOf: compiled(package, name), configuration: configuration)
        }

        /// The package as Core ML runs it, kept for the next start; every export has a new identifier.
        private static func compiled(_ package: URL, _ name: String) async throws -> URL {
            struct Manifest: Decodable { let rootModelIdentifier: String }
            let identifier = try read(Manifest.self, from: package.appendingPathComponent("Manifest.json")).rootModelIdentifier
            let folder = URL.cachesDirectory.appendingPathComponent("SnapGen")
            let kept = folder.appendingPathComponent("\(name)-\(identifier).mlmodelc")
            if !FileManager.default.fileExists(atPath: kept.path) {
                try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
                try await FileManager.default.moveItem(at: MLModel.compileModel(at: package), to: kept)
            }
            return kept
        }

        /// Draws a prompt; `onStep` hears of every step. With `previews` each step's x_0 is decoded too, otherwise only the last.
        /// Throws a Problem, Core ML's own error, or CancellationError between two steps of a cancelled task.
        public func draw(
            _ prompt: String, seed: Int, steps: Int, previews: Bool = true, onStep: @MainActor @Sendable (Drawing) -> Void
        ) async throws {
            let start = ContinuousClock.now, side = plan.latent_sizes[0], guided = plan.guidance != 1
            var progress = Drawing()
            var (text, mask, milliseconds) = try await states(of: prompt)
            if guided {
                let empty = try await states(of: "")
                text = MLMultiArray(concatenating: [text, empty.text], axis: 0, dataType: text.dataType)
                mask = MLMultiArray(concatenating: [mask, empty.mask], axis: 0, dataType: mask.dataType)
                milliseconds += empty.milliseconds
            }
            progress.text = milliseconds

            let times = plan.times(steps: steps), batch = guided ? 2 : 1, shape = [1, plan.latent_channels, side, side]
            var x = Sampler.noise(count: shape.reduce(1, *), generator: Sampler.generator(seed: seed))
            for (t, s) in zip(times, times.dropFirst()) {
                try Task.checkCancellation()
                let inputs = [
                    "latent": floats(guided ? x + x : x, [batch] + shape.dropFirst()),
                    "t": floats(Array(repeating: t, count: batch), [batch]), "text": text, "mask": mask,
                ]
                let (output, milliseconds) = try await predict(unet, inputs)
                var v = MLShapedArray<Float>(converting: try array("velocity", in: output)).scalars
                if guided { v = Sampler.guide(v, scale: plan.guidance) }
                let clean = Sampler.euler(x, v, from: t, to: 0)
                x = Sampler.euler(x, v, from: t, to: s)
                progress.steps.append(milliseconds)
                if previews || s == 0 {
                    try Task.checkCancellation()
                    let (output, milliseconds) = try await predict(decoder, ["latent": floats(s == 0 ? x : clean, shape)])
                    let pixels = try array("picture", in: output)
                    let values = MLShapedArray<Float>(converting: pixels).scalars
                    progress.picture = try Picture(values: values, width: pixels.shape[3].intValue, height: pixels.shape[2].intValue)
                    progress.decoder = milliseconds
                }
                progress.whole = Self.milliseconds(since: start)
                await onStep(progress)
            }
        }

        private func states(of caption: String) async throws -> (text: MLMultiArray, mask: MLMultiArray, milliseconds: Double) {
            let tokens = tokenizers.map { tokenizer in
                MLMultiArray(MLShapedArray<Int32>(scalars: tokenizer.padded(caption, length: plan.tokens), shape: [1, plan.tokens]))
            }
            let (output, milliseconds) = try await predict(textEncoder, ["tokens": tokens[0], "tokens_2": tokens[1]])
            return (try array("text", in: output), try array("mask", in: output), milliseconds)
        }

        private func predict(_ model: MLModel, _ inputs: [String: MLMultiArray]) async throws -> (MLFeatureProvider, Double) {
            let features = try MLDictionaryFeatureProvider(dictionary: inputs.mapValues { MLFeatureValue(multiArray: $0) })
            let start = ContinuousClock.now
            let output = try await model.prediction(from: features)
            return (output, Self.milliseconds(since: start))
        }

        private func array(_ name: String, in output: MLFeatureProvider) throws -> MLMultiArray {
            guard let array = output.featureValue(for: name)?.multiArrayValue else {
                throw Problem("A package gives no \(name): export all three parts again, with one version of the code.")
            }
            return array
        }

        private func floats(_ values: [Float], _ shape: [Int]) -> MLMultiArray {
            MLMultiArray(MLShapedArray<Float>(scalars: values, shape: shape))
        }

        private static func milliseconds(since start: ContinuousClock.Instant) -> Double {
            (ContinuousClock.now - start) / .milliseconds(1)
        }
    }
#endif
