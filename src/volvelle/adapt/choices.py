"""Every adaptation method with its options, for commands that choose one by name. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from volvelle.adapt.methods import Bottleneck, DoRA, Full, LoRA, Method
from volvelle.adapt.prefix_methods import PrefixTuning, PromptTuning

MethodName = Literal["lora", "dora", "adapter", "prefix", "prompt", "full"]


@dataclass(frozen=True, kw_only=True)
class Methods:
    """The options of every method, of which one is used.

    >>> Methods(prefix=PrefixTuning(length=20)).named("prefix").length
    20
    """

    lora: LoRA = field(default_factory=LoRA)
    """LoRA's own options: lora.rank=16."""
    dora: DoRA = field(default_factory=DoRA)
    """DoRA's: dora.rank=16."""
    adapter: Bottleneck = field(default_factory=Bottleneck)
    """Those of bottleneck adapters: adapter.form=pfeiffer."""
    prefix: PrefixTuning = field(default_factory=PrefixTuning)
    """Those of prefix tuning: prefix.length=20."""
    prompt_tuning: PromptTuning = field(default_factory=PromptTuning)
    """Those of prompt tuning: prompt_tuning.length=50."""

    def named(self, name: MethodName) -> Method:
        """A method with its options."""
        methods: dict[MethodName, Method] = {
            "lora": self.lora,
            "dora": self.dora,
            "adapter": self.adapter,
            "prefix": self.prefix,
            "prompt": self.prompt_tuning,
            "full": Full(),
        }
        return methods[name]
