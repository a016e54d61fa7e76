import subprocess
import sys
import types
import warnings

import pytest

from volvelle.export import (
    FACADES,
    Registry,
    deprecated_alias,
    generated_files,
    main,
    render_facade,
    render_golden,
    signature_text,
)


def sample_module(monkeypatch, tmp_path):
    """A module on disk with a function, its Module twin and every kind of name; returns its registry."""
    source = '''
from __future__ import annotations
from volvelle.export import Registry
registry = Registry()

@registry.export("functional.scale", aliases=["functional.rescale"], deprecated={"functional.mul": "0.2"})
def scale(x: float, factor: float = 2.0) -> float:
    """Scale."""
    return x * factor

@registry.export("nn.Scale", twin=scale, since="0.3")
class ScaleLayer:
    """Scale."""
    def __init__(self, factor: float = 2.0):
        self.factor = factor
    def forward(self, x: float) -> float:
        return scale(x, self.factor)
'''
    (tmp_path / "export_sample.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "export_sample", raising=False)
    import export_sample

    return export_sample.registry


def load(source: str, name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    exec(compile(source, f"{name}.py", "exec"), module.__dict__)
    return module


def test_the_decorator_returns_the_object_and_records_it():
    registry = Registry()

    def f(x):
        return x

    marked = registry.export("functional.f", aliases=["functional.g"], since="0.2", deprecated={"functional.h": "0.3"})
    assert marked(f) is f
    entry = registry["functional.f"]
    assert (entry.target, entry.since, entry.twin) == (f, "0.2", None)
    assert entry.all_names == ("functional.f", "functional.g", "functional.h")
    assert registry["functional.g"] is registry["functional.h"] is entry
    assert [e.name for e in registry] == ["functional.f"]
    assert "functional.f" in registry
    assert "functional.x" not in registry


@pytest.mark.parametrize("clash", ["functional.f", "functional.alias", "functional.old"])
def test_two_objects_under_one_name_is_an_error_naming_both(clash):
    registry = Registry()

    def first(): ...

    def second(): ...

    registry.export("functional.f", aliases=["functional.alias"], deprecated={"functional.old": "0.2"})(first)
    with pytest.raises(ValueError, match=r"first.* and .*second") as caught:
        registry.export(clash)(second)
    assert clash in str(caught.value)
    assert registry["functional.f"].target is first


def test_a_failed_export_records_none_of_its_names():
    registry = Registry()
    registry.export("functional.f")(test_sha := lambda: None)
    with pytest.raises(ValueError, match="names two objects"):
        registry.export("functional.new", aliases=["functional.f"])(len)
    assert "functional.new" not in registry
    assert registry["functional.f"].target is test_sha


def test_the_same_definition_may_be_loaded_again():
    registry = Registry()

    def define():
        @registry.export("functional.f")
        def f(): ...

        return f

    define()
    second = define()
    assert registry["functional.f"].target is second


@pytest.mark.parametrize("name", ["apply_rope", "systems.vqgan", "functional.", "functional.a.b", "functional.a-b", ""])
def test_names_outside_the_facades_are_refused(name):
    with pytest.raises(ValueError, match=r"functional\.NAME or nn\.NAME, got"):
        Registry().export(name)(len)
    with pytest.raises(ValueError, match=r"functional\.NAME or nn\.NAME, got"):
        Registry().export("functional.f", deprecated={name: "0.2"})(len)


def test_facades_hold_every_name(monkeypatch, tmp_path):
    registry = sample_module(monkeypatch, tmp_path)
    functional = load(render_facade("functional", registry), "functional_sample")
    nn = load(render_facade("nn", registry), "nn_sample")
    assert functional.__all__ == ["rescale", "scale"]
    assert nn.__all__ == ["Scale"]
    assert functional.rescale is functional.scale
    assert nn.Scale(3.0).forward(2.0) == functional.scale(2.0, 3.0) == 6.0


def test_a_deprecated_alias_works_and_warns_once(monkeypatch, tmp_path):
    functional = load(render_facade("functional", sample_module(monkeypatch, tmp_path)), "functional_sample")
    with pytest.warns(
        DeprecationWarning, match=r"functional_sample\.mul is deprecated since 0\.2: use .*scale"
    ) as seen:
        assert functional.mul is functional.scale
    assert seen[0].filename == __file__, "the warning points at the caller's line"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert functional.mul is functional.scale


def test_importing_a_deprecated_name_points_at_the_importing_line(monkeypatch, tmp_path):
    source = render_facade("functional", sample_module(monkeypatch, tmp_path))
    (tmp_path / "facade_sample.py").write_text(source)
    (tmp_path / "user.py").write_text("\n\nfrom facade_sample import mul\nfrom facade_sample import mul\nmul(1)\n")
    result = subprocess.run(
        [sys.executable, "-W", "always", "user.py"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert result.stderr.count("DeprecationWarning") == 1
    assert "user.py:3" in result.stderr


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'm' has no attribute 'nope'"):
        deprecated_alias({"__name__": "m"}, "nope", {"old": ("new", "0.2")})


def test_a_deprecated_name_needs_a_current_one_in_its_facade():
    registry = Registry()
    registry.export("nn.Scale", deprecated={"functional.scale": "0.2"})(len)
    with pytest.raises(ValueError, match=r"nn\.Scale.* has a deprecated name in functional but no current one there"):
        render_facade("functional", registry)


def test_an_empty_facade_is_valid():
    for facade in FACADES:
        assert load(render_facade(facade, Registry()), "empty").__all__ == []


def test_a_long_import_is_wrapped():
    registry = Registry()
    name = "functional.f" + "x" * 100

    def f(): ...

    registry.export(name)(f)
    assert max(map(len, render_facade("functional", registry).splitlines())) <= 120


def test_golden_lists_signatures_versions_and_names(monkeypatch, tmp_path):
    golden = render_golden(sample_module(monkeypatch, tmp_path))
    assert golden.split("\n", 2)[2] == (
        "functional.scale\n"
        "    (x: float, factor: float = 2.0) -> float\n"
        "    since 0.1, experimental, also functional.rescale, functional.mul deprecated since 0.2\n"
        "\n"
        "nn.Scale\n"
        "    (factor: float = 2.0)\n"
        "    forward(x: float) -> float\n"
        "    since 0.3, experimental, wraps export_sample.scale\n"
    )


def test_golden_says_which_names_are_stable():
    registry = Registry()
    registry.export("functional.f", stable=True)(lambda x: x)
    assert render_golden(registry).endswith("functional.f\n    (x)\n    since 0.1, stable\n")


def test_signatures_do_not_depend_on_the_run():
    marker = object()

    def f(x, option=marker): ...

    assert signature_text(f) == "(x, option=<object object>)"


def test_the_generated_code_passes_the_linter_and_the_formatter(monkeypatch, tmp_path, repository):
    registry = sample_module(monkeypatch, tmp_path)
    for facade in FACADES:
        path = repository / "src" / "volvelle" / f"{facade}.py"
        for command in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
            result = subprocess.run(
                [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(path), "-"],
                input=render_facade(facade, registry),
                cwd=repository,
                capture_output=True,
                text=True,
                check=False,
            )
            assert result.returncode == 0, result.stdout + result.stderr


def test_check_fails_with_a_diff_when_stale_and_writing_repairs_it(tmp_path, capsys):
    (tmp_path / "tests" / "cross").mkdir(parents=True)
    (tmp_path / "src" / "volvelle").mkdir(parents=True)
    assert main(["--check"], root=tmp_path) == 1
    shown = capsys.readouterr()
    assert "+++ functional.py (from the parts)" in shown.out
    assert "tip: " in shown.err
    assert not list((tmp_path / "src" / "volvelle").iterdir()), "--check writes nothing"
    assert main([], root=tmp_path) == 0
    assert main(["--check"], root=tmp_path) == 0
    golden = tmp_path / "tests" / "cross" / "public_names.txt"
    golden.write_text(golden.read_text() + "functional.invented\n")
    assert main(["--check"], root=tmp_path) == 1
    assert "-functional.invented" in capsys.readouterr().out


def test_outside_a_checkout_nothing_is_written(tmp_path, capsys):
    assert main([], root=tmp_path) == 1
    assert "not a checkout" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_generated_files_cover_both_facades_and_the_golden_list(tmp_path):
    assert sorted(path.name for path in generated_files(Registry(), tmp_path)) == [
        "functional.py",
        "nn.py",
        "public_names.txt",
    ]


def test_recording_does_not_import_torch():
    code = "import sys, volvelle.export; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
