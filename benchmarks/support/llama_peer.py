"""llama.cpp as a peer of decoding, through the plain bindings of llama-cpp-python: greedy answers, called directly.

pip install --no-deps llama-cpp-python     (compiles llama.cpp: minutes; CMAKE_ARGS="-DGGML_NATIVE=ON" for all of the
                                            processor)
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

PACKAGE = "llama-cpp-python"


def missing() -> str | None:
    """Why llama.cpp is not there; None: it is."""
    return None if importlib.util.find_spec("llama_cpp") else f"{PACKAGE} is not installed"


def version() -> str:
    """The bindings' version, and what llama.cpp was built for."""
    import llama_cpp

    return f"{importlib.metadata.version(PACKAGE)}: {llama_cpp.llama_print_system_info().decode().strip()}"


class Llama:
    """A GGUF file opened by llama.cpp; `repacked` lets it keep the weights in the order its fastest kernels like."""

    def __init__(self, path: Path, threads: int, context: int = 2048, repacked: bool = True):
        import llama_cpp

        self.api: Any = llama_cpp
        self.log = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.log, None)
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.use_extra_bufts = repacked
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_threads, settings.n_threads_batch = context, 512, threads, threads
        settings.no_perf = True
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.sampler = llama_cpp.llama_sampler_init_greedy()
        if not self.model or not self.context:
            raise RuntimeError(f"llama.cpp cannot open {path}")

    def answer(self, prompt: list[int], most: int, ends: tuple[int, ...]) -> list[int]:
        """Greedy tokens up to one of `ends`, or `most` of them."""
        api, found = self.api, list[int]()
        api.llama_memory_clear(api.llama_get_memory(self.context), True)
        ids = prompt
        while len(found) < most and (not found or found[-1] not in ends):
            tokens = (api.llama_token * len(ids))(*ids)
            if api.llama_decode(self.context, api.llama_batch_get_one(tokens, len(ids))):
                raise RuntimeError("llama_decode failed")
            found.append(int(api.llama_sampler_sample(self.sampler, self.context, -1)))
            ids = found[-1:]
        return found
