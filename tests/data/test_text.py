from __future__ import annotations

import json

import pytest

from volvelle.data.templates import Template, TemplateProblem, readable
from volvelle.data.text import read_corpus
from volvelle.errors import UsageError, VolvelleError


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(tmp_path, *records):
    return write(tmp_path, "data.jsonl", "".join(json.dumps(r) + "\n" for r in records))


def test_plain_text_is_one_document_byte_for_byte(tmp_path):
    text = "First.\n\nSecond line, ünïcode.\n"
    corpus = read_corpus(write(tmp_path, "a.txt", text))
    assert corpus.documents == [text]
    assert not corpus.examples


def test_byte_order_mark_and_windows_line_ends_are_no_content(tmp_path):
    corpus = read_corpus(write(tmp_path, "a.txt", b"\xef\xbb\xbfone\r\ntwo\r\n"))
    assert corpus.documents == ["one\ntwo\n"]


def test_pair_lines(tmp_path):
    corpus = read_corpus(write(tmp_path, "a.txt", "name : A || A is a pub .\n\nname : B||B is cheap .\n"))
    assert [(e.prompt, e.completions) for e in corpus.examples] == [
        ("name : A\n", ("A is a pub .",)),
        ("name : B\n", ("B is cheap .",)),
    ]
    assert corpus.examples[1].source.endswith("a.txt:3")


def test_pair_lines_through_templates(tmp_path):
    path = write(tmp_path, "a.txt", "x || y\n")
    (example,) = read_corpus(path, prompt="Q: {{ prompt }} A:", completion=" {{ completion }}!").examples
    assert (example.prompt, example.completions) == ("Q: x A:", (" y!",))


def test_known_record_shapes(tmp_path):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    corpus = read_corpus(
        lines(tmp_path, {"prompt": "a", "completion": "b"}, {"completion": ["c", "d"]}, {"messages": messages})
    )
    one, two, three = corpus.examples
    assert (one.prompt, one.completions) == ("a", ("b",))
    assert (two.prompt, two.completions) == ("", ("c", "d"))
    assert three.messages == tuple(messages)
    assert three.completions == ("hello",)
    assert read_corpus(lines(tmp_path, {"text": "one"}, {"text": "two"})).documents == ["one", "two"]


def test_templates_render_nested_lists_and_alternatives(tmp_path):
    record = {"triples": [["Aarhus", "country", "Denmark"], ["Aarhus", "leader", "J B"]], "references": ["x.", "y."]}
    (example,) = read_corpus(lines(tmp_path, record), prompt="{{ triples }} ->", completion="{{ references }}").examples
    assert example.prompt == "Aarhus | country | Denmark ; Aarhus | leader | J B ->"
    assert example.completions == ("x.", "y.")
    (joined,) = read_corpus(lines(tmp_path, record), prompt="", completion=" {{ references }} .").examples
    assert joined.completions == (" x. ; y. .",)
    (first,) = read_corpus(lines(tmp_path, record), completion="{{ references[0] }}").examples
    assert first.completions == ("x.",)


@pytest.mark.parametrize(
    ("value", "text"),
    [(["a", 1], "a ; 1"), ([["a", None]], "a | null"), ({"k": 1}, '{"k": 1}'), (3, 3), (True, "true")],
)
def test_readable(value, text):
    assert readable(value) == text


def test_missing_field_names_it_and_lists_those_there_are(tmp_path):
    path = lines(tmp_path, {"triples": [], "references": ["x"]})
    with pytest.raises(VolvelleError, match=r"data\.jsonl:1: .*'triple' is undefined.*has: triples, references"):
        read_corpus(path, prompt="{{ triple }}", completion="{{ references }}")
    with pytest.raises(VolvelleError, match=r"'ref' is undefined"):
        read_corpus(path, prompt="x", completion="{{ ref }}")


def test_field_names_that_are_no_identifiers(tmp_path):
    (example,) = read_corpus(lines(tmp_path, {"my field": "v"}), completion='{{ record["my field"] }}').examples
    assert example.completions == ("v",)


def test_templates_are_sandboxed():
    for attack in ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ record.__class__.__init__.__globals__ }}"):
        with pytest.raises(TemplateProblem):
            print(Template(attack, option="prompt").text({"a": 1}))
    record = {"items_": [1]}
    with pytest.raises(TemplateProblem):
        Template("{{ items_.append(2) }}", option="prompt").text(record)
    assert record == {"items_": [1]}


def test_broken_template_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match=r"completion=\{\{ x: not a Jinja template"):
        read_corpus(lines(tmp_path, {"x": 1}), completion="{{ x")
    with pytest.raises(UsageError, match="prompt= needs completion="):
        read_corpus(lines(tmp_path, {"x": 1}), prompt="{{ x }}")


BAD = [
    ('{"prompt": "a", "completion": "b"', "not JSON"),
    ("[1, 2]", "not a JSON object but a list"),
    ('{"question": "a", "answer": "b"}', "fields are question, answer"),
    ('{"prompt": "a", "completion": " "}', "the completion is empty"),
    ('{"prompt": 3, "completion": "b"}', "must be text"),
    ('{"messages": []}', "not empty"),
    ('{"messages": [{"role": "user", "content": "x"}]}', "last message must be the assistant's, it is the user's"),
    ('{"messages": [{"role": "user"}]}', "message 1 needs a role and a content"),
]


@pytest.mark.parametrize(("line", "reason"), BAD)
def test_bad_line_is_named_and_stops(tmp_path, line, reason):
    good = json.dumps({"prompt": "a", "completion": "b"})
    path = write(tmp_path, "data.jsonl", f"{good}\n\n{line}\n{good}\n")
    with pytest.raises(VolvelleError, match=r"data\.jsonl:3: ") as error:
        read_corpus(path)
    assert reason in str(error.value)
    assert "on_bad=skip" in (error.value.tip or "")
    corpus = read_corpus(path, on_bad="skip")
    assert len(corpus.examples) == 2
    assert len(corpus.skipped) == 1
    assert reason in corpus.skipped[0]


def test_many_bad_lines_are_counted(tmp_path):
    path = write(tmp_path, "data.jsonl", '{"prompt": "a", "completion": "b"}\n' + "{\n" * 9)
    with pytest.raises(VolvelleError, match=r"9 bad lines") as error:
        read_corpus(path)
    assert ":2:" in str(error.value)
    assert "and 4 more" in str(error.value)


def test_only_bad_lines_are_an_error_even_when_skipping(tmp_path):
    with pytest.raises(VolvelleError, match="not JSON") as error:
        read_corpus(write(tmp_path, "data.jsonl", "{\n"), on_bad="skip")
    assert error.value.tip == "no good line is left"


@pytest.mark.parametrize("content", ["", "\n \n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["data.jsonl", "data.txt"])
def test_empty_file(tmp_path, name, content):
    with pytest.raises(VolvelleError, match=f"{name}: the file is empty"):
        read_corpus(write(tmp_path, name, content))


def test_missing_file_suggests_its_neighbour(tmp_path):
    write(tmp_path, "train.jsonl", "{}")
    with pytest.raises(UsageError, match="no such file") as error:
        read_corpus(tmp_path / "trian.jsonl")
    assert error.value.tip == "did you mean train.jsonl?"
    with pytest.raises(UsageError, match="a folder"):
        read_corpus(tmp_path)
    with pytest.raises(UsageError, match=r"unknown kind of text file '\.csv'"):
        read_corpus(write(tmp_path, "a.csv", "x"))


@pytest.mark.parametrize("name", ["data.jsonl", "data.txt"])
def test_wrong_encoding_is_named_with_its_line(tmp_path, name):
    first = '{"prompt": "a", "completion": "b"}\n' if name.endswith("jsonl") else "a || b\n"
    second = '{"prompt": "caf\u00e9", "completion": "b"}\n' if name.endswith("jsonl") else "caf\u00e9 || b\n"
    path = write(tmp_path, name, first.encode() + second.encode("latin-1"))
    with pytest.raises(VolvelleError, match=rf"{name}:2: not UTF-8 \(byte 0xe9"):
        read_corpus(path)
    assert len(read_corpus(path, on_bad="skip").examples) == 1
    with pytest.raises(VolvelleError, match="UTF-16"):
        read_corpus(write(tmp_path, name, first.encode("utf-16")))


def test_plain_text_in_another_encoding_is_not_read_in_part(tmp_path):
    with pytest.raises(VolvelleError, match="not UTF-8"):
        read_corpus(write(tmp_path, "a.txt", "first\ncaf\u00e9\n".encode("latin-1")))


def test_mixed_records_are_refused(tmp_path):
    with pytest.raises(VolvelleError, match="holds both"):
        read_corpus(lines(tmp_path, {"text": "a"}, {"prompt": "a", "completion": "b"}))


@pytest.mark.shared_data
def test_real_sets(request):
    folder = request.config.rootpath.parent / "shared" / "data"
    webnlg = read_corpus(folder / "webnlg" / "dev.jsonl", prompt="{{ triples }}", completion="{{ references }}")
    assert len(webnlg.examples) == 871
    assert all(example.completions for example in webnlg.examples)
    e2e = read_corpus(folder / "e2e" / "valid.txt")
    assert len(e2e.examples) == 4672
    assert len({example.prompt for example in e2e.examples}) == 547
    assert len(read_corpus(folder / "text" / "tinyshakespeare.txt").documents[0]) > 10**6
