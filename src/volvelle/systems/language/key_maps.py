"""Which tensor of a Hugging Face checkpoint is which parameter of ours: one declarative map a family.

A rule says `theirs = concat(ours...)`, transposed for GPT-2's (in, out) matrices. Both directions are derived from it:
`Binding.split` reads, `Binding.join` writes, and one undoes the other bit by bit. Placeholders: `{i}` a layer number,
`{p}` "weight" or "bias", `{rest}` whatever is left of the name, `{side}` "encoder" or "decoder".
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from volvelle.errors import VolvelleError
from volvelle.systems.language.config import Family

_PLACEHOLDERS = {"i": r"(?P<i>\d+)", "p": r"(?P<p>weight|bias)", "rest": r"(?P<rest>.+)"}
_PLACEHOLDERS |= {"side": r"(?P<side>encoder|decoder)"}


@dataclass(frozen=True)
class Rule:
    """`theirs` holds `ours` one below the other (dimension 0), and lies transposed when `transposed`."""

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False

    def match(self, name: str) -> dict[str, str] | None:
        """The placeholders' values when `name` is this rule's first parameter, else None."""
        pattern = re.sub(r"\\{(\w+)\\}", lambda m: _PLACEHOLDERS[m[1]], re.escape(self.ours[0]))
        found = re.fullmatch(pattern, name)
        return found.groupdict() if found else None


@dataclass(frozen=True)
class Binding:
    """A rule applied to one tensor: its name in the file, our parameters and their shapes."""

    theirs: str
    ours: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    transposed: bool

    @property
    def their_shape(self) -> tuple[int, ...]:
        """The shape the tensor has in the file."""
        rows = sum(shape[0] for shape in self.shapes)
        shape = (rows, *self.shapes[0][1:])
        return shape[::-1] if self.transposed else shape

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """File -> parameters. Views where possible. Raises VolvelleError with both shapes when they differ."""
        if tuple(tensor.shape) != self.their_shape:
            raise VolvelleError(
                f"{self.theirs}: shape {tuple(tensor.shape)} in the file, {self.their_shape} by the configuration",
                tip="config.json and the weights belong to different models",
            )
        upright = tensor.mT if self.transposed and tensor.ndim == 2 else tensor
        return dict(zip(self.ours, upright.split([shape[0] for shape in self.shapes]), strict=True))

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Parameters -> file: one contiguous tensor."""
        parts = [tensors[name].detach() for name in self.ours]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return (whole.mT if self.transposed and whole.ndim == 2 else whole).contiguous()


@dataclass(frozen=True)
class KeyMap:
    """All rules of a family.

    `aliases` are names that hold the same values as another name (tied weights): either may be present in a file, we
    write the second only. `prefix` is what checkpoints of the bare model leave out. `ignored` are glob patterns of
    buffers that carry nothing to learn. A file may lack the names in `optional`, which are then zero.
    """

    rules: tuple[Rule, ...]
    aliases: Mapping[str, str]
    prefix: str
    ignored: tuple[str, ...] = ()
    optional: frozenset[str] = frozenset()

    def bind(self, shapes: Mapping[str, tuple[int, ...]]) -> list[Binding]:
        """Apply the rules to parameters given as name -> shape, in the order of `shapes`.

        Raises VolvelleError when a parameter has no place in this family's files.
        """
        bindings: list[Binding] = []
        seen: set[str] = set()
        for name in shapes:
            if name in seen:
                continue
            binding = self._bind_one(name, shapes)
            if binding is not None:
                bindings.append(binding)
                seen.update(binding.ours)
        left = [name for name in shapes if name not in seen]
        if left:
            raise VolvelleError(
                f"{_some(left)}: no place for this in a Hugging Face checkpoint of the family",
                tip="merge adapters before saving the whole model, or save the adapters alone",
            )
        return bindings

    def _bind_one(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> Binding | None:
        for rule in self.rules:
            values = rule.match(name)
            if values is not None:
                ours = tuple(pattern.format(**values) for pattern in rule.ours)
                missing = [other for other in ours if other not in shapes]
                if missing:
                    raise VolvelleError(
                        f"{name}: {_some(missing)} must be there too, the file holds them as one tensor"
                    )
                parts = tuple(tuple(shapes[other]) for other in ours)
                return Binding(rule.theirs.format(**values), ours, parts, rule.transposed)
        return None

    def locate(self, names: Iterable[str], bindings: Iterable[Binding], *, source: str) -> dict[str, str]:
        """Find each binding's tensor among a file's `names`: name in the map -> name in the file.

        Raises VolvelleError that lists what is missing and what is unknown.
        """
        wanted = {binding.theirs for binding in bindings}
        found: dict[str, str] = {}
        spare: dict[str, str] = {}
        unknown: list[str] = []
        for name in names:
            canonical = next((c for c in (name, self.prefix + name) if c in wanted or c in self.aliases), None)
            if canonical is None:
                if not any(fnmatch.fnmatchcase(name, pattern) for pattern in self.ignored):
                    unknown.append(name)
            elif canonical in wanted:
                found[canonical] = name
            else:
                spare[self.aliases[canonical]] = name
        for canonical, name in spare.items():
            found.setdefault(canonical, name)
        missing = sorted(wanted - found.keys() - self.optional)
        if missing or unknown:
            parts = [f"missing {_some(missing)}"] if missing else []
            parts += [f"unknown {_some(unknown)}"] if unknown else []
            raise VolvelleError(f"{source}: {'; '.join(parts)}", tip=_tip(missing, self.aliases))
        return found

    def tied(self, names: Iterable[str], bindings: Iterable[Binding]) -> list[tuple[str, str]]:
        """Pairs of names of a file that must hold equal values, because the model ties them."""
        names = list(names)
        wanted = {binding.theirs for binding in bindings}
        pairs = [(alias, source) for alias, source in self.aliases.items() if alias not in wanted]
        return [
            (alias, held)
            for alias, source in pairs
            for held in (source, source.removeprefix(self.prefix))
            if alias in names and held in names
        ]


def _some(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _tip(missing: list[str], aliases: Mapping[str, str]) -> str | None:
    if any(name in aliases for name in missing):
        return "set tie_word_embeddings to true in config.json if the output weights are those of the embeddings"
    return None


def _rule(theirs: str, *ours: str, transposed: bool = False) -> Rule:
    return Rule(theirs, ours, transposed)


_LAYER = "model.layers.{i}"

LLAMA = KeyMap(
    rules=(
        _rule("model.embed_tokens.weight", "model.embed_tokens.weight"),
        _rule(f"{_LAYER}.input_layernorm.weight", f"{_LAYER}.input_layernorm.weight"),
        *(
            _rule(f"{_LAYER}.self_attn.{name}_proj.{{p}}", f"{_LAYER}.self_attn.{name}_proj.{{p}}")
            for name in ("q", "k", "v", "o")
        ),
        _rule(f"{_LAYER}.post_attention_layernorm.weight", f"{_LAYER}.post_attention_layernorm.weight"),
        *(
            _rule(f"{_LAYER}.mlp.{name}_proj.{{p}}", f"{_LAYER}.mlp.{name}_proj.{{p}}")
            for name in ("gate", "up", "down")
        ),
        _rule("model.norm.weight", "model.norm.weight"),
        _rule("lm_head.weight", "lm_head.weight"),
    ),
    aliases={"lm_head.weight": "model.embed_tokens.weight"},
    prefix="model.",
    ignored=("*rotary_emb.inv_freq",),
)

_GPT2_LAYER = "transformer.h.{i}"

GPT2 = KeyMap(
    rules=(
        _rule("transformer.wte.weight", "model.embed_tokens.weight"),
        _rule("transformer.wpe.weight", "model.position.weight"),
        _rule(f"{_GPT2_LAYER}.ln_1.{{p}}", f"{_LAYER}.input_layernorm.{{p}}"),
        _rule(
            f"{_GPT2_LAYER}.attn.c_attn.{{p}}",
            *(f"{_LAYER}.self_attn.{name}_proj.{{p}}" for name in ("q", "k", "v")),
            transposed=True,
        ),
        _rule(f"{_GPT2_LAYER}.attn.c_proj.{{p}}", f"{_LAYER}.self_attn.o_proj.{{p}}", transposed=True),
        _rule(f"{_GPT2_LAYER}.ln_2.{{p}}", f"{_LAYER}.post_attention_layernorm.{{p}}"),
        _rule(f"{_GPT2_LAYER}.mlp.c_fc.{{p}}", f"{_LAYER}.mlp.up_proj.{{p}}", transposed=True),
        _rule(f"{_GPT2_LAYER}.mlp.c_proj.{{p}}", f"{_LAYER}.mlp.down_proj.{{p}}", transposed=True),
        _rule("transformer.ln_f.{p}", "model.norm.{p}"),
        _rule("lm_head.weight", "lm_head.weight"),
    ),
    aliases={"lm_head.weight": "transformer.wte.weight"},
    prefix="transformer.",
    ignored=("*h.*.attn.bias", "*h.*.attn.masked_bias"),
)

_ROFORMER_LAYER = "roformer.encoder.layer.{i}"

ROFORMER = KeyMap(
    rules=(
        _rule("roformer.embeddings.word_embeddings.weight", "model.embed_tokens.weight"),
        _rule("roformer.embeddings.token_type_embeddings.weight", "model.embed_segments.weight"),
        _rule("roformer.embeddings.LayerNorm.{p}", "model.embed_norm.{p}"),
        _rule("roformer.embeddings_project.{p}", "model.embed_proj.{p}"),
        *(
            _rule(f"{_ROFORMER_LAYER}.attention.self.{theirs}.{{p}}", f"{_LAYER}.self_attn.{ours}_proj.{{p}}")
            for theirs, ours in (("query", "q"), ("key", "k"), ("value", "v"))
        ),
        _rule(f"{_ROFORMER_LAYER}.attention.output.dense.{{p}}", f"{_LAYER}.self_attn.o_proj.{{p}}"),
        _rule(f"{_ROFORMER_LAYER}.attention.output.LayerNorm.{{p}}", f"{_LAYER}.post_attention_layernorm.{{p}}"),
        _rule(f"{_ROFORMER_LAYER}.intermediate.dense.{{p}}", f"{_LAYER}.mlp.up_proj.{{p}}"),
        _rule(f"{_ROFORMER_LAYER}.output.dense.{{p}}", f"{_LAYER}.mlp.down_proj.{{p}}"),
        _rule(f"{_ROFORMER_LAYER}.output.LayerNorm.{{p}}", f"{_LAYER}.post_feedforward_layernorm.{{p}}"),
        _rule("cls.predictions.transform.dense.{p}", "head_transform.dense.{p}"),
        _rule("cls.predictions.transform.LayerNorm.{p}", "head_transform.norm.{p}"),
        _rule("cls.predictions.bias", "lm_head.bias"),
    ),
    aliases={
        "cls.predictions.decoder.weight": "roformer.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    prefix="roformer.",
    ignored=("*encoder.embed_positions.weight", "*embeddings.position_ids"),
)

_BART_SIDE = "model.{side}"
_BART_LAYER = "model.{side}.layers.{i}"

BART = KeyMap(
    rules=tuple(
        _rule(name, name)
        for name in (
            "model.shared.weight",
            f"{_BART_SIDE}.embed_positions.weight",
            f"{_BART_SIDE}.layernorm_embedding.{{p}}",
            *(
                f"{_BART_LAYER}.{attention}.{name}_proj.{{p}}"
                for attention in ("self_attn", "encoder_attn")
                for name in ("q", "k", "v", "out")
            ),
            *(f"{_BART_LAYER}.{name}_layer_norm.{{p}}" for name in ("self_attn", "encoder_attn", "final")),
            *(f"{_BART_LAYER}.{name}.{{p}}" for name in ("fc1", "fc2")),
            "lm_head.weight",
            "final_logits_bias",
        )
    ),
    aliases=dict.fromkeys(
        ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"),
        "model.shared.weight",
    ),
    prefix="model.",
    ignored=("*encoder.version", "*decoder.version"),
    optional=frozenset({"final_logits_bias"}),
)

VOLVELLE = KeyMap(
    rules=(_rule("{rest}", "{rest}"),),
    aliases={"lm_head.weight": "model.embed_tokens.weight"},
    prefix="model.",
)
"""Our own files: every parameter under its own name."""

KEY_MAPS: dict[Family | Literal["bart"], KeyMap] = {
    "llama": LLAMA, "qwen2": LLAMA, "gpt2": GPT2, "roformer": ROFORMER, "volvelle": VOLVELLE, "bart": BART,
}  # fmt: skip
"""The map of each family; Qwen2 uses Llama's names."""
