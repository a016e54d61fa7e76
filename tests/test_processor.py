"""What /proc/cpuinfo says, on processors of several kinds and where there is none."""

import pytest

from volvelle import processor

X86 = "processor\t: 0\nmodel name\t: One\nflags\t\t: fpu avx2 avx512_bf16 amx_bf16\n"
PLAIN = "processor\t: 0\nflags\t\t: fpu avx2\n\nprocessor\t: 1\nflags\t\t: fpu avx2 amx_bf16\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd bf16\n"


@pytest.mark.parametrize(
    ("text", "flags", "bf16"),
    [
        (X86, {"fpu", "avx2", "avx512_bf16", "amx_bf16"}, {"avx512_bf16", "amx_bf16"}),
        (PLAIN, {"fpu", "avx2"}, set()),
        (ARM, {"fp", "asimd", "bf16"}, set()),
        ("processor\t: 0\n", set(), set()),
        ("", set(), set()),
    ],
)
def test_the_first_processors_instruction_sets(tmp_path, monkeypatch, text, flags, bf16):
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    assert processor.flags() == processor.bf16_flags() == set()
    (tmp_path / "cpuinfo").write_text(text)
    assert processor.flags() == flags
    assert processor.bf16_flags() == bf16
