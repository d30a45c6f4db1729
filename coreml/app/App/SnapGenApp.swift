#if canImport(SwiftUI)
    import SwiftUI

    @main
    struct SnapGenApp: App {
        init() {
            #if os(macOS)  // started by `swift run`, it is a window without an app around it
                NSApplication.shared.setActivationPolicy(.regular)
            #endif
        }

        var body: some Scene {
            WindowGroup { ContentView() }
        }
    }
#else
    @main
    struct SnapGenApp {
        static func main() { print("The app needs SwiftUI and Core ML: a Mac, or an iPhone.") }
    }
#endif
