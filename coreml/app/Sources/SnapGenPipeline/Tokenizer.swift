// Tokenizer.swift: CLIP's byte-pair encoding, read from tokenizer.json and tokenizer_config.json, as transformers computes it:
//
//   1. added tokens, such as <|endoftext|>, are cut out of the text; "!" is one where it is the padding
//   2. the rest is brought to Unicode's composed form (NFC), then to lower case, scalar by scalar
//   3. words: a run of letters; one digit; an English ending such as 's; a run of anything else that is no white space
//   4. a word's UTF-8 bytes, each written as one visible character, </w> behind the last; then the two neighbours that
//      come first in the list of merges become one, until no two are in the list
//   5. start, as many tokens as fit, end, padding
//
// huggingface/swift-transformers has no CLIPTokenizer, and its byte-pair encoding no </w>; hence this file.
import Foundation

public struct Tokenizer: Sendable {
    private let ids: [String: Int]
    private let ranks: [Pair: Int]
    private let raw, normalized: [Added]  // added tokens to look for before and after step 2
    private let start, end, padding, unknown: Int

    private struct Pair: Hashable { let left, right: String }
    private typealias Added = (text: [Unicode.Scalar], id: Int)
    private struct File: Decodable {  // named as in tokenizer.json
        struct Token: Decodable { let id: Int, content: String, normalized, single_word, lstrip, rstrip: Bool }
        struct Model: Decodable { let vocab: [String: Int], merges: [[String]] }
        let added_tokens: [Token], model: Model
    }
    private struct Settings: Decodable { let bos_token, eos_token, pad_token, unk_token: String }  // tokenizer_config.json

    /// Reads a folder with tokenizer.json and tokenizer_config.json. Throws a Problem when they cannot be read.
    public init(folder: URL) throws {
        let file = try read(File.self, from: folder.appendingPathComponent("tokenizer.json"))
        let settings = try read(Settings.self, from: folder.appendingPathComponent("tokenizer_config.json"))
        var ids = file.model.vocab
        for token in file.added_tokens {
            guard !token.single_word, !token.lstrip, !token.rstrip else {
                throw Problem("The tokenizer in \(folder.path) is not CLIP's: its \(token.content) takes the space around it.")
            }
            ids[token.content] = token.id
        }
        func id(_ token: String) throws -> Int {
            guard let id = ids[token] else { throw Problem("The tokenizer in \(folder.path) has no token \(token).") }
            return id
        }
        (start, end) = (try id(settings.bos_token), try id(settings.eos_token))
        (padding, unknown) = (try id(settings.pad_token), try id(settings.unk_token))
        self.ids = ids
        let pairs = file.model.merges.enumerated().map { (Pair(left: $1[0], right: $1[1]), $0) }
        ranks = Dictionary(pairs, uniquingKeysWith: min)
        let added = file.added_tokens.sorted { $0.content.utf8.count > $1.content.utf8.count }  // the longest wins
        raw = added.filter { !$0.normalized }.map { (Array($0.content.unicodeScalars), $0.id) }
        normalized = added.filter(\.normalized).map { (Array(Self.normalize($0.content).unicodeScalars), $0.id) }
    }

    /// Exactly `length` tokens: start, text, end, padding. What does not fit is cut.
    public func padded(_ text: String, length: Int) -> [Int32] {
        let tokens = [start] + encode(text).prefix(length - 2) + [end]
        return (tokens + Array(repeating: padding, count: length - tokens.count)).map(Int32.init)
    }

    /// All tokens of a text, without start and end.
    public func encode(_ text: String) -> [Int] {
        cut(Array(text.unicodeScalars), at: raw) { part in
            cut(Array(Self.normalize(String(String.UnicodeScalarView(part))).unicodeScalars), at: normalized) { part in
                Self.words(Array(part)).flatMap(merge)
            }
        }
    }

    private func cut(_ text: [Unicode.Scalar], at added: [Added], rest: (ArraySlice<Unicode.Scalar>) -> [Int]) -> [Int] {
        var tokens: [Int] = [], done = 0, i = 0
        while i < text.count {
            if let found = added.first(where: { text[i...].starts(with: $0.text) }) {
                tokens += rest(text[done..<i]) + [found.id]
                i += found.text.count
                done = i
            } else {
                i += 1
            }
        }
        return tokens + rest(text[done...])
    }

    private static func normalize(_ text: String) -> String {
        text.precomposedStringWithCanonicalMapping.unicodeScalars.map(\.properties.lowercaseMapping).joined()
    }

    private enum Kind { case space, letter, digit, other }

    private static func kind(_ scalar: Unicode.Scalar) -> Kind {
        if scalar.properties.isWhitespace { return .space }
        switch scalar.properties.generalCategory {
        case .uppercaseLetter, .lowercaseLetter, .titlecaseLetter, .modifierLetter, .otherLetter: return .letter
        case .decimalNumber, .letterNumber, .otherNumber: return .digit
        default: return .other
        }
    }

    private static let endings = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d"].map { Array($0.unicodeScalars) }
    private static let specials = ["<|startoftext|>", "<|endoftext|>"].map { Array($0.unicodeScalars) }

    /// Step 3. A special token that step 2 made by lower case is no token, but three words of its own.
    private static func words(_ text: [Unicode.Scalar], specials: [[Unicode.Scalar]] = specials) -> [String] {
        var words: [String] = [], i = 0
        while i < text.count {
            let first = kind(text[i])
            var next = i + 1
            if let special = specials.first(where: { text[i...].starts(with: $0) }) {
                words += Self.words(special, specials: [])
                i += special.count
                continue
            } else if let ending = endings.first(where: { text[i...].starts(with: $0) }) {
                next = i + ending.count
            } else if first == .letter || first == .other {
                while next < text.count, kind(text[next]) == first { next += 1 }
            }
            if first != .space { words.append(String(String.UnicodeScalarView(text[i..<next]))) }
            i = next
        }
        return words
    }

    /// GPT-2's visible characters of the 256 bytes: themselves where they can be seen, the next free ones from 256 on elsewhere.
    private static let visible: [String] = {
        var free: UInt32 = 255
        return (0...255 as ClosedRange<UInt32>).map { byte in
            let seen = (33...126).contains(byte) || (161...172).contains(byte) || (174...255).contains(byte)
            if !seen { free += 1 }
            return String(Unicode.Scalar(seen ? byte : free)!)
        }
    }()

    /// Step 4.
    private func merge(_ word: String) -> [Int] {
        var parts = word.utf8.map { Self.visible[Int($0)] }
        parts[parts.count - 1] += "</w>"
        func rank(_ i: Int) -> Int { ranks[Pair(left: parts[i], right: parts[i + 1])] ?? .max }
        var waiting = (0..<parts.count - 1).map(rank)  // of part i and the one behind it
        while let lowest = waiting.min(), lowest < .max, let i = waiting.firstIndex(of: lowest) {
            parts[i] += parts.remove(at: i + 1)
            waiting.remove(at: i)
            if i > 0 { waiting[i - 1] = rank(i - 1) }
            if i < waiting.count { waiting[i] = rank(i) }
        }
        return parts.map { ids[$0] ?? unknown }
    }
}
