// Latency.swift: times the packages of build/ inside an app. Add the three .mlpackage folders to an Xcode project with this
// file, run it in Release on the phone, and call `await printLatency()`. `python latency.py build/ --swift` prints it
// with the names of the packages that are there.
import CoreML
import Foundation

func example(of description: MLModelDescription) throws -> MLFeatureProvider {
    var values: [String: MLFeatureValue] = [:]
    for (name, input) in description.inputDescriptionsByName {
        guard let constraint = input.multiArrayConstraint else { continue }
        let array = try MLMultiArray(shape: constraint.shape, dataType: constraint.dataType)
        for i in 0..<array.count { array[i] = constraint.dataType == .int32 ? 1 : NSNumber(value: Double.random(in: 0...1)) }
        values[name] = MLFeatureValue(multiArray: array)
    }
    return try MLDictionaryFeatureProvider(dictionary: values)
}

func median(_ values: [Double]) -> Double { values.sorted()[values.count / 2] }

func printLatency(rounds: Int = 20) async {
    let units: [(String, MLComputeUnits)] = [
        ("neural engine", .cpuAndNeuralEngine), ("GPU", .cpuAndGPU), ("CPU", .cpuOnly),
    ]
    let clock = ContinuousClock()
    func milliseconds(_ duration: Duration) -> Double {
        Double(duration.components.seconds) * 1e3 + Double(duration.components.attoseconds) / 1e15
    }
    for name in ["text_encoder", "unet", "decoder"] {
        guard let url = Bundle.main.url(forResource: name, withExtension: "mlmodelc") else {
            print("\(name): not in the app"); continue
        }
        for (unitName, unit) in units {
            do {
                let configuration = MLModelConfiguration()
                configuration.computeUnits = unit
                var start = clock.now  // the first load compiles for the device
                var model = try await MLModel.load(contentsOf: url, configuration: configuration)
                let first = milliseconds(clock.now - start)
                start = clock.now
                model = try await MLModel.load(contentsOf: url, configuration: configuration)
                let load = milliseconds(clock.now - start)
                let input = try example(of: model.modelDescription)
                _ = try await model.prediction(from: input)  // warm-up
                var times: [Double] = []
                for _ in 0..<rounds {
                    start = clock.now
                    _ = try await model.prediction(from: input)
                    times.append(milliseconds(clock.now - start))
                }
                print("\(name) \(unitName): first load \(first) ms, load \(load) ms, predict \(median(times)) ms")
            } catch {
                print("\(name) \(unitName): \(error)")
            }
        }
    }
}
