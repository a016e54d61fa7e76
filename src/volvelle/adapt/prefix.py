"""What comes before every text of a model: trained keys and values, or a trained prompt, in one place for all adapters.

A model has one `Prefaces`, our decoders in their slot `before`, transformers' models beside their trunk, with hooks
that ask it (`prefix_transformers.py`). It holds a preface for each adapter and answers for those that the switch chose:
one for the whole batch, or another for each row.

Shapes: b batch, h_kv key/value heads, l positions of a preface, d features a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from volvelle.adapt.methods import AdapterLayer
from volvelle.adapt.prefix_methods import PrefixTuning, PromptTuning
from volvelle.adapt.prefix_sites import SitedPrefix, stacks
from volvelle.adapt.prefix_transformers import Graft, Sizes, sizes
from volvelle.adapt.sites import moved
from volvelle.adapt.switch import Switch, check_rows
from volvelle.errors import VolvelleError
from volvelle.parts.attention.before import Before
from volvelle.parts.lowrank.prefix import PrefixStates
from volvelle.systems.language.config import Complex, Convolutional, LinearAttention
from volvelle.systems.language.decoder import Decoder
from volvelle.systems.language.encoder_decoder import EncoderDecoder
from volvelle.systems.language.preface import Prefaced, Site
from volvelle.systems.modes import evaluating

SLOT = "before"
COMMON = 5000
"""Words are drawn from the first tokens of the vocabulary, which tokenizers sort by how common they are."""


class Prefix(PrefixStates):
    """The preface of prefix tuning: keys and values as they are trained."""

    def states(self, model: nn.Module, site: Site) -> Tensor:
        """Keys and values (layers, 2, 1, h_kv, l, d)."""
        return self()


class Prompt(nn.Module):
    """The preface of prompt tuning: the keys and values that the model makes of trained embeddings (l, width)."""

    def __init__(self, embeddings: Tensor):
        super().__init__()
        self.table = nn.Parameter(embeddings)

    @property
    def length(self) -> int:
        """The number of embeddings."""
        return len(self.table)

    def states(self, model: nn.Module, site: Site) -> Tensor:
        """Keys and values (layers, 2, 1, h_kv, l, d)."""
        return _states_of(model, self.table[None])

    def flat(self) -> Tensor:
        """The embeddings as they are stored, (l, width)."""
        return self.table.detach()


Preface = Prefix | Prompt | SitedPrefix


class Prefaces(nn.Module):
    """The prefaces of a model's adapters, by their names; a Decoder asks it in every pass."""

    def __init__(self, switch: Switch):
        super().__init__()
        self.at = nn.ModuleDict()
        self.switch = switch
        self.graft: Graft | None = None

    @property
    def length(self) -> int:
        """The number of keys that come before the text now, holes included."""
        lengths = self.lengths
        return lengths if isinstance(lengths, int) else max(lengths)

    @property
    def lengths(self) -> int | list[int]:
        """The same for all rows, or of each row."""
        chosen = self.switch.chosen
        return [self._length(name) for name in chosen] if isinstance(chosen, tuple) else self._length(chosen)

    def forward(self, model: nn.Module, batch: int, site: Site = "decoder") -> Before | None:
        """What comes before the text for the chosen adapters, or None; `batch` is the number of rows."""
        chosen = self.switch.selection()
        if isinstance(chosen, tuple):
            return self._rows(model, chosen, batch, site)
        states = self._states(model, chosen, site)
        return None if states is None else Before(states)

    def _length(self, name: str | None) -> int:
        return 0 if name is None or name not in self.at else self._get(name).length

    def _get(self, name: str | None) -> Any:
        return self.at[name]  # pyright: ignore[reportArgumentType]

    def _states(self, model: nn.Module, name: str | None, site: Site) -> Tensor | None:
        if name is None or name not in self.at:
            return None
        with self.switch.using(name):  # a prompt runs through layers that would look for the rows of the batch
            return self._get(name).states(model, site)

    def _rows(self, model: nn.Module, chosen: Sequence[str | None], batch: int, site: Site) -> Before | None:
        check_rows(chosen, batch, "what comes before the text")
        found = {name: self._states(model, name, site) for name in dict.fromkeys(chosen)}
        each = {name: states for name, states in found.items() if states is not None}
        if not each:
            return None
        some = next(iter(each.values()))
        lengths = [each[name].shape[4] if name in each else 0 for name in chosen]
        longest = max(lengths)
        nothing = some[:, :, :, :, :0]
        # On the left, as padding is, so that a row's own text follows its own keys.
        rows = [nn.functional.pad(s, (0, 0, longest - s.shape[4], 0)) for s in (each.get(n, nothing) for n in chosen)]
        if len(set(lengths)) == 1:
            return Before(torch.cat(rows, 2))
        missing = torch.tensor([[longest - length] for length in lengths], device=some.device)
        return Before(torch.cat(rows, 2), torch.arange(longest, device=some.device) >= missing)


def preface_path(name: str) -> str:
    """Where the preface of the adapter `name` lies in a model."""
    return f"{SLOT}.at.{name}"


class PrefaceLayer:
    """One adapter's preface in a model: the layer that `volvelle.adapt` keeps a record of."""

    def __init__(self, model: nn.Module, name: str, preface: Preface, switch: Switch):
        self.model, self.name, self.preface, self.switch = model, name, preface, switch

    @property
    def path(self) -> str:
        """Where the preface lies in the model."""
        return preface_path(self.name)

    def own(self) -> dict[str, nn.Parameter]:
        """The trained parameters: the table, and the network that makes a prefix of it."""
        return dict(self.preface.named_parameters())

    def insert(self) -> None:
        """Put the preface before the text."""
        prefaces: Any = getattr(self.model, SLOT, None)
        if prefaces is None:
            prefaces = Prefaces(self.switch)
            if not isinstance(self.model, Prefaced):
                prefaces.graft = Graft(self.model, prefaces)
            self.model.add_module(SLOT, prefaces)
        # The model may have moved to another device while the preface was out of it.
        prefaces.at[self.name] = moved(self.preface, device=_device(self.model))

    def restore(self) -> None:
        """Take the preface out; with the last one goes the place for them."""
        prefaces: Any = getattr(self.model, SLOT)
        del prefaces.at[self.name]
        if prefaces.at:
            return
        if prefaces.graft is not None:
            prefaces.graft.remove()
            delattr(self.model, SLOT)
        else:
            setattr(self.model, SLOT, None)

    def why_not_merge(self, model: nn.Module) -> str | None:
        """Always a reason: the weights cannot hold it."""
        return "it adds keys and values before the text, which no weight of the model can hold"

    def merge(self, *, originals: bool) -> None:
        """Refused; see `why_not_merge`."""
        raise VolvelleError(f"merge: {self.path}: {self.why_not_merge(self.model)}")

    def unmerge(self) -> None:
        """Refused: it is never merged."""
        raise VolvelleError(f"unmerge: {self.path} was not merged")


def install_prefix(
    model: nn.Module, method: PrefixTuning, name: str, switch: Switch, generator: torch.Generator | None
) -> dict[str, AdapterLayer]:
    """Put a prefix before every text of the model, under the adapter's name."""
    shapes = _checked_sites(model, method)
    starts: dict[Site, Tensor] = {}
    if method.init == "words":
        ids = _words(model, method, generator)[None]
        with torch.no_grad(), evaluating(model):
            if isinstance(model, EncoderDecoder):
                starts = model.states_of(ids)
            else:
                starts = {"decoder": _states_of(model, _embed(model, ids), ids)}
    made: dict[Site, PrefixStates] = {}
    kind = SitedPrefix if isinstance(model, EncoderDecoder) else None
    for site, (layers, heads, width) in shapes.items():
        start = starts.get(site)
        if start is not None:
            start = start[:, :, 0].permute(3, 0, 1, 2, 4).reshape(method.length, -1).to(_master(start.dtype))
        with torch.device(_device(model)):
            states = (Prefix if kind is None else PrefixStates)(
                method.length,
                layers,
                heads,
                width,
                hidden=method.hidden,
                width=method.width,
                start=start,
                generator=generator,
            )
        made[site] = moved(states, dtype=_master(_dtype(model)))  # pyright: ignore[reportArgumentType]
    preface = made["decoder"] if kind is None else kind(made)
    return _seated(model, name, preface, switch)  # pyright: ignore[reportArgumentType]


def install_prompt(
    model: nn.Module, method: PromptTuning, name: str, switch: Switch, generator: torch.Generator | None
) -> dict[str, AdapterLayer]:
    """Put a prompt before every text of the model, under the adapter's name."""
    width = _checked(model, method).embedding
    dtype = _master(_dtype(model))
    if method.init == "words":
        table = _embed(model, _words(model, method, generator)).detach().to(dtype, copy=True)
    else:
        table = torch.empty(method.length, width, dtype=dtype, device=_device(model))
        nn.init.normal_(table, generator=generator)
    return _seated(model, name, Prompt(table), switch)


def _seated(model: nn.Module, name: str, preface: Preface, switch: Switch) -> dict[str, AdapterLayer]:
    layer = PrefaceLayer(model, name, preface, switch)
    layer.insert()
    return {layer.path: layer}


def sizes_of(model: nn.Module) -> Sizes:
    """The sizes a preface must fit."""
    if not isinstance(model, Decoder):
        return sizes(model)
    config = model.config
    return Sizes(config.depth, config.kv_heads, config.head_width, config.embedding_width)


def _checked(model: nn.Module, method: PrefixTuning | PromptTuning) -> Sizes:
    """The sizes a preface must fit; raises VolvelleError where the method cannot work."""
    if isinstance(model, EncoderDecoder):
        raise VolvelleError(f"{method.label}: an encoder-decoder takes prefixes only", tip="PrefixTuning()")
    if not isinstance(model, Decoder):
        return sizes(model)
    config = model.config
    if not config.causal:
        raise VolvelleError(f"{method.label}: a masked language model reads both ways, nothing comes before its text")
    if isinstance(config.attention, LinearAttention):
        raise VolvelleError(f"{method.label}: linear attention keeps a sum, no keys that others could come before")
    if method.length >= config.context:
        raise VolvelleError(f"{method.label}: {method.length} positions leave no room in a context of {config.context}")
    if isinstance(method, PromptTuning) and isinstance(config.position, Complex | Convolutional):
        kind = type(config.position).__name__
        raise VolvelleError(
            f"prompt tuning: {kind} positions need the words themselves, which a trained prompt has not"
        )
    return sizes_of(model)


def _checked_sites(model: nn.Module, method: PrefixTuning) -> dict[Site, tuple[int, int, int]]:
    """Layers, heads and features a head of each kind of attention that gets a prefix."""
    if isinstance(model, EncoderDecoder):
        if method.length >= model.config.context:
            raise VolvelleError(f"{method.label}: {method.length} positions leave no room for an answer")
        found = stacks(model)
    else:
        found: dict[Site, tuple[int, int, int]] = {"decoder": _checked(model, method)[:3]}
    absent = [site for site in method.sites or () if site not in found]
    if absent:
        raise VolvelleError(
            f"{method.label}: sites={absent[0]} is for encoder-decoders; a decoder has one site, decoder"
        )
    return {site: shape for site, shape in found.items() if method.sites is None or site in method.sites}


def _words(model: nn.Module, method: PrefixTuning | PromptTuning, generator: torch.Generator | None) -> Tensor:
    """The token ids (l,) that training begins from."""
    if method.text is None:
        high = min(COMMON, _embeddings(model).num_embeddings)
        where = "cpu" if generator is None else generator.device
        ids = torch.randint(high, (method.length,), generator=generator, device=where)
        return ids.to(_device(model))
    tokenizer: Any = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise VolvelleError(
            f"{method.label}: text={method.text!r} needs a model with a tokenizer",
            tip="set model.tokenizer, or leave text out to begin from words of the vocabulary",
        )
    ids = list(tokenizer.encode(method.text))
    repeated = ids * -(-method.length // len(ids))
    return torch.tensor(repeated[: method.length], device=_device(model))


def _states_of(model: nn.Module, x: Tensor, ids: Tensor | None = None) -> Tensor:
    """The keys and values (layers, 2, b, h_kv, n, d) that a model makes of token embeddings x (b, n, width)."""
    if isinstance(model, Decoder):
        return model.states_of(x, ids)
    prefaces: Any = getattr(model, SLOT, None)
    graft: Graft | None = None if prefaces is None else prefaces.graft
    if graft is not None:
        return graft.states_of(x.to(_dtype(model)))
    graft = Graft(model, lambda model, batch: None)
    try:
        return graft.states_of(x.to(_dtype(model)))
    finally:
        graft.remove()


def _embed(model: nn.Module, ids: Tensor) -> Tensor:
    return _embeddings(model).weight[ids]


def _embeddings(model: nn.Module) -> nn.Embedding:
    if isinstance(model, Decoder):
        return model.model.embed_tokens
    if isinstance(model, EncoderDecoder):
        return model.model.shared
    return model.get_input_embeddings()  # pyright: ignore[reportCallIssue]


def _device(model: nn.Module) -> torch.device:
    return _embeddings(model).weight.device


def _dtype(model: nn.Module) -> torch.dtype:
    return _embeddings(model).weight.dtype


def _master(dtype: torch.dtype) -> torch.dtype:
    """What is trained is kept in fp32 where the model has 16 bits."""
    return torch.float32 if dtype in {torch.bfloat16, torch.float16} else dtype
