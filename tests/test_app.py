"""coreml/app from Python's side: its sources parse, its cases are today's, and every name it reads is one that an export writes.

The Swift side, `swift test` in coreml/app, computes the cases again.
"""

import json
import re
from pathlib import Path

import pytest
import torch
import tree_sitter
import tree_sitter_swift

import export_coreml
from coreml import pipeline as cases
from coreml.pipeline import PARTS

ROOT = Path(__file__).parent.parent
APP = ROOT / "coreml/app"
PIPELINE, TOKENIZER = (APP / f"Sources/SnapGenPipeline/{name}.swift" for name in ("Pipeline", "Tokenizer"))
TESTS = APP / "Tests/SnapGenPipelineTests/CasesTests.swift"
SOURCES = sorted(path for path in (ROOT / "coreml").rglob("*.swift") if ".build" not in path.parts)
SWIFT = tree_sitter.Parser(tree_sitter.Language(tree_sitter_swift.language()))


def parse(source):
    return SWIFT.parse(source).root_node


def nodes(node, *kinds):
    """Every node of these kinds under `node`, in order."""
    for child in node.children:
        if child.type in kinds:
            yield child
        yield from nodes(child, *kinds)


def text(node):
    return node.text.decode()


def literals(node):
    """The strings under `node`, without quotes; what \\(...) stands for is left as it is."""
    return [text(n)[1:-1] for n in nodes(node, "line_string_literal")]


def arguments_of(path, function):
    """The strings among the arguments of every call of `function`."""
    calls = [call for call in nodes(parse(path.read_bytes()), "call_expression")
             if text(call.children[0]).split(".")[-1] == function]  # fmt: skip
    return {name for call in calls for name in literals(call.children[1])}


def decodables(path):
    """{struct that JSON is read into: names of its properties}"""
    found = {}
    for struct in nodes(parse(path.read_bytes()), "class_declaration"):
        if "Decodable" in [text(n) for n in struct.children if n.type == "inheritance_specifier"]:
            own = [p for p in struct.child_by_field_name("body").children if p.type == "property_declaration"]
            names = [text(n) for p in own for n in p.children_by_field_name("name")]
            found[text(struct.child_by_field_name("name"))] = set(names)
    return found


@pytest.fixture(scope="module")
def build(home):
    """What an export leaves, whose only package is one operation: its text encoder and UNet would take a minute."""
    about = {"latent": "x", "picture": "x sigmoid(x)"}
    one = export_coreml.Part(
        torch.nn.SiLU, torch.nn.functional.silu, {"latent": torch.randn(1, 4)}, ("picture",), about, "SiLU"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(export_coreml, "decoder_part", lambda decoder, latent, layout: one)
        folders = ["--model", "assets/zoo/step_distill", "--decoder", "assets/zoo/decoder", "--out", "build"]
        export_coreml.main([*folders, "--parts", "decoder"])
    return home / "build"


# ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_source_parses(path):
    source = path.read_bytes()
    wrong = [f"{n.start_point.row + 1}: {text(n)[:60]}" for n in nodes(parse(source), "ERROR")]
    assert not wrong and not parse(source).has_error


def test_a_broken_source_is_seen():
    source = PIPELINE.read_bytes()
    for right, wrong in ((b"{", b""), (b"guard ", b"guard else "), (b"func ", b"func 1")):
        assert parse(source.replace(right, wrong, 1)).has_error


def test_every_source_of_the_app_is_looked_at():
    names = {path.name for path in SOURCES if APP in path.parents}
    assert names == {"Package.swift", "Tokenizer.swift", "Sampler.swift", "Pipeline.swift", "Picture.swift", "SnapGenApp.swift",
                     "ContentView.swift", "CasesTests.swift"}  # fmt: skip


def same(found, expected):
    """Equal, but for the last digits of floating-point numbers, which differ between machines."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], value) for key, value in expected.items())
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found == (pytest.approx(expected, abs=1e-5) if isinstance(expected, float) else expected)


def test_committed_cases_are_what_python_computes():
    tokenizers = cases.toy_tokenizers()
    today = cases.cases(tokenizers, tokenizers["tokenizer"].model_max_length)
    committed = json.loads(cases.COMMITTED.read_text(encoding="utf-8"))
    for name, value in today.items():
        assert same(committed[name], value), f"{name} has changed: python -m coreml.pipeline, and look at the difference"
    assert committed.keys() == today.keys()
    assert not same([1, [2.0]], [1, [2.1]]) and not same({"a": 1}, {"a": 2})


def test_an_export_leaves_the_cases_of_its_own_tokenizers(build):
    assert same(json.loads((build / "cases.json").read_text()), json.loads(cases.COMMITTED.read_text()))


def test_every_case_is_read_by_a_swift_test():
    committed, structs = json.loads(cases.COMMITTED.read_text(encoding="utf-8")), decodables(TESTS)
    assert structs.pop("Cases") == committed.keys()
    inner = [set(value[0] if isinstance(value, list) else value) for value in committed.values() if value != committed["length"]]
    assert sorted(map(sorted, structs.values())) == sorted(map(sorted, inner))
    tests = [f for f in nodes(parse(TESTS.read_bytes()), "function_declaration")
             if text(f.child_by_field_name("name")).startswith("test")]  # fmt: skip
    code = "\n".join(text(n) for test in tests for n in nodes(test, "navigation_expression", "key_path_expression"))
    whole, parts = (set(re.findall(rf"{start}\.(\w+)", code)) for start in (r"\bcases(?:\(\))?", r"(?:\bone|\\)"))
    assert whole >= committed.keys() and parts >= set().union(*inner)


def test_what_swift_reads_is_what_an_export_writes(build):
    plan, tokenizer = (json.loads((build / name).read_text()) for name in ("pipeline.json", "tokenizer/tokenizer.json"))
    settings = json.loads((build / "tokenizer/tokenizer_config.json").read_text())
    manifest = json.loads((build / "decoder.mlpackage/Manifest.json").read_text())
    pipeline, file = decodables(PIPELINE), decodables(TOKENIZER)
    assert set(pipeline) == {"Plan", "Manifest"} and set(file) == {"File", "Token", "Model", "Settings"}
    written = {"Plan": plan, "Manifest": manifest, "File": tokenizer, "Token": tokenizer["added_tokens"][0],
               "Model": tokenizer["model"], "Settings": settings}  # fmt: skip
    for name, properties in (pipeline | file).items():
        assert properties and properties <= written[name].keys(), f"{name} in Swift"
    assert all(len(pair) == 2 for pair in tokenizer["model"]["merges"])  # Swift reads no older form

    files = arguments_of(PIPELINE, "appendingPathComponent") | arguments_of(TOKENIZER, "appendingPathComponent")
    files -= {"SnapGen", r"\(name)-\(identifier).mlmodelc"}  # its own, on the phone
    assert files == {"pipeline.json", "tokenizer.json", "tokenizer_config.json", "Manifest.json", r"\(name).mlpackage"}
    assert (build / plan["tokenizers"][0] / "tokenizer.json").is_file() and (build / "decoder.mlpackage").is_dir()


def test_packages_inputs_and_outputs_are_called_by_their_names(at_home):
    student = export_coreml.trained_student("assets/zoo/step_distill", "assets/zoo/decoder")
    made = [part for name in PARTS for part in export_coreml.make_parts(student, name, [8], 1, "ane").values()]
    keys = {name[1:-1] for d in nodes(parse(PIPELINE.read_bytes()), "dictionary_literal")
            for name in map(text, d.children_by_field_name("key"))}  # fmt: skip
    assert arguments_of(PIPELINE, "load") - {"main"} == set(PARTS)
    assert keys == {name for part in made for name in part.inputs}
    assert arguments_of(PIPELINE, "array") == {name for part in made for name in part.outputs}
