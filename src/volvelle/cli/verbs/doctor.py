"""`volvelle doctor`: check this machine and say what to do about what is wrong."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from volvelle.cli.console import result, say

EXAMPLES = ("volvelle doctor", "volvelle doctor assets=false --json")
MARKS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}


@dataclass(frozen=True)
class Options:
    """What to check."""

    assets: bool = True
    """Compute the SHA-256 of every stored model and data set."""
    compute: bool = True
    """Multiply matrices for a second to see that the arithmetic is right."""


def main(options: Options) -> int:
    """Print one row a check; the exit code is 1 when one failed."""
    from volvelle.cli import diagnosis

    checks = list(diagnosis.software())
    checks += diagnosis.processor()
    checks += diagnosis.resources()
    if options.assets:
        checks += diagnosis.assets()
    if options.compute:
        checks += diagnosis.compute()
    width = max(len(check.what) for check in checks)
    for check in checks:
        say(f"{MARKS[check.state]}  {check.what:<{width}}  {check.found}")
        if check.tip:
            say(f"{' ' * (width + 8)}tip: {check.tip}")
    failed, warned = (sum(check.state == state for check in checks) for state in ("fail", "warn"))
    say(f"{len(checks)} checks, {warned} warnings, {failed} failures")
    result({"checks": [asdict(check) for check in checks], "warnings": warned, "failures": failed})
    return 1 if failed else 0
