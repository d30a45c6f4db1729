// swift-tools-version: 6.0
import PackageDescription

let package = Package(
    name: "SnapGen",
    platforms: [.iOS(.v18), .macOS(.v15)],  // what export_coreml.py's packages ask for, without --target iOS17
    products: [.library(name: "SnapGenPipeline", targets: ["SnapGenPipeline"])],
    targets: [
        .target(name: "SnapGenPipeline"),
        .executableTarget(name: "SnapGen", dependencies: ["SnapGenPipeline"], path: "App"),
        .testTarget(
            name: "SnapGenPipelineTests", dependencies: ["SnapGenPipeline"], resources: [.copy("Resources/cases.json")]),
    ],
    swiftLanguageModes: [.v5]  // MLModel and its arrays are not Sendable in every SDK
)
