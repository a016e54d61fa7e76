"""Files that pytest must not import on this machine: kernels, where Triton is not installed."""

from importlib.util import find_spec

collect_ignore_glob = (
    [] if find_spec("triton") else ["src/volvelle/parts/attention/triton_*.py", "tests/parts/attention/triton_*.py"]
)
