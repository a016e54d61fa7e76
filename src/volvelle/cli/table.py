"""The verbs of the command line, one row each. Adding a verb: one file in cli/verbs/ and one row here.

A verb's file is free of torch at import and holds

    EXAMPLES = ("volvelle ls models", "volvelle ls runs")     two runnable lines
    class Options                                              a frozen dataclass; a docstring under each field
    def main(options: Options) -> int | None                   imports what is heavy inside

A positional argument is a field annotated `tyro.conf.Positional[...]`. A row whose file is missing is not shown.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True)
class Verb:
    """One row: what is typed (one or two words), a line of help, the file in cli/verbs/, the group it is listed in."""

    name: str
    help: str
    file: str
    group: str

    @property
    def module(self) -> str:
        """Import path of the verb's file."""
        return f"volvelle.cli.verbs.{self.file}"

    def exists(self) -> bool:
        """Say whether the file is there, without importing it."""
        return importlib.util.find_spec(self.module) is not None


GROUPS = ("start", "train and adapt", "use", "look")

VERBS = (
    Verb("tour", "adapt a real model, decode with it and write a report, in a few minutes", "tour", "start"),
    Verb("ls", "list techniques, recipes, claims, models and runs", "ls", "start"),
    Verb("get", "fetch a model or data set and print where it is", "get", "start"),
    Verb("doctor", "check this machine: torch, threads, memory, disk, stored models", "doctor", "start"),
    Verb("train language", "train a language model from scratch on text", "train_language", "train and adapt"),
    Verb("train summarize", "train an encoder-decoder from scratch to summarise", "train_summarize", "train and adapt"),
    Verb("train classify", "train an image classifier on folders of pictures", "train_classify", "train and adapt"),
    Verb("train segment", "train a segmenter on images with masks", "train_segment", "train and adapt"),
    Verb("train promptable", "train Segment Anything by simulated clicks", "train_promptable", "train and adapt"),
    Verb("train detect", "train a detector on pictures with boxes", "train_detect", "train and adapt"),
    Verb("train vqgan", "train an image codec: pictures to codes and back", "train_vqgan", "train and adapt"),
    Verb("train prior", "train a language model that draws pictures", "train_prior", "train and adapt"),
    Verb("train gan", "train a generator of pictures against a critic", "train_gan", "train and adapt"),
    Verb("adapt", "adapt a model to your data (LoRA, DoRA, adapters, prefixes)", "adapt", "train and adapt"),
    Verb("adapt extract", "turn a full fine-tune into a LoRA", "adapt_extract", "train and adapt"),
    Verb("draft", "train what drafts for a model (Medusa, MTP, a small model)", "draft", "train and adapt"),
    Verb("annotate", "make masks for pictures with a promptable model", "annotate", "train and adapt"),
    Verb("resume", "go on with a run that was stopped, exactly where it was", "resume", "train and adapt"),
    Verb("eval", "measure a run or a model on held-out data", "eval", "use"),
    Verb("predict", "say what is in a picture", "predict", "use"),
    Verb("generate", "continue a prompt, or draw pictures", "generate", "use"),
    Verb("chat", "talk to a model", "chat", "use"),
    Verb("serve", "put a language model behind OpenAI's API", "serve", "use"),
    Verb("studio", "the catalogue and its instruments, in your browser", "studio", "use"),
    Verb("plan", "the memory of a training step, before it is run", "plan", "look"),
    Verb("claim", "measure what a paper says, on this machine", "claim", "look"),
    Verb("bench", "how fast it is here, beside the implementation people trust", "bench", "look"),
    Verb("inspect rf", "what every layer of a network sees of its input", "inspect_rf", "look"),
    Verb("inspect flops", "the arithmetic of a network, layer by layer", "inspect_flops", "look"),
    Verb("inspect gradients", "why a parameter learns nothing, and where a NaN began", "inspect_gradients", "look"),
    Verb("inspect threads", "every thread of a running process, Python and native", "inspect_threads", "look"),
    Verb("export", "write a run in a format other programs read", "export", "use"),
)


def available(verbs: tuple[Verb, ...] = VERBS) -> list[Verb]:
    """Return the rows whose file exists, in the table's order."""
    return [verb for verb in verbs if verb.exists()]
