"""A prior that writes pictures of another size than it was trained on: its decoder, with a window for a cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from volvelle.errors import VolvelleError
from volvelle.parts.attention.cache import Cache
from volvelle.parts.attention.row_window import RowWindow
from volvelle.systems.generation.layout import Layout
from volvelle.systems.language.config import LanguageConfig, Rope
from volvelle.systems.language.decoder import Decoder, Output


class Larger(nn.Module):
    """Stands where a decoder stands while pictures of `rows` x `columns` codes are written.

    Its cache is a `RowWindow`; `said` is the number of ids before the codes, the same for all pictures of a batch.
    Raises VolvelleError for models whose positions are not plain RoPE, which know nothing of places outside the size
    trained on, and for narrower pictures, in which no code would stand below the one it stood below in training.
    """

    tokenizer = None
    ahead = 0

    def __init__(self, decoder: Decoder, layout: Layout, *, rows: int, columns: int, said: int):
        super().__init__()
        position = decoder.config.position
        if not isinstance(position, Rope) or position.scaling is not None or decoder.before is not None:
            raise VolvelleError(
                f"pictures of {rows} x {columns} codes: this prior knows {layout.rows} x {layout.columns} only, "
                f"its positions are {type(position).__name__}",
                tip="train one with position=rope",
            )
        if columns < layout.columns:
            raise VolvelleError(
                f"pictures of {rows} x {columns} codes: this prior's are {layout.columns} wide",
                tip="wider ones can be drawn",
            )
        self.decoder, self.layout, self.said = decoder, layout, said
        self.rows, self.columns = rows, columns
        self._ids = WeakKeyDictionary[RowWindow, Tensor]()
        self.config: LanguageConfig = replace(decoder.config, context=said + rows * columns)

    @property
    def device(self) -> torch.device:
        """The decoder's."""
        return self.decoder.device

    @property
    def dtype(self) -> torch.dtype:
        """The decoder's."""
        return self.decoder.dtype

    @property
    def room(self) -> int:
        """The ids of a whole picture, and those before it."""
        return self.config.context

    def new_cache(self, batch: int, context: int, dtype: torch.dtype | None = None) -> RowWindow:
        """The window; how long the text becomes does not matter to it."""
        config, decoder = self.config, self.decoder
        return RowWindow.of(
            said=self.said,
            window=(self.layout.rows, self.layout.columns),
            columns=self.columns,
            layers=config.depth,
            batch=batch,
            kv_heads=config.kv_heads,
            head_width=config.head_width,
            dtype=dtype or decoder.dtype,
            device=decoder.device,
            turn=self._turned,
        )

    def hidden(self, ids: Tensor, *, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """The final states (b, n, width) of the ids (b, n), in runs in which the window stands still.

        All but the last run are committed here, the last by the caller. The state of a row's last id is that from which
        the next row's first code follows.
        """
        assert isinstance(cache, RowWindow)
        parts = ids.split(cache.pieces(ids.shape[1]), 1)
        known = self._ids.get(cache)
        self._ids[cache] = ids if known is None else torch.cat((known, ids), 1)
        found = []
        for number, part in enumerate(parts, 1):
            ends_row = cache.ends_row(part.shape[1])
            states = self.decoder.hidden(part, mask=mask, cache=cache)
            if ends_row or number < len(parts):
                cache.commit()
            if ends_row:
                states = torch.cat((states[:, :-1], self._again(cache)), 1)
                if number < len(parts):
                    cache.commit()
            found.append(states)
        return torch.cat(found, 1)

    def _again(self, cache: RowWindow) -> Tensor:
        """The state from which a row of a wide picture begins; its step stays open."""
        return self.decoder.hidden(self._ids[cache][:, cache.again(), None], cache=cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """The decoder's."""
        return self.decoder.logits(hidden)

    def forward(self, ids: Tensor, **options: Any) -> Output:
        """Logits and states of `ids`; the options are those of `hidden`."""
        hidden = self.hidden(ids, **options)
        return Output(self.logits(hidden), hidden)

    def _turned(self, keys: Tensor, distance: int) -> Tensor:
        """Keys (r, h_kv, m, d) as they are `distance` positions later."""
        where = torch.full((keys.shape[2],), distance, device=keys.device)
        rotation = self.decoder.model.position.rotation(where, torch.promote_types(keys.dtype, torch.float32))
        assert rotation is not None
        return rotation.turn(keys.to(torch.promote_types(keys.dtype, torch.float32))).to(keys.dtype)
