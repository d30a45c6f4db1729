#if canImport(SwiftUI)
    import SnapGenPipeline
    import SwiftUI

    /// What is on the screen, and the one drawing that is under way. The networks live in Pipeline, off the main actor.
    @MainActor @Observable final class Studio {
        var prompt = Studio.examples[0]
        var seed = 0
        var steps = 4
        var previews = true
        private(set) var pipeline: Pipeline?
        private(set) var progress: Drawing?
        private(set) var wanted = (prompt: "", steps: 0)  // of the drawing under way, or of the last one
        private(set) var drawing = false
        private(set) var status = "Loading the networks. The first time takes longest."
        private(set) var failed = false
        private var task: Task<Void, Never>?

        static let examples = [
            "a photo of a red circle left of a blue star", "a photo of two green squares", "a photo of a yellow triangle",
            "a photo of a black square above a red star",
        ]

        /// The exported folder: inside the app, or named behind `swift run SnapGen`.
        private static var folder: URL? {
            let named = CommandLine.arguments.dropFirst().map { URL(fileURLWithPath: $0) }
            let inside = [Bundle.main.resourceURL].compactMap { $0?.appendingPathComponent("build") }
            return (named + inside).first {
                FileManager.default.fileExists(atPath: $0.appendingPathComponent("pipeline.json").path)
            }
        }

        func load() async {
            guard pipeline == nil else { return }
            do {
                guard let folder = Self.folder else {
                    throw Problem("There is no build folder in this app: README.md of coreml/app tells how it gets there.")
                }
                let start = ContinuousClock.now
                let loaded = try await Pipeline(folder: folder)
                steps = loaded.plan.steps
                pipeline = loaded
                status = "Loaded in \(((ContinuousClock.now - start) / .milliseconds(1)).formatted(.number.precision(.fractionLength(0)))) ms."
            } catch {
                show(error)
            }
        }

        /// Starts a drawing. One that is under way is cancelled, and has ended before the next begins.
        func draw() {
            guard let pipeline else { return }
            let before = task
            before?.cancel()
            let (prompt, seed, steps, previews) = (prompt, seed, steps, previews)
            task = Task {
                await before?.value
                guard !Task.isCancelled else { return }
                (progress, wanted, drawing, failed, status) = (nil, (prompt, steps), true, false, "Reading the prompt")
                do {
                    try await pipeline.draw(prompt, seed: seed, steps: steps, previews: previews) { [self] progress in
                        self.progress = progress
                        status = "Step \(progress.steps.count) of \(steps)"
                    }
                    status = "Done: \(prompt.isEmpty ? "the empty prompt" : prompt), seed \(seed)"
                } catch is CancellationError {
                    status = "Stopped"
                } catch {
                    show(error)
                }
                drawing = false
            }
        }

        func stop() { task?.cancel() }

        private func show(_ error: Error) { (failed, status) = (true, error.localizedDescription) }
    }

    struct ContentView: View {
        @State private var studio = Studio()

        var body: some View {
            ScrollView {
                VStack(alignment: .leading, spacing: 16) {
                    Text("SnapGen").font(.largeTitle.bold()).accessibilityAddTraits(.isHeader)
                    picture
                    Text(studio.status).font(.callout).foregroundStyle(studio.failed ? Color.red : Color.secondary)
                    TextField("What to draw", text: $studio.prompt, axis: .vertical)
                        .textFieldStyle(.roundedBorder).onSubmit(studio.draw)
                    chips
                    Stepper("Seed \(studio.seed)", value: $studio.seed, in: 0...9999)
                    Stepper("Steps \(studio.steps)", value: $studio.steps, in: 1...28)
                    Toggle("Show every step", isOn: $studio.previews)
                    buttons
                    if let progress = studio.progress { times(progress) }
                }
                .padding().frame(maxWidth: 560).frame(maxWidth: .infinity)
            }
            .task { await studio.load() }
        }

        private var picture: some View {
            ZStack {
                RoundedRectangle(cornerRadius: 16).fill(.quaternary)
                if let image = studio.progress?.picture?.cgImage {
                    Image(image, scale: 1, label: Text("Picture of \(studio.wanted.prompt)"))
                        .resizable().interpolation(.none).clipShape(RoundedRectangle(cornerRadius: 16))
                } else if studio.drawing || (studio.pipeline == nil && !studio.failed) {
                    ProgressView()
                }
            }
            .aspectRatio(1, contentMode: .fit)
        }

        private var chips: some View {
            ScrollView(.horizontal, showsIndicators: false) {
                HStack {
                    ForEach(Studio.examples, id: \.self) { example in
                        Button(example.replacingOccurrences(of: "a photo of ", with: "")) {
                            studio.prompt = example
                            studio.draw()
                        }
                        .buttonStyle(.bordered).buttonBorderShape(.capsule).accessibilityHint("Draws this example")
                    }
                }
            }
            .disabled(studio.pipeline == nil)
        }

        private var buttons: some View {
            HStack {
                Button(action: studio.draw) { Text("Draw").frame(maxWidth: .infinity) }
                    .buttonStyle(.borderedProminent).disabled(studio.pipeline == nil)
                Button("Stop", role: .cancel, action: studio.stop).buttonStyle(.bordered).disabled(!studio.drawing)
            }
            .controlSize(.large)
        }

        private func times(_ progress: Drawing) -> some View {
            VStack(alignment: .leading, spacing: 6) {
                ProgressView(value: Double(progress.steps.count), total: Double(max(studio.wanted.steps, 1)))
                row("Text encoder", progress.text)
                ForEach(Array(progress.steps.enumerated()), id: \.offset) { row("Step \($0.offset + 1)", $0.element) }
                if progress.picture != nil { row("Decoder, the last time", progress.decoder) }
                row(studio.previews ? "All, pictures on the way too" : "All", progress.whole).bold()
            }
            .monospacedDigit()
        }

        private func row(_ name: String, _ milliseconds: Double) -> some View {
            HStack {
                Text(name)
                Spacer()
                Text("\(milliseconds.formatted(.number.precision(.fractionLength(1)))) ms")
            }
            .accessibilityElement(children: .combine)
        }
    }
#endif
