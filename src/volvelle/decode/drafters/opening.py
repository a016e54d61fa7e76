"""Opening a drafter from what the user named: a run of `volvelle draft`, a folder of what drafts, a model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from volvelle.errors import VolvelleError
from volvelle.files import read_json
from volvelle.systems.language.decoder import Decoder

if TYPE_CHECKING:
    from volvelle.decode.contract import Drafter
    from volvelle.systems.language.models import LanguageModel

MEDUSA, MTP_COUNT, NGRAM = "medusa_num_heads", "num_nextn_predict_layers", "ngram_order"
"""The fields of a config.json that announce heads, modules, and n-grams."""


def open_drafter(path: str | os.PathLike[str], model: LanguageModel, **options: Any) -> Drafter:
    """Open what drafts for `model`, in its dtype and on its device.

    `path` is a run folder (of `volvelle draft`, or of `volvelle train language mtp=…`), a folder with Medusa's heads,
    modules of multi-token prediction or n-grams, or anything that `load_language_model` takes: a smaller model with
    the same tokenizer. `options` are the drafter's own: k=, and tree= for Medusa. Raises VolvelleError where nothing
    drafts, and where what is found does not belong to the model.
    """
    folder = Path(path)
    kind = kind_of(folder)
    if kind == "model":
        from volvelle.adapt import load_run
        from volvelle.decode.drafters.draft_model import DraftModel

        return DraftModel(load_run(path, dtype=model.dtype, device=model.device, merged=True), **options)
    inside = folder / kind
    where = inside if (inside / "config.json").is_file() else folder
    if kind == "ngram":
        from volvelle.decode.drafters.ngram_files import read_ngram

        return read_ngram(where, model.config.vocabulary, **options)
    if not isinstance(model, Decoder):
        raise VolvelleError(f"{folder}: heads and modules draft for decoders, not for an encoder-decoder")
    if kind == "medusa":
        from volvelle.decode.drafters.medusa import Medusa
        from volvelle.systems.language.medusa_files import read_medusa

        return Medusa(read_medusa(where, model), **options)
    from volvelle.decode.drafters.mtp import MTP
    from volvelle.systems.language.mtp import ParallelMTP
    from volvelle.systems.language.mtp_files import read_mtp

    modules = read_mtp(where, model)
    if isinstance(modules, ParallelMTP):
        options.setdefault("k", modules.depths)
    return MTP(modules, **options)


def kind_of(folder: Path) -> str:
    """What kind of drafter a folder holds: "medusa", "mtp", "ngram", or "model", which is also what is no folder."""
    for kind in ("medusa", "mtp", "ngram"):
        if (folder / kind / "config.json").is_file():
            return kind
    if not (folder / "config.json").is_file():
        return "model"
    values = read_json(folder / "config.json")
    for kind, field in (("medusa", MEDUSA), ("ngram", NGRAM)):
        if field in values:
            return kind
    return "mtp" if values.get(MTP_COUNT) else "model"
